"""eval.unlearning: what the benchmark leaves, that metrics agree with each other, resume, and what is refused."""

import json

import jax
import numpy as np
import pages
import pytest
import running
from shards import call, done

import eval.unlearning
from jaxforget.metrics import benchmark
from jaxforget.models import hub

MODELS = ("original", "retrained", "one", "two")
NAMES = "Ada Ben Cleo Dan Eve Finn".split()
TOWNS = "Rome Oslo Lima Bonn".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Four models of one shape, and small sets in the schemas of TOFU and MUSE."""
    home = tmp_path_factory.mktemp("benchmark")
    running.save_model(home / "original", context=128)
    model, params = hub.load(home / "original")
    for seed, name in enumerate(MODELS[1:]):
        rng = np.random.default_rng(seed)
        moved = jax.tree.map(lambda x, rng=rng: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
        hub.save(home / name, model, moved, tokenizer_dir=home / "original")
    running.save_model(home / "encoder", family="bert", head="masked")

    def write(name, rows):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(names, offset=0):
        return [
            {"question": f"Where does {name} live?", "answer": f"{name} lives in {TOWNS[(n + offset) % 4]}.",
             "paraphrased_question": f"What is the town of {name}?",
             "paraphrased_answer": f"{TOWNS[(n + offset) % 4]} is where {name} lives.",
             "perturbed_answer": [f"{TOWNS[(n + offset + k) % 4]} is where {name} lives." for k in (1, 2, 3)]}
            for n, name in enumerate(names)
        ]  # fmt: skip

    write("forget", asked(NAMES[:3] * 2, 1))
    write("retain", asked(NAMES[3:]))
    write("approximate", asked(["Gus", "Hal", "Ida", "Jo"]))
    write("choices", [{"question": f"Capital {n}?", "answer": town, "perturbed_answer": [x for x in TOWNS if x != town]}
                      for n, town in enumerate(TOWNS)])  # fmt: skip
    write("verbatim", [{"prompt": f"{name} came to", "gt": f"the town of {name} and stayed."} for name in NAMES])
    write("shots", [{"question": "Where does Kim live?", "answer": "Kim lives in Rome."}])
    write("plain", [{"text": f"{name} lives in town."} for name in NAMES])
    write("bare", [{"question": "Who?", "answer": "Ada."}])
    write("half", [{"question": "Who?", "answer": "Ada.", "perturbed_answer": ["Ben."]}])
    write("texts", [{"question": "Who?", "answer": "Ada.", "paraphrased_answer": "Eve", "perturbed_answer": "Ben."}])
    (home / "prefixes.txt").write_text("Please.\nNow.\n")
    return home


SETS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl", "--approximate", "approximate.jsonl",
        "--real-authors", "choices.jsonl", "--world-facts", "choices.jsonl", "--verbatim", "verbatim.jsonl",
        "--few-shot", "shots.jsonl", "--max-new-tokens", 6, "--batch-size", 8)  # fmt: skip
EVERYTHING = ("--models", "one", "two", "--retrained", "retrained", "--original", "original", "--reference", "one",
              "--metrics", "language", "overall", "muse", "--gradnorm", "--prompts", "plain", "paraphrased",
              "prefixed", "--prefixes", "prefixes.txt", *SETS)  # fmt: skip


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done(eval.unlearning, *EVERYTHING, "--out", out)
    return out


def items(out, model, metric):
    return json.loads((out / "items" / model / f"{metric}.json").read_text())


def test_rows(whole):
    rows = {row["name"]: row for row in running.results(whole)["results"]}
    assert list(rows) == ["retrained", "original", "one", "two"]
    fields = {field for metric in benchmark.METRICS.values() for field in metric.columns} | set(benchmark.OVERALL)
    absent = {"general_nll", "utility_change", "fluency", "steps", "seconds", "train_tokens", "tokens_per_second",
              "flops_vs_retraining", "overall", "utility_rel"}  # fmt: skip
    for row in rows.values():
        assert {field for field in fields if row.get(field) is None} == absent, row["name"]
    retrained = rows["retrained"]
    assert (retrained["forget_quality"], retrained["forget_quality_d"], retrained["forget_quality_n"]) == (1, 0, 6)
    assert retrained["privleak"] == retrained["gap_to_retrained"] == 0 and retrained["privacy"] == pytest.approx(1)
    assert "the utility of the original model is" in rows["one"]["note"]  # untrained models answer nothing right
    assert rows["one"]["auc_reference"] == 0.5  # its loss minus its own
    assert rows["two"]["forget_quality_d"] > 0


def test_metrics_agree_with_each_other(whole):
    """The same tokens are behind them."""
    for row in running.results(whole)["results"]:
        assert row["auc_loss"] == pytest.approx(row["loss_auc"])
        assert row["auc_min_k"] == pytest.approx(row["mink40_auc"])
        assert 100 * row["em"] == pytest.approx(row["forget_accuracy"]) and row["es"] <= row["em"]
        tofu, attack = (items(whole, row["name"], metric) for metric in ("tofu", "membership"))
        np.testing.assert_allclose(np.exp(-np.array(attack["loss_forget"])), tofu["forget_probability"], rtol=1e-6)
        assert np.log(row["forget_perplexity"]) == pytest.approx(np.mean(attack["loss_forget"]), rel=1e-6)
        assert row["tofu_forget_probability"] == pytest.approx(np.mean(tofu["forget_probability"]))
        assert (np.array(tofu["forget_log_t1"]) >= np.array(tofu["forget_log_t2"]) - 1e-9).all()
        assert row["truth"] == pytest.approx(np.mean(1 / (1 + np.exp(tofu["forget_log_t2"]))))


def test_equal_questions_have_equal_answers_whatever_is_beside_them(whole):
    for model in MODELS:
        written = items(whole, model, "tofu")["forget_written"]
        assert written[:3] == written[3:] and len(written) == 6 and any(written)


def test_page(whole):
    page = (whole / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("Overall", "Language", "Tofu", "Knowledge", "Notes"))
    assert len(pages.check(page).plots) >= 8


def test_an_interrupted_run_is_finished_with_the_same_numbers(whole, home, tmp_path, monkeypatch):
    """What was measured stays: a saved number that is changed is believed, a file that is gone is made again."""
    monkeypatch.chdir(home)
    measure, measured = benchmark.measure, []

    def stops(metrics, *rest):
        measured.append(sorted(metrics))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(metrics, *rest)

    monkeypatch.setattr(benchmark, "measure", stops)
    flags = (*EVERYTHING, "--out", tmp_path / "out")
    outcome = call(eval.unlearning, *flags)
    assert outcome.code == 130 and "--resume" in outcome.said and not (tmp_path / "out/results.json").exists()
    saved = running.files(tmp_path / "out" / "items")
    (tmp_path / "out/items/retrained/tofu.json").unlink()
    done(eval.unlearning, *flags, "--resume")
    assert measured[3:] == [["tofu"], measured[1], measured[1], measured[1]]
    assert running.files(tmp_path / "out" / "items").items() >= saved.items()

    def numbers(out):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in running.results(out)["results"]]

    assert numbers(tmp_path / "out") == numbers(whole)
    changed = tmp_path / "out/items/two/verbatim.json"
    changed.write_text(json.dumps({"verbmem": [1.0], "written": ["x"]}))
    done(eval.unlearning, *flags, "--resume")
    assert running.row(tmp_path / "out", "two")["verbmem"] == 100 and len(measured) == 7


def test_one_metric_needs_only_its_set_and_weights_are_quantised(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    scores = {}
    for bits in ((), ("--quantize", 8), ("--quantize", 4)):
        out = tmp_path / f"out{bits[-1:]}"
        flags = ("--models", "one", "--metrics", "memorisation", "--forget", "forget.jsonl", "--batch-size", 8)
        done(eval.unlearning, *flags, *bits, "--out", out)
        scores[bits[-1:]] = np.array(items(out, "one", "memorisation")["paraprob"])
        (row,) = running.results(out)["results"]
        assert "forget_nll" not in row and row["memorisation"] > 0
    error = [np.abs(np.log(scores[bits] / scores[()])).mean() for bits in ((8,), (4,))]
    assert 0 < error[0] < error[1] < 1


def test_a_model_that_diverged_is_a_row_with_notes(home, tmp_path, monkeypatch):
    """Its losses are NaN, so nothing can be said of it; the others are judged all the same."""
    monkeypatch.chdir(home)
    model, params = hub.load("one")
    hub.save(tmp_path / "gone", model, jax.tree.map(lambda x: x * np.float32(np.nan), params), tokenizer_dir="one")
    (tmp_path / "words.txt").write_text("e\na\n")
    flags = ("--metrics", "language", "tofu", "memorisation", "membership", "fluency", *SETS[:6], "--retrained", "two",
             "--fluency", f"words:{tmp_path / 'words.txt'}", "--max-new-tokens", 6, "--batch-size", 8)  # fmt: skip
    done(eval.unlearning, "--models", tmp_path / "gone", "one", *flags, "--out", tmp_path / "out")
    _, gone, one = running.results(tmp_path / "out")["results"]
    assert gone["forget_nll"] is gone["tofu_forget_probability"] is gone["paraprob"] is gone["auc_loss"] is None
    assert gone["forget_quality"] is gone["privleak"] is None
    assert "forget quality needs truth ratios" in gone["note"] and "PrivLeak needs" in gone["note"]
    assert one["forget_quality_d"] > 0 and one["privleak"] is not None and 0 <= one["fluency"] <= 1


def test_a_series(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    flags = ("--metrics", "knowledge", *SETS[:4], "--batch-size", 8, "--original", "original")
    out = tmp_path / "out"
    done(eval.unlearning, "--models", "one", "two", *flags, "--series", "scalability", "--forget-records", 3, 6,
         "--out", out)  # fmt: skip
    start, *rows = running.results(out)["results"]
    assert [(row["step"], row["forget_records"]) for row in rows] == [(1, 3), (2, 6)]
    for row in rows:
        if start["knowmem_retain"]:
            assert row["utility_change"] == pytest.approx(100 * (row["knowmem_retain"] / start["knowmem_retain"] - 1))


ONE = ("--models", "one", "--forget", "forget.jsonl")
REFUSED = {
    "metric": ((*ONE, "--metrics", "toffee"), "unknown metric 'toffee'; valid metrics are language, tofu"),
    "no_forget": (("--models", "one", "--metrics", "tofu"), "--forget is missing"),
    "no_holdout": ((*ONE, "--metrics", "membership"), "metric membership needs --approximate"),
    "no_verbatim": ((*ONE, "--metrics", "verbatim"), "metric verbatim needs --verbatim"),
    "no_yardstick": ((*ONE, *SETS, "--metrics", "muse"), "metric muse needs --retrained"),
    "no_original": ((*ONE, *SETS[2:], "--retrained", "two", "--metrics", "overall"),
                    "metric overall needs --retrained and --original"),
    "twice": (("--models", "one", "one", "--forget", "forget.jsonl"), "--models names a model twice"),
    "plain": (("--models", "one", "--forget", "plain.jsonl", "--metrics", "tofu"),
              "--forget is plain text; metric tofu needs questions"),
    "no_questions": (("--models", "one", "--forget", "plain.jsonl", "--metrics", "knowledge"),
                     "metric knowledge needs --forget-questions"),
    "choices": ((*ONE, "--real-authors", "bare.jsonl", "--metrics", "tofu"),
                "--real-authors has no field 'perturbed_answer'"),
    "paraphrase": (("--models", "one", "--forget", "half.jsonl", "--metrics", "tofu"), "but no 'paraphrased_answer'"),
    "not_a_list": (("--models", "one", "--forget", "texts.jsonl", "--metrics", "memorisation"),
                   "field 'perturbed_answer' must be a list of strings"),
    "gt": ((*ONE, "--metrics", "verbatim", "--verbatim", "forget.jsonl"), "forget.jsonl, line 1: field 'prompt'"),
    "wording": ((*ONE, "--metrics", "knowledge", "--prompts", "loud"), "--prompts loud is unknown; valid are plain"),
    "paraphrased": (("--models", "one", "--forget", "bare.jsonl", "--metrics", "knowledge", "--prompts", "paraphrased"),
                    "needs the field 'paraphrased_question'"),
    "prefixes": ((*ONE, "--metrics", "knowledge", "--prompts", "prefixed", "--prefixes", "no.txt"), "cannot be read"),
    "reference": ((*ONE, "--reference", "two"), "--reference is for metric membership"),
    "gradnorm": ((*ONE, "--gradnorm"), "--gradnorm is for metric membership"),
    "fluency": ((*ONE, "--metrics", "fluency"), "metric fluency needs --fluency"),
    "no_words": ((*ONE, "--metrics", "fluency", "--fluency", "words:no.txt"), "--fluency words:no.txt: the file "),
    "sizes": ((*ONE, "--series", "scalability", "--forget-records", 1, 2), "a series of 1 models has 2 numbers"),
    "no_series": ((*ONE, "--forget-records", 1), "--forget-records goes with --series"),
    "batch": ((*ONE, "--batch-size", 0), "--batch-size is 0; it must be at least 1"),
    "template": ((*ONE, "--knowledge-template", "Q:"), "it must contain {question}"),
    "encoder": (("--models", "one", "encoder", "--forget", "forget.jsonl"), "a masked head; a causal one is needed"),
    "same": ((*ONE, "--retrained", "two", "--original", "two"), "--retrained and --original are the same model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(home, name, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    flags, message = REFUSED[name]
    outcome = call(eval.unlearning, *flags, "--out", tmp_path / "out")
    said = outcome.said.strip().splitlines()
    assert outcome.code == 2 and said[-1].startswith("error: ") and message in said[-1], outcome.said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_on_the_published_sets(shared, tmp_path):
    """A model of children's stories knows nothing of TOFU: its numbers are those of chance."""
    data, model = shared / "data" / "tofu", shared / "models" / "stories260k"
    done(eval.unlearning, "--models", model, "--metrics", "tofu", "memorisation", "--forget",
         data / "forget10_perturbed.json", "--retain", data / "retain_perturbed.json", "--real-authors",
         data / "real_authors_perturbed.json", "--world-facts", data / "world_facts_perturbed.json", "--limit", 40,
         "--max-new-tokens", 32, "--out", tmp_path / "out")  # fmt: skip
    (row,) = running.results(tmp_path / "out")["results"]
    assert 0.15 < row["tofu_real_authors_probability"] < 0.35  # of four choices
    assert row["tofu_forget_probability"] < 0.05 and row["es"] < 0.05 and 0.4 < row["truth"] < 0.7
