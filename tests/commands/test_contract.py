"""What a command leaves behind: config.json, metrics.jsonl, results.json, report.html and models that load."""

import json

import jax
import numpy as np
import pages
import pytest
import running

import train.lm
import train.unlearn
from jaxforget.models import hub

METHODS = ("gradient_ascent", "ascent_kl_indist")
REQUIRED = (
    "forget_nll", "approximate_nll", "retain_nll", "general_nll", "forget_accuracy", "retain_accuracy", "mink40_auc",
    "gap_to_retrained", "seconds", "train_tokens", "flops_vs_retraining",
)  # fmt: skip
LM_SMOKE = ("--preset", "smoke", "--epochs", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """One run of each command, by name, as a user starts it; eval.unlearning scores what train.unlearn saved."""
    home = tmp_path_factory.mktemp("runs")
    running.run("train.unlearn", "--preset", "smoke", "--methods", *METHODS, "--out", home / "train.unlearn")
    running.run("train.lm", *LM_SMOKE, "--out", home / "train.lm")
    models = home / "train.unlearn" / "seed0" / "models"
    running.run(
        "eval.unlearning", "--models", models / "original", *(models / name for name in METHODS),
        "--retrained", models / "retrained", "--forget", corpus["forget"], "--retain", corpus["retain"],
        "--approximate", corpus["approximate"], "--general", corpus["general_test"], "--out", home / "eval.unlearning",
    )  # fmt: skip
    return {name: home / name for name in ("train.unlearn", "train.lm", "eval.unlearning")}


COMMANDS = ("train.unlearn", "train.lm", "eval.unlearning")


# ------------------------------------------------------------------------------------------------ every command
@pytest.mark.parametrize("name", COMMANDS)
def test_config(name, runs):
    about = json.loads((runs[name] / "config.json").read_text())
    assert about["command"] == name and about["schema"] == 1
    assert about["config"]["out"] == str(runs[name])
    assert about["config"]["text"]["prompt_template"]  # defaults are written out
    assert {"python", "jax", "flax", "optax", "numpy"} <= about["versions"].keys()
    assert about["device"]
    if name.startswith("train"):
        assert about["config"]["seed"] == 0
        assert about["config"]["size"]["width"] == 32  # of the preset


@pytest.mark.parametrize("name", COMMANDS)
def test_results(name, runs):
    document = running.results(runs[name])
    assert document.keys() == {"command", "schema", "config", "device", "seconds", "results"}
    assert document["command"] == name and document["schema"] == 1
    assert document["config"] == json.loads((runs[name] / "config.json").read_text())["config"]
    assert document["seconds"] > 0
    names = [row["name"] for row in document["results"]]
    assert len(set(names)) == len(names) > 0
    for row in document["results"]:
        assert all(value is None or isinstance(value, (int, float, str)) for value in row.values())


@pytest.mark.parametrize("name", ["train.unlearn", "train.lm"])
def test_metrics(name, runs):
    text = (runs[name] / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    steps = {}
    for line in map(json.loads, text.splitlines()):
        assert isinstance(line["stage"], str) and isinstance(line["step"], int)
        if "loss" in line:
            steps.setdefault(line["stage"], []).append(line["step"])
    for stage, logged in steps.items():
        assert logged == list(range(1, len(logged) + 1)), stage  # every step once, in order
    done = {row["name"]: row["steps"] for row in running.results(runs[name])["results"] if row.get("steps")}
    if name == "train.unlearn":
        assert {stage: len(logged) for stage, logged in steps.items()} == done
    else:
        assert set(map(len, steps.values())) == set(done.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_needs_no_network(name, runs):
    page = (runs[name] / "report.html").read_text()
    assert "<svg" in page and "<table" in page
    pages.check(page)
    for row in running.results(runs[name])["results"]:
        assert row["name"] in page


def test_nothing_is_left_over(runs):
    for out in runs.values():
        assert not [path for path in running.files(out) if "/." in path or path.startswith(".")]
        assert not [path for path, content in running.files(out).items() if "checkpoint" in path and content]


# ---------------------------------------------------------------------------------------------- train.unlearn
def test_unlearning_rows(runs):
    rows = running.results(runs["train.unlearn"])["results"]
    assert [row["name"] for row in rows] == ["original", "retrained", *METHODS]
    for row in rows:
        assert all(isinstance(row[field], (int, float)) for field in REQUIRED), row["name"]
    assert rows[1]["gap_to_retrained"] == 0 and rows[1]["flops_vs_retraining"] == 1
    assert rows[0]["train_tokens"] > rows[1]["train_tokens"]  # it saw the forget set as well
    for row in rows[2:]:
        assert row["verdict"]
        assert row["forget_nll_gap"] == pytest.approx(row["forget_nll"] - rows[1]["forget_nll"])


def test_unlearning_again_gives_the_same_numbers_and_weights(runs, in_process):
    again = in_process(train.unlearn, "again", "--preset", "smoke", "--methods", METHODS[0]).out
    for name in ("original", "retrained", METHODS[0]):
        there, here = running.row(runs["train.unlearn"], name), running.row(again, name)
        assert [there[field] for field in REQUIRED if field != "seconds"] == [
            here[field] for field in REQUIRED if field != "seconds"
        ]
        weights = f"seed0/models/{name}/model.safetensors"
        assert (again / weights).read_bytes() == (runs["train.unlearn"] / weights).read_bytes()


def test_saved_models_load_and_evaluate_to_the_same_row(runs):
    scored = {row["name"]: row for row in running.results(runs["eval.unlearning"])["results"]}
    assert list(scored) == ["retrained", "original", *METHODS]
    for row in running.results(runs["train.unlearn"])["results"]:
        model, params = hub.load(runs["train.unlearn"] / "seed0" / "models" / row["name"])
        assert model.vocab_size == 512 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        for field in REQUIRED:
            # Same weights and records; batches of another width may round a sum differently.
            assert scored[row["name"]][field] == pytest.approx(row[field], rel=1e-6, abs=1e-6), field


def test_several_seeds_give_intervals(in_process):
    out = in_process(
        train.unlearn, "seeds", "--preset", "smoke", "--methods", METHODS[0], "--seeds", 2, "--train.epochs", 1
    ).out
    for row in running.results(out)["results"]:
        assert row["seeds"] == 2
        for field in REQUIRED:
            assert row[f"{field}_ci95"] >= 0, field
    assert running.row(out, "original")["forget_nll_ci95"] > 0  # two seeds, two models
    assert {line["seed"] for line in running.metrics(out)} == {0, 1}
    assert (out / "seed1" / "models" / METHODS[0] / "model.safetensors").exists()


def test_a_given_model_alone_leaves_unknowns_null(runs, corpus, in_process):
    model = runs["train.unlearn"] / "seed0" / "models" / "original"
    ran = in_process(
        train.unlearn,
        "given",
        "--model",
        model,
        "--forget",
        corpus["forget"],
        "--methods",
        METHODS[0],
        "--epochs",
        1,
    )
    assert "--stop-at approximate" in ran.said  # it cannot stop there, and says so
    rows = running.results(ran.out)["results"]
    assert [row["name"] for row in rows] == ["original", METHODS[0]]
    known = {"forget_nll", "forget_accuracy", "seconds", "train_tokens"}
    for row in rows:
        assert {field for field in REQUIRED if row[field] is not None} == known
    assert rows[0]["forget_nll"] == pytest.approx(
        running.row(runs["train.unlearn"], "original")["forget_nll"], abs=1e-6
    )


def test_a_given_yardstick_is_used(runs, corpus, in_process):
    models = runs["train.unlearn"] / "seed0" / "models"
    out = in_process(
        train.unlearn, "judged", "--model", models / "original", "--retrained", models / "retrained",
        "--forget", corpus["forget"], "--approximate", corpus["approximate"], "--retain", corpus["retain"],
        "--general", corpus["general"], "--general-test", corpus["general_test"],
        "--methods", METHODS[0], "--epochs", 2, "--id-field", "id",
    ).out  # fmt: skip
    for name in ("original", "retrained", METHODS[0]):
        here, there = running.row(out, name), running.row(runs["train.unlearn"], name)
        for field in set(REQUIRED) - {"seconds"}:
            assert here[field] == pytest.approx(there[field], rel=1e-6, abs=1e-6), (name, field)


def test_a_base_model_is_fine_tuned(runs, corpus, in_process):
    base = runs["train.lm"] / "model"
    out = in_process(
        train.unlearn, "tuned", "--base", base, "--forget", corpus["forget"], "--retain", corpus["retain"],
        "--methods", METHODS[0], "--train.epochs", 1, "--epochs", 1,
    ).out  # fmt: skip
    original, retrained = (running.row(out, name) for name in ("original", "retrained"))
    assert original["train_tokens"] > retrained["train_tokens"] > 0
    assert original["general_nll"] is None and original["gap_to_retrained"] > 0


def test_a_method_that_diverges_is_a_row_with_a_note(in_process):
    flags = (
        "--preset",
        "smoke",
        "--methods",
        METHODS[0],
        "--train.epochs",
        1,
        "--epochs",
        4,
        "--learning-rate",
        1e30,
    )
    row = running.row(in_process(train.unlearn, "diverged", *flags).out, METHODS[0])
    assert row["verdict"] == "failed" and "loss is nan" in row["note"]
    assert all(row[field] is None for field in REQUIRED)


# --------------------------------------------------------------------------------------------------- train.lm
def test_lm_rows(runs):
    rows = running.results(runs["train.lm"])["results"]
    assert [row["name"] for row in rows] == ["before:train", "after:train"]
    assert rows[1]["nll"] < rows[0]["nll"]
    assert all(rows[1][field] > 0 for field in ("steps", "seconds", "train_tokens", "tokens_per_second"))
    model, _ = hub.load(runs["train.lm"] / "model")
    assert model.config.hidden_size == 32


def test_lm_excludes_exactly_the_named_records(corpus, in_process):
    data = ("--data", corpus["forget"], corpus["retain"])
    flags = (*LM_SMOKE, "--id-field", "id")
    without = in_process(train.lm, "without", *flags, *data, "--exclude", corpus["forget"], corpus["general"])
    forgotten = len(corpus["forget"].read_text().splitlines())
    assert f"{forgotten} of them were in the data" in without.said
    never = in_process(train.lm, "never", *flags, "--data", corpus["retain"]).out
    for file in ("model.safetensors", "tokenizer.json"):  # bit for bit the model that never had them
        assert (without.out / "model" / file).read_bytes() == (never / "model" / file).read_bytes()
    everything = in_process(train.lm, "everything", *flags, *data).out
    assert running.row(everything, "after:train")["train_tokens"] > running.row(never, "after:train")["train_tokens"]


def test_lm_excludes_by_content_where_there_are_no_ids(tmp_path, in_process):
    texts = [f"the {animal} of number {i} sleeps" for i, animal in enumerate(["cat", "dog", "owl", "fox"] * 4)]
    data = running.write_jsonl(tmp_path / "data.jsonl", texts)
    gone = tmp_path / "gone.csv"  # another format and order
    gone.write_text("text\n" + "".join(f"{text}\n" for text in reversed(texts[3:6])))
    kept = running.write_jsonl(tmp_path / "kept.jsonl", texts[:3] + texts[6:])
    without = in_process(train.lm, "without", *LM_SMOKE, "--data", data, "--exclude", gone)
    assert "--exclude names 3 records; 3 of them were in the data" in without.said
    never = in_process(train.lm, "never", *LM_SMOKE, "--data", kept).out
    weights = "model/model.safetensors"
    assert (without.out / weights).read_bytes() == (never / weights).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lm_continues_from_a_directory(family, corpus, in_process):
    flags = (*LM_SMOKE, "--data", corpus["retain"], "--evaluate", corpus["forget"])
    first = in_process(train.lm, "first", *flags, "--size.family", family).out
    model, _ = hub.load(first / "model")
    assert model.config.model_type == family
    second = in_process(train.lm, "second", *flags, "--model", first / "model").out
    for name in ("train", "forget.jsonl"):
        before, after = running.row(second, f"before:{name}"), running.row(first, f"after:{name}")
        assert before["nll"] == pytest.approx(after["nll"], abs=1e-6)
    assert running.row(second, "after:train")["nll"] < running.row(second, "before:train")["nll"]


def test_lm_scores_two_files_of_one_name(corpus, tmp_path, in_process):
    (tmp_path / "other").mkdir()
    other = running.write_jsonl(tmp_path / "other" / "forget.jsonl", ["one text of words", "another text of words"])
    out = in_process(train.lm, "out", *LM_SMOKE, "--data", corpus["retain"], "--evaluate", corpus["forget"], other).out
    after = [row["name"] for row in running.results(out)["results"] if row["name"].startswith("after:")]
    assert after == ["after:train", "after:forget.jsonl", f"after:{other}"]
