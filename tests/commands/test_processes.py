"""Several processes do what one does: the same losses, files written once, one sentence when one of them stops."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
import running
import shards

import train.lm
from jaxforget import command
from jaxforget.models import hub
from jaxforget.sisa.ledger import Ledger

FLAGS = ("--preset", "smoke", "--checkpoint-every", 3, "--corpus.general-records", 20, "--epochs", 2)
STOPPED = "error: another process of this run has stopped; start all of them again with --resume"
# A sum over two devices is of another order, and AdamW divides by roots of small numbers: 2e-7 seen, of weights 2e-6.
CLOSE = {"rtol": 1e-5, "atol": 0}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(*starts):
    """Start processes by functions, and let none of them outlive the block."""
    processes = []
    try:
        for start in starts:
            processes.append(start())
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def two(module, *flags, mesh, start=running.start, own=((), ())):
    """Start the two processes of a run, each with one device."""
    joint = ("--coordinator", f"localhost:{free_port()}", "--processes", 2, "--mesh", mesh)
    return started(*(functools.partial(start, module, *flags, *joint, "--process-id", i, *own[i]) for i in range(2)))


def ended(processes, seconds=240):
    """Wait for processes. Returns their codes and what they said on stderr."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], said


def run(module, *flags, mesh):
    """Run a command in two processes to its end and require success."""
    with two(module, *flags, mesh=mesh) as processes:
        codes, said = ended(processes)
    assert codes == [0, 0], "\n".join(said)
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
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        command.main(train.lm.run, train.lm.PRESETS, [str(flag) for flag in (*FLAGS, "--out", out)])
    return out


