"""benchmarks.unlearning: what it leaves, how it chooses, that finished cells are kept, and what it refuses."""

import json

import numpy as np
import pages
import pytest
import running
from matplotlib.figure import Figure
from shards import call, done

import benchmarks.unlearning
from benchmarks.unlearning.study import halved, read_sets
from jaxforget.data.sources import Record
from jaxforget.unlearning.tuning import criterion, curves, over_settings, robustness

FLAGS = ("--preset", "smoke", "--methods", "ascent_descent_indist", "--train.epochs", 2, "--size.layers", 1,
         "--metrics", "language", "memorisation", "--measures.max-new-tokens", 4, "--bits", 8,
         "--choosing-seeds", 1)  # fmt: skip


@pytest.mark.slow
def test_smoke(tmp_path):
    out = tmp_path / "out"
    done(benchmarks.unlearning, *FLAGS, "--out", out)
    document = running.results(out)
    rows = {row["name"]: row for row in document["results"]}
    assert list(rows) == ["original", "retrained", "ascent_descent_indist", "sisa before", "sisa"]
    assert 0 < rows["sisa"]["deletion_share"] <= 1 and rows["sisa"]["forget_nll"] != rows["sisa before"]["forget_nll"]
    sweep = document["sweeps"]["ascent_descent_indist"]
    assert len(sweep["grid"]) == 2 * 2 * 2  # rates, strengths, checkpoints
    assert sweep["chosen"] == max(sweep["grid"], key=lambda one: one["criterion"])
    assert sweep["cost"]["runs"] == 2 * 2  # rates and strengths of the seed that chooses
    chosen = rows["ascent_descent_indist"]
    assert chosen["step"] == sweep["chosen"]["step"] and chosen["learning_rate_ci95"] == 0.0
    for row in list(rows.values())[:3]:  # measured twice, by the metric and beside the quantised weights
        assert row["memorisation"] == pytest.approx(row["memorisation_32bit"])
        assert row["memorisation_8bit"] != row["memorisation_32bit"]
    steps = [one["step"] for one in document["relearning"] if (one["name"], one["seed"]) == ("retrained", 0)]
    assert steps == [0, 2, 4]
    first = next(one for one in document["relearning"] if one["name"] == "retrained")
    for name in ("es", "forget_nll"):
        assert first[name] == pytest.approx(document["by_seed"][0][1][name])
    spent = json.loads((out / "cells/yardsticks.json").read_text())
    assert rows["retrained"]["tuning_steps"] == spent["steps"] / 2 / 2  # of one of two models, and of two seeds
    served = [(one["name"], one["seed"], one["request"]) for one in document["requests"]]
    assert sorted(served) == sorted((name, seed, n) for name in (*list(rows)[:3], "sisa") for seed in (0, 1)
                                    for n in (1, 2) if name != "sisa" or not seed)  # fmt: skip
    whole = next(one for one in document["requests"] if (one["name"], one["request"]) == ("original", 2))
    assert whole["memorisation"] == pytest.approx(document["by_seed"][0][0]["memorisation"])  # the last asks for all
    deleted = document["by_seed"][0][-1]
    exact = {one["request"]: one for one in document["requests"] if one["name"] == "sisa"}
    assert exact[2]["forget_nll"] == deleted["forget_nll"]  # in two requests or in one: the same bits
    again = [one for one in document["relearning"] if (one["name"], one["seed"]) == ("sisa", 0)]
    assert [one["step"] for one in again] == steps and again[0]["forget_nll"] == deleted["forget_nll"]
    assert again[-1]["forget_nll"] == deleted["relearned_forget_nll"] < deleted["forget_nll"]
    for name in ("preference_sum", "loss_of_genders_gap_male_female", "loss_of_retain_gap_north_south"):
        assert f"{name}_ci95" in rows["original"] and f"{name}_change" not in rows["original"]
        for seed in document["by_seed"]:
            first, retrained = seed[0], seed[1]
            assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]
            assert retrained[f"{name}_change"] == pytest.approx(retrained[name] - first[name])
        assert f"{name}_change_ci95" in chosen and f"{name}_low" not in chosen and name not in rows["sisa"]
    page = (out / "report.html").read_text()
    assert "Relearning" in page and "Side effects" in page and len(pages.check(page).plots) >= 6
    assert not (out / "scratch/ascent_descent_indist").exists()

    cells = {path: path.read_bytes() for path in (out / "cells").iterdir()}
    (out / "cells/sweep-ascent_descent_indist.json").unlink()
    (out / "cells/test-ascent_descent_indist-1.json").unlink()
    (out / "cells/side-effects-1.json").unlink()
    done(benchmarks.unlearning, *FLAGS, "--out", out, "--resume")
    again = running.results(out)
    for one, other in zip(document["results"], again["results"], strict=True):
        timed = {key for key in one if "seconds" in key}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    changed = [path.name for path, content in cells.items() if path.read_bytes() != content]
    assert set(changed) <= {"sweep-ascent_descent_indist.json"}  # its seconds


