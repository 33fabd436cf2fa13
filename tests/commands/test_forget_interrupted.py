"""train.forget: interrupted anywhere, beside other processes, on a full disk.

Whatever happens, `--resume` ends where an undisturbed deletion ends: the same bits, and no trace of the records.
"""

import filelock
import pytest
import running
import shards
from shards import assert_same, call, done, finish_forgetting, only_error

import train.forget
import train.sisa
from jaxforget.sisa.ledger import Ledger

pytest_plugins = ("forgetting",)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes cut short


# ----------------------------------------------------------------------------------------------- interruptions
EXPORT = "jaxforget.models.hub"
# when, function, call; the state of the request then
BOUNDARIES = {
    "before it is accepted": ("before", "jaxforget.sisa.ledger:Ledger.receive", 1, None),
    "accepted": ("after", "jaxforget.sisa.ledger:Ledger.receive", 1, "received"),
    "before it is planned": ("before", shards.ADVANCE, 1, "received"),
    "planned": ("after", shards.ADVANCE, 1, "planned"),
    "a checkpoint is written, and not in the ledger": ("after", "jaxforget.sisa.store:save_tree", 1, "planned"),
    "between slices": ("after", "jaxforget.sisa.ensemble:Ensemble._train_stage", 1, "planned"),
    "inside a slice": ("after", "jaxforget.training.checkpoints:Checkpoints.save", 1, "planned"),
    "some of a slice's checkpoints are written": ("after", "jaxforget.sisa.store:save_tree", 2, "planned"),
    "all is trained": ("before", shards.ADVANCE, 2, "planned"),
    "retrained": ("after", shards.ADVANCE, 2, "retrained"),
    "old stages left the ledger": ("after", "jaxforget.sisa.ledger:Ledger.drop_stages", 1, "retrained"),
    "some old checkpoints are erased": ("after", "jaxforget.files:remove", 4, "retrained"),
    "before a member is replaced": ("before", f"{EXPORT}:save", 1, "retrained"),
    "a member is half written": ("after", f"{EXPORT}:_write_files", 1, "retrained"),
    "a member is replaced": ("after", f"{EXPORT}:save", 1, "retrained"),
    "before the ledger is written anew": ("before", "jaxforget.sisa.ledger:Ledger.compact", 1, "retrained"),
    "before it is committed": ("before", shards.ADVANCE, 3, "retrained"),
    "committed": ("after", shards.ADVANCE, 3, "committed"),
    "before the report": ("before", "jaxforget.report.run:Run.finish", 1, "committed"),
}


ALIKE = ("before it is planned", "all is trained", "before a member is replaced", "before it is committed")


@shards.cases(BOUNDARIES, slow=ALIKE)
def test_interrupted(name, ensemble, forget, ids, undisturbed, tmp_path):
    *boundary, state = BOUNDARIES[name]
    with shards.broken(*boundary, shards.interrupt):
        outcome = forget("--id", *ids)
    assert only_error(outcome, 130) == "error: interrupted; run again with --resume"
    assert shards.requests(ensemble) == ({1: state} if state else {})
    finish_forgetting(ensemble, ids, tmp_path)
    assert_same(ensemble, undisturbed.out)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDARIES)
def test_killed_at_a_boundary(name, ensemble, ids, undisturbed, tmp_path):
    *boundary, state = BOUNDARIES[name]
    report = tmp_path / "report"
    process = shards.start_broken(
        tuple(boundary), "train.forget", "--ensemble", ensemble, "--id", *ids, "--out", report
    )
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == -9, stderr
    assert shards.requests(ensemble) == ({1: state} if state else {})
    finish_forgetting(ensemble, ids, tmp_path)
    assert_same(ensemble, undisturbed.out)


def test_a_request_in_every_state_of_another(ensemble, forget, ids, undisturbed):
    """The first is interrupted when it is retrained; the second is accepted then, and finishes both."""
    with shards.broken("after", shards.ADVANCE, 2, shards.interrupt):
        assert forget("--id", ids[0]).code == 130
    outcome = forget("--id", ids[1])
    assert outcome.code == 0 and shards.requests(ensemble) == {1: "committed", 2: "committed"}
    assert [row["name"] for row in running.results(outcome.report)["results"]] == ["request 1", "request 2", "this run"]
    assert_same(ensemble, undisturbed.out)


def test_an_id_that_waits(ensemble, forget, ids, undisturbed):
    """Asked for again, it is told, not accepted twice, and served."""
    with shards.broken("after", "jaxforget.sisa.ledger:Ledger.receive", 1, shards.interrupt):
        assert forget("--id", *ids).code == 130
    outcome = forget("--id", ids[1])
    assert outcome.code == 0 and f"already waiting for deletion: {ids[1]} (request 1)" in outcome.said
    assert shards.requests(ensemble) == {1: "committed"}
    assert running.row(outcome.report, "this run")["already_waiting"] == 1
    assert_same(ensemble, undisturbed.out)


def test_resumed_by_training(ensemble, flags, forget, ids, undisturbed):
    """train.sisa --resume finishes requests too."""
    with shards.broken("after", shards.ADVANCE, 1, shards.interrupt):
        assert forget("--id", *ids).code == 130
    done(train.sisa, *flags, "--out", ensemble, "--resume")
    assert_same(ensemble, undisturbed.out)


