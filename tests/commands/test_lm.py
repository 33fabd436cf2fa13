"""train.lm beyond the next token: classes, masked tokens, source to target, adapters, parts of a model."""

import json

import jax
import numpy as np
import pytest
import running

import train.lm
from jaxforget.models import hub
from jaxforget.models.adapters import load_adapter
from jaxforget.models.layers import merge

TINY = ("--size.width", 32, "--size.heads", 2, "--size.layers", 1, "--size.context", 32, "--size.vocab-size", 300)
ANIMALS = ("cat", "dog", "owl", "fox", "hen", "bee", "cow", "eel")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Sentences whose class is the adjective in them, and as question and answer; train and test share no sentence."""
    home = tmp_path_factory.mktemp("sentences")
    rows = [
        {"text": f"the {a} saw {n} {kind} things", "mood": kind, "question": f"{kind} {a}", "answer": f"{a} {kind}"}
        for a in ANIMALS for n in range(20) for kind in ("good", "bad", "odd")
    ]  # fmt: skip
    for name, part in (("train", [r for i, r in enumerate(rows) if i % 5]), ("test", rows[::5])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {name: home / f"{name}.jsonl" for name in ("train", "test")}


def flags(sentences, *more):
    return (*TINY, "--data", sentences["train"], "--evaluate", sentences["test"], *more)


def classes(sentences, *more):
    return flags(sentences, "--task", "classification", "--text-field", "text", "--label-field", "mood", *more)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_classifier_learns_and_reloads(family, sentences, in_process):
    more = ("--size.family", family, "--epochs", 6, "--learning-rate", 3e-3)
    out = in_process(train.lm, "first", *classes(sentences, *more)).out
    after = running.row(out, "after:test.jsonl")
    assert after["accuracy"] > 95 and after["macro_f1"] > 95  # 33 by chance
    model, _ = hub.load(out / "model")
    assert model.config.model_type == family and model.config.labels == ("bad", "good", "odd")
    again = in_process(train.lm, "again", *classes(sentences, "--epochs", 1, "--model", out / "model"))
    assert running.row(again.out, "before:test.jsonl")["nll"] == pytest.approx(after["nll"], abs=1e-6)
    assert "is new" not in again.said


@pytest.mark.slow
def test_a_head_for_other_classes_is_drawn_and_said(sentences, in_process):
    first = in_process(train.lm, "first", *flags(sentences, "--task", "masked", "--text-field", "text", "--epochs", 1))
    other = in_process(train.lm, "other", *classes(sentences, "--epochs", 1, "--model", first.out / "model"))
    assert "classification head is new; drawn at random: pool/kernel" in other.said
    model, params = hub.load(other.out / "model")
    assert params["score"]["kernel"].shape == (32, 3)


@pytest.mark.parametrize(("task", "family"), [("masked", "roberta"), ("seq2seq", "t5")])
def test_other_tasks_learn_and_reload(task, family, sentences, in_process):
    asked = ("--question-field", "question", "--answer-field", "answer")
    fields = ("--task", task, *(asked if task == "seq2seq" else ("--text-field", "text")))
    more = ("--size.family", family, "--epochs", 4, "--learning-rate", 3e-3)
    out = in_process(train.lm, "first", *flags(sentences, *fields, *more)).out
    before, after = (running.row(out, f"{when}:test.jsonl")["nll"] for when in ("before", "after"))
    assert after < 0.6 * before
    again = in_process(train.lm, "again", *flags(sentences, *fields, "--epochs", 1, "--model", out / "model"))
    assert running.row(again.out, "before:test.jsonl")["nll"] == pytest.approx(after, abs=1e-6)


def test_an_adapter_is_saved_beside_the_merged_model(sentences, in_process):
    text = ("--text-field", "text", "--epochs", 3)
    base = in_process(train.lm, "base", *flags(sentences, *text)).out / "model"
    adapter = ("--model", base, "--lora.rank", 4, "--lora.targets", "(attn|mlp)/.*")
    other = ("--text-field", "question", "--epochs", 3, "--learning-rate", 1e-2)
    out = in_process(train.lm, "adapted", *flags(sentences, *other, *adapter)).out
    # Training the same kernels in full reaches 4.23 from 4.89 too: what is left needs the embedding.
    assert running.row(out, "after:test.jsonl")["nll"] < 0.9 * running.row(out, "before:test.jsonl")["nll"]
    model, params = hub.load(base)
    joined = merge(load_adapter(out / "adapter", model, params))
    jax.tree.map(np.testing.assert_array_equal, joined, hub.load(out / "model")[1])
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_a_named_part_moves_and_the_rest_does_not(sentences, in_process):
    base = in_process(train.lm, "base", *flags(sentences, "--text-field", "text", "--epochs", 1)).out / "model"
    more = ("--text-field", "text", "--epochs", 1, "--model", base, "--trainable", "blocks/mlp/.*", "final_norm/scale")
    out = in_process(train.lm, "part", *flags(sentences, *more)).out
    before, after = hub.load(base)[1], hub.load(out / "model")[1]
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(a, b)
    }
    assert moved == {"blocks/mlp/gate/kernel", "blocks/mlp/up/kernel", "blocks/mlp/down/kernel", "final_norm/scale"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "classification"), "--task classification needs --data"),
        (("--task", "classification", "--data", "TRAIN", "--text-field", "text"), "field 'label' is missing; present"),
        (
            ("--task", "masked", "--data", "TRAIN", "--size.family", "gpt2"),
            "gpt2 has no masked head; it has causal",
        ),
        (("--task", "seq2seq", "--data", "TRAIN", "--text-field", "text"), "is plain text"),
        (("--lora.rank", 4), "--lora.rank needs --model"),
        (("--trainable", "nothing/.*"), "'nothing/.*' matches no parameter"),
        (("--task", "masked", "--data", "TRAIN", "--text-field", "text", "--text-mode", "pack"), "is for --task"),
    ],
)
def test_wrong_settings_get_one_sentence(more, message, sentences, tmp_path, in_process, capsys):
    more = [sentences["train"] if one == "TRAIN" else one for one in more]
    with pytest.raises(SystemExit) as error:
        in_process(train.lm, "out", *TINY, *more)
    said = capsys.readouterr().err
    assert error.value.code == 2 and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
