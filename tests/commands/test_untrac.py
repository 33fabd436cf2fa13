"""train.untrac and eval.influence: what they leave, what a kill leaves, and what they refuse."""

import json

import numpy as np
import pages
import pytest
import running
from shards import call, done
from test_resume import run_until

import eval.influence
import train.untrac
from jaxforget.influence.scores import load
from jaxforget.influence.truth import load_truth

QUICK = ("--preset", "smoke", "--generated", "A", "--rows", 12)
SETS = ("sim_same", "sim_diff", "dis_same", "dis_diff")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("untrac")
    done(train.untrac, *QUICK, "--snapshots", 2, "--methods", "untrac", "untrac_inv", "grad_dot", "tracin",
         "--settings", "untrac.every=5", "--out", home / "scores")  # fmt: skip
    done(eval.influence, "--scores", home / "scores", "--truth", "retrain", "--retrain.seeds", 2,
         "--retrain.subsets", 4, "--out", home / "judged")  # fmt: skip
    return home


def test_contract(home):
    for name, command in (("scores", "train.untrac"), ("judged", "eval.influence")):
        document = running.results(home / name)
        assert document["command"] == command and document["schema"] == 1 and document["device"]
        assert json.loads((home / name / "config.json").read_text())["config"] == document["config"]
        assert running.metrics(home / name) and not list((home / name).rglob("checkpoints"))
        assert pages.check((home / name / "report.html").read_text()).plots
    rows = running.results(home / "scores")["results"]
    methods = ("untrac", "untrac_inv", "grad_dot", "tracin")
    assert [row["name"] for row in rows] == [f"{method}: {name}" for method in methods for name in SETS]
    assert all(isinstance(row["influence_test"], float) and row["forward_tokens"] > 0 for row in rows)
    for method in methods:
        saved = load(home / f"scores/scores/{method}.npz")
        expected = [row["influence_test"] for row in rows if row["method"] == method]
        assert saved.answer.scores_KQ[:, 0].tolist() == expected and saved.datasets == SETS


def test_metrics_hold_the_curve(home):
    lines = [line for line in running.metrics(home / "scores") if line["stage"] == "untrac"]
    assert [line["step"] for line in lines] == [5, 10, 12]
    last = {f"change_{name}": running.row(home / "scores", f"untrac: {name}")["influence_test"] for name in SETS}
    assert {name: lines[-1][name] for name in last} == pytest.approx(last)


def test_the_trained_model_is_the_truths_full_run(home):
    """Scores are of the model that the truth of the first seed compares with: same data, order and start."""
    losses = [line["loss"] for line in running.metrics(home / "scores") if line["stage"] == "train"]
    members = [line["loss"] for line in running.metrics(home / "judged") if line["stage"] == "retrain"]
    assert [line[0] for line in members] == pytest.approx(losses, rel=1e-5)
    assert len(members[0]) == 2 * (1 + 4 + 4)


def test_agreement_is_of_what_was_saved(home, tmp_path):
    truth, rows = load_truth(home / "judged/truth.npz"), running.results(home / "judged")["results"]
    assert truth.influence_OKQ.shape == (2, 4, 1) and truth.subset_OJQ.shape == (2, 4, 1)
    mean_K = truth.influence_OKQ.mean(axis=0)[:, 0]
    for row in rows[:4]:
        scores_K = load(home / f"scores/scores/{row['name']}.npz").answer.scores_KQ[:, 0]
        assert row["pearson"] == pytest.approx(np.corrcoef(scores_K, mean_K)[0, 1])
        assert row["cost_vs_truth"] == pytest.approx(row["forward_tokens"] / truth.about["forward_tokens"])
        assert row["lds"] is not None
    assert [row["name"] for row in rows[4:]] == ["noise ceiling", "truth, one seed against the others"]
    done(eval.influence, "--scores", home / "scores", "--truth", home / "judged", "--out", tmp_path / "again")
    assert running.results(tmp_path / "again")["results"] == rows


def test_resumed_after_a_kill(home, tmp_path):
    """Half of the methods are done; what is there is kept, the rest is made, nothing stands twice."""
    flags = (*QUICK, "--snapshots", 2, "--methods", "untrac", "untrac_inv", "grad_dot", "tracin",
             "--settings", "untrac.every=5", "--out", tmp_path / "out", "--resume")  # fmt: skip

    def half():
        return (tmp_path / "out/scores/untrac.npz").exists()

    assert run_until(half, "train.untrac", *flags)
    done(train.untrac, *flags)
    ours, theirs = (running.results(out)["results"] for out in (tmp_path / "out", home / "scores"))
    costs = {"seconds", "memory_gb"}
    for one, other in zip(ours, theirs, strict=True):
        assert {f: v for f, v in one.items() if f not in costs} == {f: v for f, v in other.items() if f not in costs}
    lines = [(line["stage"], line["step"]) for line in running.metrics(tmp_path / "out")]
    assert len(lines) == len(set(lines))