@pytest.mark.parametrize(
    ("flags", "told"),
    (
        (("--coordinator", "host:1234"), "needs --processes, or JAX_NUM_PROCESSES"),
        (("--coordinator", "host:1234", "--processes", "2"), "needs --process-id, or JAX_PROCESS_ID"),
        (("--coordinator", "host:1234", "--processes", "2", "--process-id", "2"), "it must be from 0 to"),
        (("--coordinator", "host:1234", "--processes", "0", "--process-id", "0"), "it must be from 0 to"),
        (("--coordinator", "host", "--processes", "2", "--process-id", "0"), "write HOST:PORT"),
        (("--coordinator", "host:http", "--processes", "2", "--process-id", "0"), "write HOST:PORT"),
        (("--coordinator", "host:65536", "--processes", "2", "--process-id", "0"), "the port below 65536"),
        (("--processes", "2"), "--processes goes with --coordinator HOST:PORT"),
        (("--coordinator", "auto", "--process-id", "1"), "--process-id goes with --coordinator HOST:PORT"),
    ),
)
def test_flags_that_do_not_fit(in_process, tmp_path, capsys, flags, told):
    with pytest.raises(SystemExit) as stop:
        in_process(train.lm, "out", *flags)
    assert stop.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_variables_stand_for_flags(in_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(SystemExit):
        in_process(train.lm, "out")
    assert "JAX_NUM_PROCESSES is 'many'; it must be a whole number" in capsys.readouterr().err
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(SystemExit):
        in_process(train.lm, "out")
    assert "--process-id is 4; it must be from 0 to --processes - 1, which is 3" in capsys.readouterr().err


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
    with two("train.lm", *FLAGS, "--out", out, mesh="fsdp=2") as processes:
        while len(running.metrics(out)) < 5:
            assert processes[0].poll() is processes[1].poll() is None, "\n".join(ended(processes)[1])
            time.sleep(0.01)
        os.killpg(processes[victim].pid, signal.SIGKILL)
        codes, said = ended(processes, seconds=90)
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
def test_processes_with_different_flags(tmp_path):
    out = tmp_path / "out"
    with two("train.lm", *FLAGS, "--out", out, mesh="data=2", own=(("--seed", 0), ("--seed", 1))) as processes:
        codes, said = ended(processes)
    assert codes == [2, 2]
    assert all("different flags; only --process-id may differ" in one for one in said)
    assert not out.exists()


REFUSED = """
import train.lm
from jaxforget import command, errors
def start_from(*_, **__):
    raise errors.UserError("this process cannot read its model")
if sys.argv[1:][sys.argv[1:].index("--process-id") + 1] == "{number}":
    train.lm.start_from = start_from
command.main(train.lm.run, train.lm.PRESETS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", (0, 1))
def test_an_error_in_one_ends_both(tmp_path, number):
    with two(REFUSED.format(number=number), *FLAGS, "--out", tmp_path / "out", mesh="data=2",
             start=shards.start) as processes:  # fmt: skip
        codes, said = ended(processes, seconds=120)
    assert codes[number] == 2 and codes[1 - number] == 1, said
    assert said[number].rstrip().endswith("error: this process cannot read its model")
    assert said[1 - number].rstrip().endswith(STOPPED)
    assert not (tmp_path / "out").exists()


def stages(directory):
    """Return what the ledger of an ensemble says of its stages."""
    with Ledger(directory) as ledger:
        return ledger.stages()


@pytest.mark.slow
def test_an_ensemble_of_two_processes(tmp_path):
    """Members on a device of each process, and a record deleted from them: bit for bit as in one process."""
    flags = ("--preset", "smoke", "--shards", 4, "--layers", "scan")
    one, two_of_them = tmp_path / "one", tmp_path / "two"
    running.run("train.sisa", *flags, "--out", one)
    run("train.sisa", *flags, "--out", two_of_them, mesh="member=2")
    assert stages(one) == stages(two_of_them) and len(stages(one)) == 8
    assert running.results(one)["results"] == running.results(two_of_them)["results"]

    with Ledger(one) as ledger:
        identity = ledger.records(1, 0)[0].record.id
    running.run("train.forget", "--ensemble", one, "--id", identity, "--out", tmp_path / "deleted")
    forget = ("--ensemble", two_of_them, "--out")
    run("train.forget", *forget, tmp_path / "verified", "--id", identity, "--verify", mesh="member=2")
    assert running.results(tmp_path / "verified")["results"][-1]["stages_different"] == 0
    assert stages(one) == stages(two_of_them)
    with Ledger(two_of_them) as ledger:
        assert ledger.deleted_by([identity]) == {identity: 1}
        assert [request["state"] for request in ledger.requests()] == ["committed"]
    assert running.files(one / "members").keys() == running.files(two_of_them / "members").keys()

    with two("train.forget", *forget, tmp_path / "wrong", "--id", "nobody", mesh="member=2") as processes:
        codes, said = ended(processes)
    assert codes == [2, 2] and all("1 of 1 ids are not in the ensemble" in text for text in said)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", (0, 1))
def test_a_deletion_outlives_the_death_of_a_process(tmp_path, victim):
    """Once a request is written down, it is served by whoever resumes, in however many processes."""
    flags = ("--preset", "smoke", "--shards", 2, "--layers", "scan")
    one, both = tmp_path / "one", tmp_path / "both"
    running.run("train.sisa", *flags, "--out", one)
    shutil.copytree(one, both)
    with Ledger(one) as ledger:
        identity = ledger.records(0, 0)[0].record.id
    running.run("train.forget", "--ensemble", one, "--id", identity, "--out", tmp_path / "first")
    forget = ("--ensemble", both, "--id", identity, "--out", tmp_path / "killed")
    with two("train.forget", *forget, mesh="member=2") as processes, Ledger(both) as ledger:
        while not ledger.requests():
            assert processes[0].poll() is processes[1].poll() is None, "\n".join(ended(processes)[1])
            time.sleep(0.01)
        os.killpg(processes[victim].pid, signal.SIGKILL)
        codes, said = ended(processes, seconds=90)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, said
    assert "Traceback" not in said[1 - victim]
    again = ("--ensemble", both, "--resume", "--out", tmp_path / "again")
    if victim:
        running.run("train.forget", *again)
    else:
        run("train.forget", *again, mesh="member=2")
    assert stages(one) == stages(both)
    with Ledger(both) as ledger:
        assert [request["state"] for request in ledger.requests()] == ["committed"]


@pytest.mark.slow
def test_as_slurm_says(tmp_path, monkeypatch, alone):
    """With --coordinator auto the processes find each other by what their scheduler says."""
    told = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
            "JAX_COORDINATOR_PORT": str(free_port())}  # fmt: skip

    def start(number):
        for name, value in {**told, "SLURM_PROCID": str(number)}.items():
            monkeypatch.setenv(name, value)
        return running.start("train.lm", *FLAGS, "--out", tmp_path / "out", "--coordinator", "auto", "--mesh", "data=2")

    with started(functools.partial(start, 0), functools.partial(start, 1)) as processes:
        codes, said = ended(processes)
    assert codes == [0, 0], said
    assert_close(tmp_path / "out", alone)
