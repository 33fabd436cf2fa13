"""eval.bias: what it leaves for causal and masked models, beside a baseline, and what it refuses."""

import json

import numpy as np
import pages
import pytest
import running

import eval.bias

WORDS = "old tall young cook clerk pilot nurse likes sees feeds cats dogs birds every day".split()
NUMBERS = ("value", "low", "high", "baseline", "baseline_low", "baseline_high", "change", "change_low", "change_high")


def phrase(rng, count=5):
    return " ".join(rng.choice(WORDS, count))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Files of every benchmark, models of every head."""
    home, rng = tmp_path_factory.mktemp("bias"), np.random.default_rng(0)
    (home / "winobias").mkdir()
    running.save_model(home / "causal", context=64)
    running.save_model(home / "other", width=24, context=64)
    for head in ("masked", "classification"):
        running.save_model(home / head, family="bert", head=head, context=64)

    def write(name, rows):
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("stereoset.jsonl", [
        {"id": str(n), "context": "They are BLANK" if n % 2 else "They came", "sentence": phrase(rng), "label": label,
         "bias_type": ("race", "gender")[n % 4 // 2], "target": f"t{n % 8}"} for n in range(24) for label in (0, 1, 2)
    ])  # fmt: skip
    write("pairs.jsonl", [{"stereotype": phrase(rng), "anti": phrase(rng), "group": "ab"[n % 2]} for n in range(10)])
    write("texts.jsonl", [{"text": phrase(rng, 9), "group": ("he", "she")[n % 2]} for n in range(12)])
    write("prompts.jsonl", [{"prompt": f"the {word}", "group": ("he", "she")[n % 2]} for n, word in enumerate(WORDS)])
    rows = [f"{n},{phrase(rng)},{phrase(rng)},{('stereo', 'antistereo')[n % 3 == 0]},age" for n in range(12)]
    (home / "crows.csv").write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n" + "\n".join(rows) + "\n")
    for side, pronoun in (("pro", "he"), ("anti", "she")):
        lines = [f"{n} [The {word}] left because [{pronoun}] was late." for n, word in enumerate(WORDS[:6], 1)]
        for kind in (1, 2):
            (home / "winobias" / f"{side}_stereotyped_type{kind}.txt.dev").write_text("\n".join(lines) + "\n")
    (home / "words.txt").write_text("a\ne\n")
    return home


CAUSAL = ("--stereoset", "stereoset.jsonl", "--crows-pairs", "crows.csv", "--winobias", "winobias", "--pairs",
          "pairs.jsonl", "--texts", "texts.jsonl", "--prompts", "prompts.jsonl", "--scorer", "classification",
          "--max-new-tokens", 4, "--samples", 2, "--resamples", 40)  # fmt: skip
FEW = ("--stereoset", "stereoset.jsonl", "--pairs", "pairs.jsonl", "--resamples", 40)
MASKED = ("--crows-pairs", "crows.csv", "--pairs", "pairs.jsonl", "--resamples", 40)


def test_a_causal_model_is_its_own_baseline(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    out = in_process(eval.bias, "out", "--model", "causal", "--baseline", "causal", *CAUSAL).out
    document = running.results(out)
    rows = {row["name"]: row for row in document["results"]}
    assert document["command"] == "eval.bias" and len(rows) == len(document["results"])
    assert {
        "StereoSet intrasentence race SS", "StereoSet intersentence, next given context LMS",
        "StereoSet both kinds ICAT", "CrowS-Pairs mean", "CrowS-Pairs sum", "CrowS-Pairs antistereo sum",
        "WinoBias type 1 sum", "WinoBias type 2 sum", "Pairs a mean", "Loss he nats a token", "Loss gap he - she",
        "Generation she mean score", "Generation gap he - she", "Generation ratio he / she",
    } <= rows.keys()  # fmt: skip
    for row in rows.values():
        assert all(isinstance(row[field], (int, float)) for field in NUMBERS), row
        assert row["low"] <= row["high"] and row["value"] == row["baseline"] and row["items"] > 0
        assert row["change"] == row["change_low"] == row["change_high"] == 0
    assert [line["stage"] for line in running.metrics(out)] == ["stereoset", "crows_pairs", "winobias", "pairs",
                                                                "prompts", "texts"]  # fmt: skip
    written = [json.loads(line) for line in (out / "continuations.jsonl").read_text().splitlines()]
    assert len(written) == 2 * 2 * len(WORDS) and written[: len(written) // 2] == written[len(written) // 2 :]
    scores = [line["score"] for line in written if line["group"] == "he"]
    assert np.mean(scores) == pytest.approx(rows["Generation he mean score"]["value"])
    page = (out / "report.html").read_text()
    assert pages.check(page).plots
    assert all(row["name"] in page for row in rows.values())


def test_without_a_baseline_there_is_no_change_and_two_models_differ(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    alone = in_process(eval.bias, "alone", "--model", "causal", *FEW).out
    beside = in_process(eval.bias, "beside", "--model", "causal", "--baseline", "other", *FEW).out
    other = in_process(eval.bias, "other", "--model", "other", *FEW).out
    changed = False
    for one, both, two in zip(*(running.results(out)["results"] for out in (alone, beside, other)), strict=True):
        assert not {"baseline", "change"} & one.keys()
        assert (one["value"], one["low"], one["high"]) == (both["value"], both["low"], both["high"])
        assert (two["value"], two["low"]) == (both["baseline"], both["baseline_low"])
        changed |= both["change"] != 0
    assert changed


def test_a_masked_model(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    out = in_process(eval.bias, "out", "--model", "masked", *MASKED).out
    names = {row["name"] for row in running.results(out)["results"]}
    assert {"CrowS-Pairs masked_nangia", "CrowS-Pairs masked_changed", "Pairs b masked_changed"} <= names


def test_a_list_of_words_scores_too(home, in_process, monkeypatch):
    monkeypatch.chdir(home)
    flags = ("--prompts", "prompts.jsonl", "--scorer", "words:words.txt", "--temperature", 0, "--resamples", 5)
    out = in_process(eval.bias, "out", "--model", "causal", "--start-token", "always", *flags).out
    written = [json.loads(line) for line in (out / "continuations.jsonl").read_text().splitlines()]
    assert len(written) == len(WORDS) and {line["score"] for line in written} <= {0.0, 1.0}


HEAD = "has a masked head, which --stereoset cannot measure; a causal head is allowed with every benchmark, a masked "
REFUSED = {
    "no_model": (("--pairs", "pairs.jsonl"), "--model is missing"),
    "nothing": (("--model", "causal"), "nothing to measure; give at least one of --stereoset"),
    "head": (("--model", "masked", "--stereoset", "stereoset.jsonl"), f"masked {HEAD}one with --crows-pairs"),
    "classifier": (("--model", "classification", *MASKED), "has a classification head, which --crows-pairs, --pairs"),
    "two_heads": (("--model", "causal", "--baseline", "masked", *MASKED), "only equal heads compare"),
    "no_scorer": (("--model", "causal", "--prompts", "prompts.jsonl"), "--prompts and --scorer come together"),
    "scorer": (("--model", "causal", "--prompts", "prompts.jsonl", "--scorer", "causal"),
               "--scorer causal has a causal head; a classification one is needed"),
    "label": (("--model", "causal", *CAUSAL, "--scorer-label", "rude"), "--scorer-label is 'rude'; the labels of"),
    "words": (("--model", "causal", "--prompts", "prompts.jsonl", "--scorer", "words:no.txt"), "cannot be read"),
    "prompt": (("--model", "causal", *CAUSAL, "--max-new-tokens", 63), "before --max-new-tokens 63"),
    "resamples": (("--model", "causal", *CAUSAL, "--resamples", 0), "--resamples is 0; it must be at least 1"),
    "top_p": (("--model", "causal", *CAUSAL, "--top-p", 0), "--temperature is 1.0 and --top-p 0.0"),
    "file": (("--model", "causal", "--crows-pairs", "absent.csv"), "absent.csv: no such file"),
    "column": (("--model", "causal", "--crows-pairs", "pairs.jsonl"),
               "pairs.jsonl, line 1: field 'sent_more' is missing"),
    "directory": (("--model", "causal", "--winobias", "pairs.jsonl"), "--winobias pairs.jsonl is not a directory"),
    "group": (("--model", "causal", "--texts", "stereoset.jsonl"), "line 1: field 'group' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(home, name, in_process, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(home)
    flags, message = REFUSED[name]
    with pytest.raises(SystemExit) as stop:
        in_process(eval.bias, "refused", *flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("error: ") and message in said
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_on_the_published_files(shared, in_process):
    data, model = shared / "data", shared / "models" / "stories260k"
    out = in_process(eval.bias, "real", "--model", model, "--stereoset", data / "stereoset/stereoset_dev.jsonl.gz",
                     "--crows-pairs", data / "crows_pairs/crows_pairs_anonymized.csv", "--winobias", data / "winobias",
                     ).out  # fmt: skip
    for name, items in (("StereoSet both kinds SS", 4229), ("CrowS-Pairs sum", 1508), ("WinoBias type 1 sum", 792)):
        row = running.row(out, name)
        assert row["items"] == items and row["left_out"] == 0 and 30 < row["value"] < 60