def test_a_model_and_files(home, tmp_path):
    """A finished model with data of one's own; overlap is told, and its truth cannot be made."""
    model, data = home / "scores/model", tmp_path / "data"
    data.mkdir()
    for name, texts in {"a": ["one two", "three"], "b": ["four five", "six"], "q": ["three", "seven eight"]}.items():
        running.write_jsonl(data / f"{name}.jsonl", texts)
    flags = ("--train", f"a={data}/a.jsonl", f"b={data}/b.jsonl", "--test", f"q={data}/q.jsonl")
    outcome = done(train.untrac, "--model", model, *flags, "--methods", "untrac_inv", "--out", tmp_path / "out")
    assert "1 of 2 records of query q are also in dataset a" in outcome.said and "dataset b" not in outcome.said
    assert [row["dataset"] for row in running.results(tmp_path / "out")["results"]] == ["a", "b"]
    assert load(tmp_path / "out/scores/untrac_inv.npz").answer.examples["a"].shape == (2, 1)
    refused = call(eval.influence, "--scores", tmp_path / "out", "--truth", "retrain", "--out", tmp_path / "truth")
    assert refused.code == 2 and "whose training is not known" in refused.said and not (tmp_path / "truth").exists()
    other = call(eval.influence, "--scores", tmp_path / "out", "--truth", home / "judged", "--out", tmp_path / "truth")
    assert other.code == 2 and "scores the datasets a, b; the truth is of sim_same" in other.said


A, B = "a=a.jsonl", "b=b.jsonl"
REFUSED = {
    "no_name": (("--train", "a.jsonl", "--test", B), "--train a.jsonl: give NAME=FILE"),
    "no_file": (("--train", "a=", "--test", B), "--train a=: give NAME=FILE"),
    "flag_twice": (("--train", A, "--train", "b=b.jsonl", "--test", B), "--train is given twice; give it once"),
    "same_name": (("--train", A, "a=b.jsonl", "--test", B), "--train names 'a' twice"),
    "same_file": (("--train", A, "c=./a.jsonl", "--test", B), "as 'a' and as 'c'; give each dataset once"),
    "no_test": (("--train", A), "--test is missing"),
    "no_train": (("--test", A), "--train is missing"),
    "empty": (("--train", A, "e=empty.jsonl", "--test", B), "empty.jsonl: holds no records"),
    "short": (("--train", A, "s=short.jsonl", "--test", B), "s: no record has a token to score"),
    "missing": (("--train", A, "x=x.jsonl", "--test", B), "x.jsonl: no such file"),
    "method": (("--methods", "influence"), "unknown method 'influence'; valid methods are all, untrac, untrac_inv"),
    "setting": (("--settings", "untrac.rate=1"), "untrac has no 'rate'"),
    "value": (("--settings", "untrac.orders=0"), "orders is 0; it must be at least 1"),
    "optimizer": (("--settings", "untrac.optimizer=lion"), "unknown optimizer 'lion'"),
    "tracin": (("--methods", "tracin"), "tracin needs --snapshots"),
    "both": (("--model", "m", "--base", "m"), "--model and --base exclude each other"),
    "rows": (("--rows", 0), "rows is 0"),
    "rows of kinds": (("--generated", "kinds", "--rows", 0), "rows is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running.write_jsonl(tmp_path / "a.jsonl", ["one two three", "four"])
    running.write_jsonl(tmp_path / "b.jsonl", ["five six", "seven"])
    running.write_jsonl(tmp_path / "short.jsonl", [""])
    (tmp_path / "empty.jsonl").write_text("")
    flags, message = REFUSED[name]
    refused(train.untrac, flags, message, tmp_path)


def refused(module, flags, message, tmp_path):
    outcome = call(module, *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said, outcome.said
    assert outcome.said.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(home, tmp_path):
    wide = running.save_model(tmp_path / "wide", vocab_size=400)
    running.write_jsonl(tmp_path / "a.jsonl", ["one two"])
    flags = ("--model", home / "scores/model", "--tokenizer", wide, "--train", f"a={tmp_path}/a.jsonl",
             "--test", f"q={tmp_path}/a.jsonl")  # fmt: skip
    refused(train.untrac, flags, "the tokenizer produces", tmp_path)


JUDGED = {
    "no_scores": (("--truth", "retrain"), "--scores is missing"),
    "no_truth": (("--scores", "x"), "--truth is missing"),
    "no_such": (("--scores", "nowhere", "--truth", "retrain"), "nowhere: no scores"),
    "no_npz": (("--scores", "bad.npz", "--truth", "retrain"), "bad.npz is no file of scores"),
    "seeds": (("--retrain.seeds", 0), "--retrain.seeds is 0"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_judging_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    refused(eval.influence, *JUDGED[name], tmp_path)
