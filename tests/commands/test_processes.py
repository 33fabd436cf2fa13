"""Several processes do what one does: the same losses, files written once, one sentence when one of them stops."""

import contextlib
import os
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
import running

import train.lm
from jaxforget import command
from jaxforget.launch import LaunchConfig
from jaxforget.models import hub

FLAGS = ("--preset", "smoke", "--checkpoint-every", 3, "--corpus.general-records", 20, "--epochs", 3)
STOPPED = "error: another process of this run has stopped; start all of them again with --resume"
# Sums over two devices are of another order, and AdamW divides by roots of small numbers: 16 steps apart by this much.
CLOSE = {"rtol": 2e-4, "atol": 0}


@contextlib.contextmanager
def processes(module, *flags, mesh, count=2, own=lambda number: ()):
    """Start the processes of one run, each with a device. None of them outlives the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joint = ("--coordinator", f"localhost:{port}", "--processes", count, "--mesh", mesh)
    started = [running.start(module, *flags, *joint, "--process-id", i, *own(i)) for i in range(count)]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ended(started, seconds=240):
    """Wait for processes. Returns their codes and what they said on stderr."""
    said = [process.communicate(timeout=seconds)[1] for process in started]
    return [process.returncode for process in started], said


def run(module, *flags, **how):
    """Run a command in several processes to its end and require success."""
    with processes(module, *flags, **how) as started:
        codes, said = ended(started)
    assert codes == [0] * len(started), "\n".join(said)
    return said


def assert_close(out, alone):
    """Require the log and the models of two runs to be equal up to the rounding of sums."""
    ours, theirs = running.metrics(out), running.metrics(alone)
    assert [(one["stage"], one["step"]) for one in ours] == [(one["stage"], one["step"]) for one in theirs]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([one[name] for one in ours], [one[name] for one in theirs], **CLOSE, err_msg=name)
    for mine, other in zip(running.results(out)["results"], running.results(alone)["results"], strict=True):
        np.testing.assert_allclose(mine["nll"], other["nll"], **CLOSE, err_msg=mine["name"])
    pairs = zip(*(jax.tree.leaves(hub.load(one / "model")[1]) for one in (out, alone)), strict=True)
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        command.main(train.lm.run, train.lm.PRESETS, [str(flag) for flag in (*FLAGS, "--out", out)])
    return out


def test_two_processes_are_as_one(tmp_path, alone):
    said = run("train.lm", *FLAGS, "--out", tmp_path / "out", mesh="fsdp=2")
    assert_close(tmp_path / "out", alone)
    assert running.files(tmp_path / "out").keys() == running.files(alone).keys()
    assert "2 processes" in running.results(tmp_path / "out")["device"]
    assert "training:" not in said[1]  # one of them speaks


@pytest.mark.slow
@pytest.mark.parametrize("victim", (0, 1))
def test_killed_then_resumed_otherwise(tmp_path, alone, victim):
    """One process is killed, the other says so and ends; resumed in one process or in two, the run is the same."""
    out = tmp_path / "out"
    with processes("train.lm", *FLAGS, "--out", out, mesh="fsdp=2") as started:
        while len(running.metrics(out)) < 5:
            assert started[0].poll() is started[1].poll() is None, "\n".join(ended(started)[1])
            time.sleep(0.01)
        os.killpg(started[victim].pid, signal.SIGKILL)
        codes, said = ended(started, seconds=90)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, said
    assert said[1 - victim].rstrip().endswith(STOPPED) and "Traceback" not in said[1 - victim]
    assert not (out / "results.json").exists()
    if victim:
        running.run("train.lm", *FLAGS, "--out", out, "--resume")
    else:
        run("train.lm", *FLAGS, "--out", out, "--resume", mesh="data=2")
    assert_close(out, alone)
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_different_flags(tmp_path):
    """Processes with different settings would wait for each other for ever."""
    out = tmp_path / "out"
    with processes("train.lm", *FLAGS, "--out", out, mesh="data=2", own=lambda i: ("--seed", i)) as started:
        codes, said = ended(started)
    assert codes == [2, 2]
    assert all("different flags; only --process-id may differ" in one for one in said)
    assert not out.exists()


@pytest.mark.slow
def test_an_error_in_one_ends_all(tmp_path):
    """A process that finds another file than the others tells it, and none is left waiting."""
    out, text = tmp_path / "out", {i: running.write_jsonl(tmp_path / f"{i}.jsonl", ["some words"] * 8) for i in range(2)}
    text[1].write_text("no JSON\n")
    link = tmp_path / "data.jsonl"
@pytest.mark.slow
def test_as_slurm_says(tmp_path, monkeypatch, alone):
    """With --coordinator auto the processes find each other by what their scheduler says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
            "JAX_COORDINATOR_PORT": str(port)}  # fmt: skip
    started = []
    try:
        for number in range(2):
            for name, value in {**told, "SLURM_PROCID": str(number)}.items():
                monkeypatch.setenv(name, value)
            started.append(running.start("train.lm", *FLAGS, "--out", tmp_path / "out", "--coordinator", "auto",
                                         "--mesh", "data=2"))  # fmt: skip
        codes, said = ended(started)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    assert codes == [0, 0], said
    assert_close(tmp_path / "out", alone)
