"""benchmarks.unlearning_speed: its rows without PyTorch, that both sides compute the same, and what it refuses."""

import importlib.util

import numpy as np
import pages
import pytest
import running
from shards import call

import benchmarks.unlearning_speed as speed
from jaxforget.errors import RunError

FLAGS = ("--preset", "smoke", "--layers", 1)


def test_without_pytorch_its_columns_are_empty(in_process, monkeypatch):
    if importlib.util.find_spec("torch"):
        monkeypatch.setattr(speed, "torch_turn", lambda *args: None)
    out = in_process(speed, "out", *FLAGS, "--methods", "gradient_ascent", "random_labels", "npo").out
    rows = {row["name"]: row for row in running.results(out)["results"]}
    assert [row["reference"] for row in rows.values()] == ["never", "never", "before"]
    for name, row in rows.items():
        assert all(row[field] is None for field in ("torch_seconds_per_step", "speedup", "loss_difference"))
        assert "no PyTorch" in row["note"] and row["compile_seconds"] > 0
        tokens = (4 + 4 * (name == "npo")) * 16  # rows to forget, and those to retain
        assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(tokens)
    page = (out / "report.html").read_text()
    assert "no PyTorch" in page and pages.check(page).tables


@pytest.mark.parity
@pytest.mark.slow
def test_both_sides_compute_the_same_loss_and_the_same_updates(in_process):
    """The rate is high: what a retain term adds, 0 at the start, shows after the first updates."""
    pytest.importorskip("torch")
    out = in_process(speed, "out", *FLAGS, "--layers", 2, "--train.learning-rate", 3e-3).out
    rows = {row["name"]: row for row in running.results(out)["results"]}
    assert tuple(rows) == speed.MEASURED
    for row in rows.values():
        assert row["loss_difference"] < 1e-4 and row["last_loss_difference"] < 1e-3 and row["note"] is None
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"]


@pytest.mark.parity
def test_another_computation_is_no_peer(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    losses = speed.torch_losses
    monkeypatch.setattr(speed, "torch_losses", lambda *args: losses(*args) | {"wga": losses(*args)["satimp"]})
    monkeypatch.setattr(type(speed.METHODS["wga"]), "beta1", 5.0, raising=False)
    monkeypatch.setattr(type(speed.METHODS["wga"]), "beta2", 1.0, raising=False)
    outcome = call(speed, *FLAGS, "--methods", "wga", "--out", tmp_path / "out")
    assert outcome.code == 1 and "wga: the first loss of a turn is" in outcome.said
    assert not (tmp_path / "out/results.json").exists()


def test_losses_must_agree_before_and_after_updates():
    near = {"loss_difference": pytest.approx(5e-5), "last_loss_difference": pytest.approx(9e-4, rel=0.1)}
    assert speed.agreement("npo", np.array([1.0, 2.0]), np.array([1.00005, 2.0009])) == near
    assert speed.agreement("npo", np.array([1000.0]), np.array([1000.05]))["loss_difference"] > 1e-4  # of large ones
    for ours, torch, when in (([1.0, 2.0], [1.001, 2.0], "first"), ([1.0, 2.0], [1.0, 2.1], "last"),
                              ([np.nan, 1.0], [1.0, 1.0], "first")):  # fmt: skip
        with pytest.raises(RunError, match=f"npo: the {when} loss"):
            speed.agreement("npo", np.array(ours), np.array(torch))


def test_texts_have_prompts_of_different_lengths():
    examples = speed.texts(speed.smoke(), 256, "forget")
    scored_NT = examples.columns["labels"] != -100
    assert len(examples) == 4 * 3 and len(set(scored_NT.sum(axis=1))) > 3 and not scored_NT[:, -1].any()
    assert (examples.columns["labels"][:, :-1] == examples.columns["tokens"][:, 1:])[scored_NT[:, :-1]].all()
    assert (np.diff(scored_NT[:, :-1].astype(int), axis=1) >= 0).all()  # once begun, to the end


@pytest.mark.parametrize(("flags", "message"), [
    (("--methods", "pdu"), "--methods pdu is not measured here"),
    (("--steps", 0), "--steps is 0"),
    (("--width", 33), "--width 33 does not divide"),
    (("--train.weight-decay", 0.1), "--train.weight-decay is 0.1"),
    (("--train.microbatch", 3), "--microbatch 3 does not divide"),
    (("--model", "GPT2"), "--model GPT2 is gpt2"),
    (("--model", "LLAMA", "--length", 64), "--length is 64; the model was made for 32"),
])  # fmt: skip
def test_refused_in_one_sentence(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--model" in flags:
        running.save_model(tmp_path / flags[1], family=flags[1].lower())
    outcome = call(speed, *FLAGS, *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.said and "Traceback" not in outcome.said
    assert not (tmp_path / "out").exists()
