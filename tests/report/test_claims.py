"""Verdicts follow from intervals, and from nothing else."""

import pytest

from jaxforget.report.claims import Claim, judged, statement


def runs(*differences):
    """One run a seed, whose settings `a` and `b` differ by this much."""
    return [[{"name": "a, x", "gap": 1.0 + d}, {"name": "b", "gap": 1.0}] for d in differences]


@pytest.mark.parametrize(
    ("holds", "differences", "verdict"),
    [
        ("above", (0.3, 0.31, 0.29), "replicates"),
        ("below", (0.3, 0.31, 0.29), "opposite"),
        ("differs", (-0.3, -0.31, -0.29), "replicates"),
        ("above", (0.3, -0.2, 0.4), "not established"),
        ("above", (0.3,), "not established"),
        ("above", (0.0, 0.0, 0.0), "not established"),
    ],
)
def test_verdict(holds, differences, verdict):
    row = judged(Claim("it grows", "Table 1", "gap", holds, "a, x", "b"), runs(*differences))
    assert row["verdict"] == verdict and row["difference"] == pytest.approx(sum(differences) / len(differences))
    assert statement([row]) == [f"It grows, by gap: {verdict} (a)."]


def test_a_measure_that_is_missing_establishes_nothing():
    row = judged(Claim("it grows", "Table 1", "other", "above", "a, x", None), runs(0.3, 0.3))
    assert row["verdict"] == "not established" and row["difference"] is None
