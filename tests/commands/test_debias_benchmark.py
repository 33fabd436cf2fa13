"""benchmarks.modular_debiasing: its rows, and that a resumed run states the seconds of all its processes."""

import json

import pages
import pytest
import running
from shards import done

import benchmarks.modular_debiasing as benchmark


def test_seconds_are_those_in_which_something_was_worked_on():
    assert benchmark.covered([(0, 4), (1, 3), (2, 6), (100, 101)]) == 7.0  # two at a time, and a pause
    assert benchmark.covered([(5, 6), (0, 1)]) == 2.0


@pytest.mark.slow
def test_a_run_stopped_between_cells_is_resumed(tmp_path):
    flags = ("--generated", 200, "--seeds", 2, "--densities", 0.05, "--regimes", "post", "--workers", 1,
             "--task-epochs", 1, "--epochs", 1, "--fixed-epochs", 1, "--attack.epochs", 1, "--size.width", 16,
             "--size.heads", 2, "--size.context", 16, "--size.vocab-size", 300, "--out", tmp_path / "out")  # fmt: skip
    done(benchmark, *flags)
    whole = running.results(tmp_path / "out")
    names = ["core", "LEACE coast", "LEACE guild", "LEACE coast+guild", "whole coast", "whole guild",
             "whole coast+guild", "POST 5%: coast", "POST 5%: guild", "POST 5%: coast+guild"]  # fmt: skip
    assert [row["method"] for row in whole["results"]] == names
    assert pages.check((tmp_path / "out/report.html").read_text()).plots
    assert all(row["seeds"] == 2 and row["floor_coast"] > 0 for row in whole["results"])
    cells = sorted((tmp_path / "out/cells").iterdir())
    spans = [(one["began"], one["ended"]) for one in (json.loads(cell.read_text()) for cell in cells)]
    assert len(cells) == 10 and whole["seconds"] == pytest.approx(sum(b - a for a, b in spans), abs=0.01)
    cells[-1].unlink()
    done(benchmark, *flags, "--resume")
    again = running.results(tmp_path / "out")
    assert again["results"] == whole["results"] and again["verdicts"] == whole["verdicts"]
    assert again["seconds"] > sum(b - a for a, b in spans[:-1])
