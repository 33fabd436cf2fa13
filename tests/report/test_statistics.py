"""Intervals over seeds, and numbers as JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from jaxforget.report.run import plain
from jaxforget.report.statistics import mean_ci95, over_seeds


def test_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, half = mean_ci95(values)
    low, high = t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / np.sqrt(3))
    assert mean == pytest.approx(7 / 3) and mean - half == pytest.approx(low) and mean + half == pytest.approx(high)


def test_a_constant_is_itself():
    assert mean_ci95([0.003] * 3) == (0.003, 0.0)


def test_rows_join_by_name_and_a_missing_seed_is_missing():
    runs = [[{"name": "a", "x": 1.0, "y": None, "v": "ok"}], [{"name": "a", "x": 3.0, "y": 2.0, "v": "bad"}]]
    (row,) = over_seeds(runs)
    assert row["x"] == 2.0 and row["x_ci95"] == pytest.approx(12.706, rel=1e-4)  # t(0.975, 1) times sd / sqrt(2) = 1
    assert row["y"] is None and "y_ci95" not in row
    assert row["v"] == "ok / bad" and row["seeds"] == 2
    assert over_seeds(runs[:1]) == runs[0]


def test_intervals_over_items_do_not_pass_for_intervals_over_seeds():
    """Rows of metrics have both; the mean of what one seed says of its items says nothing of seeds."""
    runs = [[{"name": "a", "x": x, "x_ci95": 100.0, "x_low": -99.0, "x_high": 101.0, "y_low": 2.0}] for x in (1.0, 3.0)]
    (row,) = over_seeds(runs)
    assert row.keys() == {"name", "seeds", "x", "x_ci95", "y_low", "y_low_ci95"}
    assert row["x_ci95"] == pytest.approx(12.706, rel=1e-4)
    assert row["y_low"] == 2.0  # of a field that is not there: a number like any other


def test_rows_are_joined_by_name_in_any_order():
    one, other = {"name": "a", "x": 1.0}, {"name": "b", "x": 5.0}
    rows = over_seeds([[one, other], [other, one]])
    assert [(row["name"], row["x"], row["x_ci95"]) for row in rows] == [("a", 1.0, 0.0), ("b", 5.0, 0.0)]
    for wrong in ([one], [one, {**other, "name": "c"}], [one, other, other]):
        with pytest.raises(ValueError, match="rows of other names"):
            over_seeds([[one, other], wrong])


def test_a_note_of_some_seeds_is_told():
    """It says why a number is missing."""
    for first, second in ((None, "broke"), ("broke", None)):
        (row,) = over_seeds([[{"name": "a", "x": 1.0, "note": first}], [{"name": "a", "x": None, "note": second}]])
        assert row["x"] is None and row["note"] == "broke"
    (row,) = over_seeds([[{"name": "a"}], [{"name": "a", "note": "broke"}]])
    assert row["note"] == "broke"


def test_json_never_holds_nan_or_infinity():
    value = plain({"a": float("nan"), "b": [np.float32(np.inf), np.int64(3)], "c": Path("x") / "y"})
    assert json.dumps(value, allow_nan=False) == '{"a": null, "b": [null, 3], "c": "x/y"}'
