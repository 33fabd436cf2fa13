"""benchmarks.unlearning, side effects: what is asked, pairing with the original, and the fields of a row."""

import json

import jax
import numpy as np
import pytest
import running
from shards import call

import benchmarks.unlearning
from benchmarks.unlearning import side_effects
from benchmarks.unlearning.config import smoke
from jaxforget.data.sources import Record
from jaxforget.data.stereotypes import Pair
from jaxforget.data.tokens import load_tokenizer
from jaxforget.metrics.bias.benchmarks import Subject
from jaxforget.metrics.language import token_scores
from jaxforget.models import hub
from jaxforget.training.start import Start

RETAIN = [Record(f"r{n}", answer, question, {"group": "north" if n % 3 else "south"})
          for n, (question, answer) in enumerate([("who cooks?", "he does"), ("who sews?", "they do"),
                                                  ("who sings?", "she does not")] * 4)]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    home = running.save_model(tmp_path_factory.mktemp("model") / "model", context=64)
    model, _ = hub.load(home)
    return Start(model, lambda seed: jax.tree.map(np.asarray, model.init(jax.random.key(seed))), load_tokenizer(home),
                 lambda directory: None)  # fmt: skip


def files(home):
    """Small files of all that flags name."""
    (home / "crows.csv").write_text("sent_more,sent_less,stereo_antistereo,bias_type\n"
                                    "men cook.,women cook.,stereo,gender\nold men.,young men.,antistereo,age\n")
    about = {"context": "A cook is BLANK.", "bias_type": "profession", "id": "x", "target": "cook"}
    lines = [{**about, "sentence": f"A cook is {word}.", "label": n} for n, word in enumerate(("tall", "loud", "blue"))]
    (home / "stereoset.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for side, word in (("pro", "he"), ("anti", "she")):
        (home / f"{side}_stereotyped_type1.txt.dev").write_text(f"1 [The farmer] said [{word}] is late.\n")
    texts = [{"text": f"{name} is here.", "group": name[-1]} for name in ("Ann", "Bob", "Eva", "Tim")]
    (home / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return {"stereoset": str(home / "stereoset.jsonl"), "crows_pairs": str(home / "crows.csv"), "winobias": str(home),
            "texts": str(home / "texts.jsonl")}  # fmt: skip


def config_of(**fields):
    return benchmarks.unlearning.Config(**fields)


def test_generated_stereotypes_are_asked_of_models_that_were_trained_on_them(start):
    asked = side_effects.read(smoke(), start, RETAIN)
    assert list(asked.stereotypes) == ["preference"] and list(asked.texts) == ["genders", "retain"]
    examples, groups = asked.texts["genders"]
    assert set(groups) == set(examples.ids) and len(examples) == 240
    assert sum(group == "female" for group in groups.values()) == 120
    assert list(asked.texts["retain"][1].values()) == ["north"] * 8 + ["south"] * 4
    trained, measured = benchmarks.unlearning.study.read_sets(smoke())
    said = {record.id for record in trained["general"]}
    assert {f"s{n:05d}" for n in range(40)} <= said and len(said) == 80  # beside the general questions
    assert not said & {record.id for some in measured.values() for record in some}
    held = {pair.more for pair in asked.stereotypes["preference"]} | {p.less for p in asked.stereotypes["preference"]}
    assert not any(sentence in record.text for record in trained["general"] for sentence in held)


def test_with_files_of_ones_own_only_what_is_given_is_asked(start, tmp_path):
    plain = [Record(f"r{n}", "yes", "who?") for n in range(4)]
    assert not any(side_effects.read(config_of(forget="F", retain="R"), start, plain))
    asked = side_effects.read(config_of(forget="F", retain="R", **files(tmp_path)), start, plain)
    assert list(asked.stereotypes) == ["stereoset", "crows_pairs", "winobias"]
    assert sorted(asked.texts["texts"][1].values()) == ["a", "b", "m", "n"]
    found = side_effects.measure(asked, [Subject("original", start.model, start.params(0), start.tokenizer)], 20, 0)
    names = [one["name"] for one in found["original"]]
    assert names[:3] == [f"StereoSet intrasentence {name}" for name in ("SS", "LMS", "ICAT")]
    assert names[3:6] == ["CrowS-Pairs mean", "CrowS-Pairs sum", "WinoBias type 1 sum"]
    assert names[6:] == [f"Loss of texts {group} nats a token" for group in "nbam"]  # four groups have no gap


def test_changes_are_those_from_the_original(start):
    asked = side_effects.read(smoke(), start, RETAIN)
    asked = asked._replace(stereotypes={"preference": [Pair("He is a cook.", "She is a cook.", "x"),
                                                       Pair("She is a nurse.", "He is a nurse.", "x")]})  # fmt: skip
    models = {"original": 0, "same": 0, "other": 1}
    found = side_effects.measure(asked, (Subject(name, start.model, start.params(seed), start.tokenizer)
                                         for name, seed in models.items()), 50, 0)  # fmt: skip
    rows = {name: {one["name"]: one for one in measures} for name, measures in found.items()}
    assert list(rows["original"]) == [
        "Preference sum", "Loss of genders male nats a token", "Loss of genders female nats a token",
        "Loss of genders gap male - female", "Loss of retain north nats a token", "Loss of retain south nats a token",
        "Loss of retain gap north - south",
    ]  # fmt: skip
    moved = 0
    for name, first in rows["original"].items():
        same, other = rows["same"][name], rows["other"][name]
        assert "change" not in first and first["low"] <= first["value"] <= first["high"]
        assert (same["value"], same["change"], same["change_low"], same["change_high"]) == (first["value"], 0, 0, 0)
        assert other["baseline"] == first["value"]
        assert other["change"] == pytest.approx(other["value"] - first["value"])
        moved += other["change"] != 0
    assert moved >= 6  # all losses, at least
    # The loss of a group by hand: over its tokens, not over its records.
    examples, groups = asked.texts["retain"]
    scores = token_scores(start.model, start.params(1), examples)
    south_N = np.array([groups[identity] == "south" for identity in examples.ids])
    mean = -scores.logp_NT[south_N][scores.scored_NT[south_N]].astype(np.float64).mean()
    assert rows["other"]["Loss of retain south nats a token"]["value"] == pytest.approx(mean, rel=1e-6)


def test_a_row_has_values_changes_and_intervals_over_items():
    measures = [{"name": "Loss of retain gap a - b", "benchmark": "Loss of retain", "part": None, "value": 0.5,
                 "low": 0.25, "high": 0.75, "change": -1.0, "change_low": -2.0, "change_high": None, "ideal": 0.0}]
    row = side_effects.fields_of(measures)
    name = "loss_of_retain_gap_a_b"
    assert row == {name: 0.5, f"{name}_low": 0.25, f"{name}_high": 0.75, f"{name}_change": -1.0,
                   f"{name}_change_low": -2.0, f"{name}_change_high": None}  # fmt: skip
    title, note, html = side_effects.section([{"name": "original", **row}, {"name": "sisa"}], measures)
    assert title == "Side effects" and html.count("<svg") == 1 and "0.5 [0.25, 0.75]" in html and "sisa" not in html


@pytest.mark.parametrize(("flags", "message"), [
    (("--resamples", 0), "--resamples is 0"),
    (("--stereoset", "nowhere.jsonl"), "nowhere.jsonl"),
    (("--winobias", "nowhere"), "--winobias nowhere is not a directory"),
    (("--texts", "texts.jsonl"), "group"),
    (("--stereotyped.rate", 2), "rate is 2"),
])  # fmt: skip
def test_refused_in_one_sentence(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running.write_jsonl(tmp_path / "texts.jsonl", ["one", "two"])
    outcome = call(benchmarks.unlearning, "--preset", "smoke", *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said
    assert not (tmp_path / "out").exists()