def test_halves_are_of_the_ids_alone():
    records = [Record(f"r{i}", "a", "q") for i in range(9)]
    found, other = halved(records), halved(records[::-1])
    assert found == other and len(found["validation"]) == 4 and len(found["test"]) == 5
    assert {r.id for half in found.values() for r in half} == {r.id for r in records}


def test_the_criterion_does_not_pay_for_more_utility_than_there_was():
    row = {"memorisation": 0.5, "utility": 0.4}
    assert criterion(row, {"utility": 0.8}) == pytest.approx(0.5)  # harmonic mean of 0.5 and 0.5
    assert criterion(row, {"utility": 0.1}) == pytest.approx(2 / (1 / 0.5 + 1 / 1))
    assert criterion({**row, "memorisation": None}, {"utility": 0.8}) is None


def test_a_setting_that_fails_for_a_seed_is_not_chosen_and_not_robust():
    def point(rate, seed, value):
        return {"learning_rate": rate, "strength": 1.0, "step": 4, "seed": seed, "criterion": value}

    means = over_settings([point(1, 0, 0.5), point(1, 1, 0.7), point(2, 0, 0.9), point(2, 1, None),
                           point(3, 0, 0.55), point(3, 1, 0.55), point(4, 0, 0.2), point(4, 1, 0.2)], 2)  # fmt: skip
    assert [one["criterion"] for one in means] == pytest.approx([0.6, None, 0.55, 0.2])
    assert robustness(means) == 2 / 4  # 0.6 and 0.55, of four settings
    assert robustness([{"criterion": None}]) is None


def write(path, count, **fields):
    rows = [{"question": f"{path.stem} {i}?", "answer": f"yes {i}", **fields} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("flags", "message"), [
    (("--methods", "shapley"), "unknown method 'shapley'"),
    (("--metrics", "beauty"), "unknown metric 'beauty'"),
    (("--checkpoints", 0), "--checkpoints is 0"),
    (("--strengths", 0, "--methods", "npo"), "strength is 0"),
    (("--learning-rates", -1), "learning_rate is -1"),
    (("--bits", 3), "--bits 3 is unknown"),
    (("--slices", 0), "slices"),
    (("--requests", 50), "--requests is 50"),
    (("--retain", "RETAIN"), "--forget is missing"),
    (("--forget", "FORGET"), "--retain is missing"),
    (("--forget", "PLAIN", "--retain", "RETAIN"), "no wrong answers"),
    (("--forget", "FORGET", "--retain", "FORGET"), "share"),
    (("--trainable", "nothing", "--methods", "npo"), "matches no parameter"),
])  # fmt: skip
def test_refused_in_one_sentence(flags, message, tmp_path):
    wrong = {"paraphrased_answer": "sure", "perturbed_answer": ["no"]}
    files = {"FORGET": write(tmp_path / "f.jsonl", 4, **wrong), "RETAIN": write(tmp_path / "r.jsonl", 12, **wrong),
             "PLAIN": write(tmp_path / "p.jsonl", 4)}  # fmt: skip
    flags = [files.get(flag, flag) for flag in flags]
    outcome = call(benchmarks.unlearning, "--preset", "smoke", *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said
    assert not (tmp_path / "out").exists()


def test_never_trained_records_are_held_out_of_the_retain_set(tmp_path):
    wrong = {"paraphrased_answer": "sure", "perturbed_answer": ["no"]}
    config = benchmarks.unlearning.Config(forget=str(write(tmp_path / "f.jsonl", 4, **wrong)),
                                          retain=str(write(tmp_path / "r.jsonl", 12, **wrong)))  # fmt: skip
    trained, measured = read_sets(config)
    assert [r.text for r in trained["retain"]] == [f"yes {i}" for i in range(8)]
    assert [r.text for r in measured["approximate"]] == [f"yes {i}" for i in range(8, 12)]
    assert np.all([a.id == b.id for a, b in zip(measured["retain"], trained["retain"], strict=True)])


@pytest.mark.parametrize(("field", "highest", "scale"),
                         (("forget_nll", 6, "linear"), ("forget_nll", 60, "log"), ("es", 60, "linear")))
def test_a_loss_that_ran_away_does_not_squeeze_the_others(field, highest, scale):
    values = (2.0, None, highest)
    points = [{"name": "npo", "seed": 0, "step": step, field: value} for step, value in enumerate(values)]
    axes = Figure().add_subplot()
    curves(points, field, "step")(axes)
    assert axes.get_yscale() == scale


def test_a_curve_does_not_average_those_that_survived():
    points = [{"name": "npo", "seed": seed, "step": step, "es": value}
              for seed, values in ((0, (0.5, None, 0.9)), (1, (0.1, 0.1, 0.2))) for step, value in enumerate(values)]
    axes = Figure().add_subplot()
    curves(points[::-1], "es", "step")(axes)
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(line.get_ydata(), [0.3, np.nan, 0.55])