def test_asked_of_a_half_trained_ensemble(flags, ids, undisturbed, tmp_path):
    """The deletion finishes the training, without the record."""
    out = tmp_path / "out"
    with shards.broken("after", "jaxforget.sisa.ensemble:Ensemble._train_stage", 1, shards.interrupt):
        assert call(train.sisa, *flags, "--out", out).code == 130
    outcome = done(train.forget, "--ensemble", out, "--status")
    assert "3 stages are missing" in outcome.said and f"--ensemble {out} --resume" in outcome.said
    done(train.forget, "--ensemble", out, "--id", *ids, "--out", tmp_path / "report")
    done(train.sisa, *flags, "--out", out, "--resume")
    assert_same(out, undisturbed.out)


# ---------------------------------------------------------------------------------------------- two processes
def test_two_processes(ensemble, ids, undisturbed, tmp_path):
    """Both accept while a third works; one of them serves both, and both say what became of their request."""
    reports = [tmp_path / "first", tmp_path / "second"]
    lock = filelock.FileLock(ensemble / "lock")
    with lock:
        processes = [
            running.start("train.forget", "--ensemble", ensemble, "--id", one, "--out", report)
            for one, report in zip(ids, reports, strict=True)
        ]
        told = [process.stderr.readline() + process.stderr.readline() for process in processes]
    ended = [process.communicate(timeout=300) for process in processes]
    for process, (_, stderr), before in zip(processes, ended, told, strict=True):
        assert process.returncode == 0, stderr
        assert "1 records, accepted" in before and "another process works on" in before
    assert_same(ensemble, undisturbed.out)
    receipts = []
    for report in reports:
        *asked, _ = running.results(report)["results"]
        assert [row["state"] for row in asked] == ["committed"] * len(asked)
        receipts.append(running.results(report)["receipts"])
        assert len(receipts[-1]) == len(asked)
    assert sorted(map(len, receipts)) == [1, 2]  # one served both, in one batch
    assert all(receipt["batch"] == [1, 2] for each in receipts for receipt in each)


def test_no_wait(ensemble, forget, ids, undisturbed):
    """The request is accepted though it is not served: the next one to resume serves it."""
    with filelock.FileLock(ensemble / "lock"):
        sentence = only_error(forget("--id", *ids, "--no-wait"), 2)
    assert "is in use by another process" in sentence
    assert shards.requests(ensemble) == {1: "received"}
    assert forget("--resume", "--no-wait").code == 0
    assert_same(ensemble, undisturbed.out)


def test_accepted_while_another_is_served(ensemble, forget, ids, undisturbed):
    """Its turn comes next, and the other's is not disturbed."""

    def accept():
        with Ledger(ensemble) as ledger:
            ledger.receive([ids[1]])

    with shards.broken("after", "jaxforget.sisa.ensemble:Ensemble._train_stage", 1, accept):
        assert forget("--id", ids[0]).code == 0
    assert shards.requests(ensemble) == {1: "committed", 2: "received"}
    assert forget("--resume").code == 0
    assert_same(ensemble, undisturbed.out)


# --------------------------------------------------------------------------------------------------- full disks
# function in which the disk is full, at which call, from which size of file on; what the sentence says; the state then
FULL = {
    "accepting": ("jaxforget.sisa.ledger:Ledger.receive", 1, 16, ["ledger.sqlite cannot be written"], None),
    "planning": (shards.ADVANCE, 1, 16, ["ledger.sqlite cannot be written"], "received"),
    "first checkpoint": ("jaxforget.sisa.store:save_tree", 1, 16, ["shard 0, slice 0", "File too large"], "planned"),
    "last checkpoint": ("jaxforget.sisa.store:save_tree", 3, 16, ["shard 2, slice 1", "File too large"], "planned"),
    "checkpoint inside a slice": (
        "jaxforget.sisa.ensemble:fit", 2, 20_000, ["slice 1, shards 0, 2", "File too large"], "planned"),
    "a stage in the ledger": (
        "jaxforget.sisa.ledger:Ledger.add_stages", 2, 16, ["ledger.sqlite cannot be written"], "planned"),
    "log": ("jaxforget.report.run:Run.log", 2, 16, ["metrics.jsonl cannot be written"], "planned"),
    "forgetting": (shards.ADVANCE, 2, 16, ["ledger.sqlite cannot be written"], "planned"),
    "a member": (f"{EXPORT}:_write_files", 1, 2000, ["members/shard-0 cannot be written"], "retrained"),
    "the ledger anew": (
        "jaxforget.sisa.ledger:Ledger.compact", 1, 16, ["ledger.sqlite cannot be written anew"], "retrained"),
    "committing": (shards.ADVANCE, 3, 16, ["ledger.sqlite cannot be written"], "retrained"),
    "results": ("jaxforget.report.run:Run.finish", 1, 16, ["results.json cannot be written"], "committed"),
    "page": ("train.forget:write_page", 1, 16, ["report.html cannot be written"], "committed"),
}  # fmt: skip


FULL_ALIKE = ("planning", "first checkpoint", "forgetting", "results")


@shards.cases(FULL, slow=FULL_ALIKE)
def test_full_disk(name, ensemble, forget, ids, undisturbed, tmp_path):
    *where, expected, state = FULL[name]
    with shards.full_disk(*where):
        sentence = only_error(forget("--id", *ids), 1)
    for part in expected:
        assert part in sentence
    assert shards.requests(ensemble) == ({1: state} if state else {})
    finish_forgetting(ensemble, ids, tmp_path)
    assert_same(ensemble, undisturbed.out)
