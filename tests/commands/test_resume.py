"""A killed run, resumed, leaves what an undisturbed run leaves: the same numbers, models and log, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import pytest
import running

import train.unlearn
from jaxforget import command
from jaxforget.models import hub

TIMES = ("seconds", "compile_seconds", "tokens_per_second")  # the only fields that may differ
METHODS = ("gradient_ascent", "ascent_kl_indist")
FLAGS = (
    "--preset", "smoke", "--methods", *METHODS, "--checkpoint-every", 4, "--evaluate-every", 2,
    "--train.epochs", 2, "--epochs", 3, "--stop-at", "never", "--corpus.general-records", 20,
)  # fmt: skip
LM_FLAGS = ("--preset", "smoke", "--checkpoint-every", 3, "--corpus.general-records", 20)


def untimed(value):
    """Drop the wall-clock fields, their intervals, and where the run was written."""
    if isinstance(value, dict):
        skip = {*TIMES, *(f"{name}_ci95" for name in TIMES), "out", "resume"}
        return {name: untimed(item) for name, item in value.items() if name not in skip}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def by_stage(out):
    """Return (seed, stage) -> its lines in order."""
    stages = {}
    for line in running.metrics(out):
        stages.setdefault((line.get("seed"), line["stage"]), []).append(untimed(line))
    return stages


def models(out):
    """Return path -> content of every file of every saved model."""
    found = {path: content for path, content in running.files(out).items() if content is not None}
    kept = {path: content for path, content in found.items() if path.startswith("model/") or "/models/" in path}
    return {
        path: untimed(json.loads(content)) if path.endswith("training.json") else content
        for path, content in kept.items()
    }


def assert_same(out, undisturbed, context=""):
    assert untimed(running.results(out)) == untimed(running.results(undisturbed)), context
    ours, theirs = models(out), models(undisturbed)
    # A model half written when its process was killed stays behind under a name with a dot.
    ours = {path: content for path, content in ours.items() if "/." not in path}
    assert ours.keys() == theirs.keys() and any(path.endswith(".safetensors") for path in ours), context
    for path, content in ours.items():
        assert content == theirs[path], f"{path} {context}"
    assert by_stage(out) == by_stage(undisturbed), context
    assert (out / "report.html").exists()


def run_until(reached, module, *flags):
    """Run until `reached()` and kill the process and its helpers. Returns whether it was killed before it was done."""
    process = running.start(module, *flags)
    try:
        while process.poll() is None and not reached():
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), stderr
    return process.returncode != 0


def stage_has(out, stage, step):
    return lambda: any(line["stage"] == stage and line["step"] >= step for line in running.metrics(out))


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run, with its directory and how long it took once its programs were compiled."""
    home = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    running.run("train.unlearn", *FLAGS, "--out", home / "out")
    return SimpleNamespace(out=home / "out", seconds=time.monotonic() - began)


@pytest.fixture
def in_process(monkeypatch):
    """Run train.unlearn in this process; returns its exit code."""
    # Set, it keeps the command from moving the compile cache of this process.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def run(*flags):
        try:
            command.main(train.unlearn.run, train.unlearn.PRESETS, [str(flag) for flag in flags])
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def test_killed_in_every_stage(tmp_path, undisturbed):
    """One run, killed while the target is trained, the yardstick, a method, and at a random moment before those."""
    out = tmp_path / "out"
    flags = (*FLAGS, "--out", out, "--resume")  # of a directory that is not there yet: starts afresh
    moment = random.uniform(0.2, 0.8) * undisturbed.seconds
    run_until(after(moment), "train.unlearn", *flags)
    killed = []
    for stage, step in [("original", 5), ("retrained", 1), (METHODS[0], 3)]:
        if stage_has(out, stage, step)():  # the random moment came later
            continue
        assert run_until(stage_has(out, stage, step), "train.unlearn", *flags)
        assert not (out / "results.json").exists()
        killed.append(stage)
        with open(out / "metrics.jsonl", "a") as log:  # what a kill in the middle of a write leaves
            log.write('{"stage": "orig')
    running.run("train.unlearn", *flags)
    assert_same(out, undisturbed.out, f"killed after {moment:.2f} s, then in {killed}")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("stage", ["original", "retrained", *METHODS])
def test_killed_once(stage, step, tmp_path, undisturbed):
    flags = (*FLAGS, "--out", tmp_path / "out")
    assert run_until(stage_has(tmp_path / "out", stage, step), "train.unlearn", *flags)
    running.run("train.unlearn", *flags, "--resume")
    assert_same(tmp_path / "out", undisturbed.out)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(8))
def test_killed_at_random(attempt, tmp_path, undisturbed):
    moment = random.uniform(0.1, 1.0) * undisturbed.seconds
    flags = (*FLAGS, "--out", tmp_path / "out", "--resume")
    run_until(after(moment), "train.unlearn", *flags)
    running.run("train.unlearn", *flags)
    assert_same(tmp_path / "out", undisturbed.out, f"killed after {moment:.3f} s")


@pytest.mark.slow
def test_killed_in_the_second_seed(tmp_path):
    flags = (*FLAGS, "--seeds", 2)
    running.run("train.unlearn", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "out"

    def second_seed():
        return any(line["seed"] == 1 and line["stage"] == METHODS[0] for line in running.metrics(out))

    assert run_until(second_seed, "train.unlearn", *flags, "--out", out)
    running.run("train.unlearn", *flags, "--out", out, "--resume")
    assert_same(out, tmp_path / "whole")


@pytest.mark.slow
def test_stopped_between_the_last_checkpoint_and_the_saved_model(tmp_path, undisturbed, in_process, monkeypatch):
    """All steps are done, but the model is not there: too short a moment to hit with a kill from outside."""
    save, pending = hub.save, ["original", *METHODS]

    def interrupted_once(directory, *args, **settings):
        if directory.name in pending:
            pending.remove(directory.name)
            raise KeyboardInterrupt
        return save(directory, *args, **settings)

    flags = (*FLAGS, "--out", tmp_path / "out", "--resume")
    monkeypatch.setattr(hub, "save", interrupted_once)
    while pending:
        assert in_process(*flags) == 130
        assert not (tmp_path / "out" / "results.json").exists()
    assert in_process(*flags) == 0
    assert_same(tmp_path / "out", undisturbed.out)


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed, in_process):
    out = tmp_path / "out"
    shutil.copytree(undisturbed.out, out)
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"stage": "orig')  # tolerated here too
    assert in_process(*FLAGS, "--out", out, "--resume") == 0
    assert_same(out, undisturbed.out)
    times = [row["seconds"] for row in running.results(undisturbed.out)["results"]]
    assert [row["seconds"] for row in running.results(out)["results"]] == times  # of the training, not of the reload


def test_train_lm_killed(tmp_path):
    running.run("train.lm", *LM_FLAGS, "--out", tmp_path / "whole")
    flags = (*LM_FLAGS, "--out", tmp_path / "out")
    assert run_until(stage_has(tmp_path / "out", "train", 5), "train.lm", *flags)
    assert not (tmp_path / "out" / "results.json").exists()
    running.run("train.lm", *flags, "--resume")
    assert_same(tmp_path / "out", tmp_path / "whole")
