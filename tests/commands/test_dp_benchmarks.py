"""benchmarks.dp_utility and dp_bias: how a rate is chosen, what members share, resuming, and what is refused."""

import json

import numpy as np
import pages
import pytest
import running

import benchmarks.dp_bias
import benchmarks.dp_utility

WORDS = "old tall young cook clerk pilot nurse likes sees feeds cats dogs birds every day".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp("dp"), np.random.default_rng(0)
    running.save_model(home / "model", context=96)
    for name, count in (("train", 60), ("dev", 20), ("test", 20)):
        rows = [{"question": f"who {' '.join(rng.choice(WORDS, 3))}", "answer": " ".join(rng.choice(WORDS, 4)),
                 "text": " ".join(rng.choice(WORDS, 5)), "label": "ab"[n % 2]} for n in range(count)]  # fmt: skip
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


FEW = ("--model", "model", "--data", "train.jsonl", "--test", "test.jsonl", "--train.epochs", 1,
       "--train.batch-size", 8, "--train.microbatch", 4)  # fmt: skip
UTILITY = (*FEW, "--validation", "dev.jsonl", "--text-field", "text", "--epsilons", 8, "--learning-rates", 1e-3, 3e-2,
           "--seeds", 2)  # fmt: skip


@pytest.mark.slow
def test_every_level_takes_the_settings_that_validation_prefers(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    flags = (*UTILITY, "--clips", 0.1, 2)
    out = in_process(benchmarks.dp_utility, "out", *flags).out
    document = running.results(out)
    tried, first, second = document["tried"], *document["by_seed"]
    assert len(tried) == 2 + 2 * 2
    assert [row["name"] for row in document["results"]] == ["before fine-tuning", "no DP", "ε=8"]
    assert pages.check((out / "report.html").read_text()).plots
    for level in ("no DP", "ε=8"):
        best = min((row for row in tried if row["level"] == level), key=lambda row: row["validation_nll"])
        mine = [row for row in (*first, *second) if row["level"] == level]
        assert [row["seed"] for row in mine] == [0, 1]
        assert {(row["learning_rate"], row["clip"]) for row in mine} == {(best["learning_rate"], best["clip"])}
        assert mine[0]["accuracy"] == best["accuracy"]
    private = running.row(out, "ε=8")
    assert private["epsilon"] <= 8 and private["sigma"] > 0 and private["population"] == 60 == 20 * 3
    (out / "results.json").unlink()
    (out / "cell-other-seeds.json").unlink()
    again = running.results(in_process(benchmarks.dp_utility, "out", *flags, "--resume").out)
    assert again["results"] == document["results"]


@pytest.mark.slow
def test_questions_are_held_out_whole_and_answers_compared(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    config = benchmarks.dp_utility.Config(
        data="train.jsonl", test="test.jsonl", task="causal",
        text=benchmarks.dp_utility.TextConfig(question_field="text", answer_field="answer"),
    )  # fmt: skip
    sets = benchmarks.dp_utility.load(config)
    asked = {name: {record.prompt for record in records} for name, records in sets.items()}
    assert not asked["train"] & asked["validation"] and len(sets["train"]) + len(sets["validation"]) == 60
    pytest.importorskip("sacrebleu")
    flags = ("--task", "causal", "--question-field", "question", "--answer-field", "answer", "--prompts", 3,
             "--max-new-tokens", 4, "--epsilons", 8, "--learning-rates", 1e-2, "--seeds", 1)  # fmt: skip
    document = running.results(in_process(benchmarks.dp_utility, "out", *FEW, *flags).out)
    assert all(0 <= row["bleu"] <= 100 and 0 < row["nll"] for row in document["results"])


BIAS = ("--model", "model", "--epsilons", 8, "--seeds", 2, "--stereotyped.records", 40, "--stereotyped.test-records",
        20, "--train.batch-size", 8, "--train.microbatch", 4, "--train.epochs", 1, "--gradient-probes", 4,
        "--max-new-tokens", 2, "--resamples", 10)  # fmt: skip


@pytest.mark.slow
def test_bias_of_levels_with_and_without_counterfactuals(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    out = in_process(benchmarks.dp_bias, "out", *BIAS).out
    assert len(pages.check((out / "report.html").read_text()).plots) >= 6
    document = running.results(out)
    names = [f"{level}, CDA {cda}" for cda in ("off", "on") for level in ("no DP", "ε=8")]
    assert [row["name"] for row in document["results"]] == ["pretrained", *names]
    promises = {row["name"]: row for row in document["privacy"]}
    # A record and its counterfactual are one unit: augmentation changes neither the number of units nor the noise.
    with_, without = promises["ε=8, CDA on"], promises["ε=8, CDA off"]
    assert with_["population"] == without["population"] == 40 and with_["sigma"] == without["sigma"] > 0
    assert with_["unit"] != without["unit"] and promises["no DP, CDA off"]["sigma"] == 0
    assert len(document["claims"]) == len(document["statement"]) > 5
    assert {row["group"] for row in document["gradients"]} == {"male", "female"}


@pytest.mark.parametrize("module, flags, said", [
    (benchmarks.dp_utility, ("--data", "train.jsonl", "--test", "test.jsonl"), "--model is missing"),
    (benchmarks.dp_utility, (*UTILITY, "--dp.epsilon", 1), "see --epsilons"),
    (benchmarks.dp_utility, (*UTILITY, "--dp.clip", 1), "see --epsilons and --clips"),
    (benchmarks.dp_utility, (*FEW, "--label-field", "none"), "none"),
    (benchmarks.dp_utility, (*UTILITY, "--dp.delta", 0.5), "it must be below 1/N"),
    (benchmarks.dp_utility, (*UTILITY, "--trainable", "none/.*"), "pattern 'none/.*' matches no parameter"),
    (benchmarks.dp_bias, (*BIAS, "--max-new-tokens", 60), "leaves room for"),
    (benchmarks.dp_bias, (*BIAS, "--corpus", "train.jsonl"), "--test and a file as --corpus come together"),
    (benchmarks.dp_bias, (*BIAS, "--cda.sides", "off"), "leave nothing to compare"),
    (benchmarks.dp_bias, (*BIAS, "--dp.delta", 0.5), "it must be below 1/N"),
])  # fmt: skip
def test_refused_in_one_sentence(home, in_process, monkeypatch, capsys, tmp_path, module, flags, said):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as stop:
        in_process(module, "refused", *flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
