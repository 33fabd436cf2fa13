"""eval.fairness: what it leaves, what it leaves out after a deletion, and what it refuses."""

import json
import shutil

import numpy as np
import pages
import pytest
import running
from shards import call, done

import eval.fairness
import train.forget
import train.sisa
from jaxforget.fairness.metrics import group_metrics
from jaxforget.fairness.predictor import load, probability
from jaxforget.sisa.ensemble import Ensemble

SIZE = ("--size.width", 16, "--size.layers", 1, "--size.heads", 2, "--size.vocab-size", 300, "--size.context", 32)


def write(path, count, seed, *, group=None, label=None):
    """Texts whose class shows in a word most of the time, for one group less often."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for n in range(count):
            where = group or ("north", "south")[rng.integers(2)]
            true = int(rng.random() < 0.5) if label is None else label
            shown = true if rng.random() < (0.95 if where == "north" else 0.75) else 1 - true
            text = f"{('dull', 'bright')[shown]} {rng.integers(1000)} of {where}"
            record = {"id": f"{path.stem}-{n}", "text": text, "label": ("no", "yes")[true], "where": where}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("fairness")
    write(home / "train.jsonl", 90, 0)
    write(home / "fit.jsonl", 120, 1)
    write(home / "test.jsonl", 100, 2)
    done(train.sisa, *training(home), "--shards", 3, "--epochs", 20, "--batch-size", 8, "--out", home / "ensemble")
    return home


def training(home):
    task = ("--task", "classification", "--label-field", "label", "--id-field", "id", "--slices", 1)
    return ("--data", home / "train.jsonl", *task, *SIZE)


def flags(home, *more, ensemble="ensemble"):
    sets = ("--fit", home / "fit.jsonl", "--test", home / "test.jsonl", "--groups", "where", "--resamples", 50)
    return ("--ensemble", home / ensemble, *sets, *more)


@pytest.fixture(scope="module")
def report(home):
    done(eval.fairness, *flags(home, "--epsilon", 0, 0.05, "--out", home / "report"))
    return home / "report"


def test_the_fit_set_has_equal_odds_and_the_others_their_rows(report):
    rows = {row["name"]: row for row in running.results(report)["results"]}
    methods = ("each", "majority", "count", "vector")
    others = {f"{method} ε={epsilon}" for method in methods for epsilon in ("0", "0.05")}
    assert rows.keys() == {"none"} | others
    for method in ("majority", "count", "vector"):
        assert rows[f"{method} ε=0"]["fit_eo_max"] == pytest.approx(0.0, abs=1e-5)
        assert rows[f"{method} ε=0.05"]["fit_eo_max"] <= 0.05 + 1e-5
        assert rows[f"{method} ε=0.05"]["fit_accuracy"] >= rows[f"{method} ε=0"]["fit_accuracy"] - 1e-4
    assert rows["none"]["fit_eo_max"] > 0.01  # else there was nothing to repair
    assert rows["vector ε=0"]["fit_accuracy"] >= rows["count ε=0"]["fit_accuracy"] - 1e-4
    for row in rows.values():
        assert row["test_eo_max_low"] <= row["test_eo_max_high"]
    page = (report / "report.html").read_text()
    assert "vector" in page and len(pages.check(page).plots) == 2


def test_a_saved_predictor_gives_the_reported_numbers(report, home):
    document = running.results(report)
    with Ensemble(home / "ensemble") as ensemble:
        records = eval.fairness.read(str(home / "test.jsonl"), ensemble.recipe.text)
        group_N, _ = eval.fairness.groups_of(records, "where", document["groups"])
        votes = eval.fairness.vote(ensemble, records, group_N, document["positive"], "test")
    assert votes.votes_NK.shape == (100, 3) and set(np.unique(votes.votes_NK)) == {0, 1}
    assert [record.fields["label"] == "yes" for record in records] == votes.label_N.tolist()
    for row in document["results"]:
        predictor = load(report / row["predictor"])
        metrics = group_metrics(probability(predictor, votes.votes_NK, group_N), votes.label_N, group_N, 2)
        assert 100 * float(metrics["accuracy"]) == pytest.approx(row["test_accuracy"], abs=1e-4)
        assert float(metrics["eo_max"]) == pytest.approx(row["test_eo_max"], abs=1e-5)


def test_deleted_records_are_left_out_of_the_fit(home):
    """A record that was trained on and is in the fit set too."""
    shutil.copytree(home / "ensemble", home / "after")
    both = home / "both.jsonl"
    line = (home / "train.jsonl").read_text().splitlines()[0]
    both.write_text((home / "fit.jsonl").read_text() + line + "\n")
    sets = ("--fit", both, "--methods", "count", "--epsilon", 0)
    before = call(eval.fairness, *flags(home, *sets, "--out", home / "r1", ensemble="after"))
    assert before.code == 0 and "1 records of --fit and --test are training text" in before.said
    done(train.forget, "--ensemble", home / "after", "--id", json.loads(line)["id"], "--out", home / "forgotten")
    after = call(eval.fairness, *flags(home, *sets, "--out", home / "r2", ensemble="after"))
    assert "1 records have been deleted from the ensemble and are left out" in after.said
    one, two = running.results(home / "r1"), running.results(home / "r2")
    assert (one["left_out"], two["left_out"]) == (0, 1)
    assert one["ensemble_state"] != two["ensemble_state"] and one["fitted_on_sha256"] != two["fitted_on_sha256"]
    plain = flags(home, "--methods", "count", "--epsilon", 0, "--out", home / "r3", ensemble="after")
    done(eval.fairness, *plain)  # without the record from the start
    assert running.results(home / "r3")["fitted_on_sha256"] == two["fitted_on_sha256"]
    assert (home / "r3/predictors/count-0.json").read_bytes() == (home / "r2/predictors/count-0.json").read_bytes()


def test_even_members_say_how_ties_go(home):
    done(train.sisa, *training(home), "--shards", 2, "--epochs", 1, "--out", home / "two")
    outcome = call(eval.fairness, *flags(home, "--methods", "none", "--out", home / "r-two", ensemble="two"))
    assert outcome.code == 0 and "2 members can tie; a tie counts as 'no'" in outcome.said


REFUSED = {
    "no_groups": (("--groups", "nowhere"), "has no field 'nowhere'; it has"),
    "unseen_group": (("--test", "west.jsonl"), "is of group 'west', which the fit set does not have"),
    "one_class": (("--fit", "one_class.jsonl"), "group 'east' has no example of label 1"),
    "method": (("--methods", "counts"), "unknown method counts; valid names are none, each, majority, count, vector"),
    "epsilon": (("--epsilon", 2), "--epsilon is 2.0; it must be between 0 and 1"),
    "positive": (("--positive", "maybe"), "--positive is 'maybe'; the classes are no, yes"),
    "no_file": (("--fit", "absent.jsonl"), "absent.jsonl: no such file"),
    "no_ensemble": (("--ensemble", "absent"), "absent is not an ensemble"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(home, name, tmp_path, monkeypatch):
    more, message = REFUSED[name]
    monkeypatch.chdir(home)
    write(home / "west.jsonl", 10, 3, group="west")
    north = (home / "fit.jsonl").read_text()
    (home / "one_class.jsonl").write_text(north + write(home / "east.jsonl", 10, 4, group="east", label=0).read_text())
    outcome = call(eval.fairness, *flags(home, *more, "--out", tmp_path / "out"))
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said
    assert outcome.said.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_pooled_group_is_not_refused(home, tmp_path):
    north = (home / "fit.jsonl").read_text()
    (home / "pool.jsonl").write_text(north + write(home / "east.jsonl", 10, 4, group="east", label=0).read_text())
    settings = ("--fit", home / "pool.jsonl", "--pool", "--methods", "count", "--epsilon", 0)
    done(eval.fairness, *flags(home, *settings, "--out", tmp_path / "out"))
    assert "east" in " ".join(load(tmp_path / "out/predictors/count-0.json").notes)


def test_a_language_model_is_no_classifier(home, tmp_path):
    done(train.sisa, "--preset", "smoke", "--shards", 2, "--corpus.general-records", 2, *SIZE,
         "--epochs", 2, "--out", tmp_path / "lm")  # fmt: skip
    outcome = call(eval.fairness, *flags(home, "--ensemble", tmp_path / "lm", "--out", tmp_path / "out"))
    assert outcome.code == 2 and "is no ensemble of two-class classifiers: its task is causal" in outcome.said
