"""train.forget: interrupted anywhere, beside other processes, on a full disk, with damaged checkpoints and bad input.

Whatever happens, `--resume` ends where an undisturbed deletion ends: the same bits, and no trace of the records.
"""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import filelock
import jax
import numpy as np
import pages
import pytest
import running
import shards
from shards import IDS, PLAN, assert_same, call, done, finish_forgetting, text_of

import train.forget
import train.sisa
from jaxforget.data.text import TextConfig
from jaxforget.errors import RunError
from jaxforget.models import hub
from jaxforget.report import page
from jaxforget.sisa.cost import deletion_visits, training_visits
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.ledger import Ledger, id_hash
from jaxforget.sisa.plan import epoch_schedule
from jaxforget.sisa.store import Finished

TRAINING = (*PLAN, "--epochs", 6, "--checkpoint-every", 4)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes cut short
EPOCHS = epoch_schedule(6, 2)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return (*TRAINING, "--data", shards.write_data(tmp_path_factory.mktemp("data") / "data.jsonl"))


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    done(train.sisa, *flags, "--out", out)
    return out


@pytest.fixture(scope="module")
def ids(trained):
    """A record of the first slice of shard 0, and one of the last slice of shard 2."""
    where = shards.places(trained)
    return tuple(next(one for one in IDS if where[one] == place) for place in [(0, 0), (2, 1)])


@pytest.fixture(scope="module")
def undisturbed(trained, ids, tmp_path_factory):
    """The ensemble without these records, and the report of their deletion."""
    home = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(trained, home / "out")
    outcome = done(train.forget, "--ensemble", home / "out", "--id", *ids, "--out", home / "report")
    return SimpleNamespace(out=home / "out", report=home / "report", outcome=outcome)


@pytest.fixture
def ensemble(trained, tmp_path):
    """A copy of the trained ensemble."""
    shutil.copytree(trained, tmp_path / "ensemble")
    return tmp_path / "ensemble"


@pytest.fixture
def forget(ensemble, tmp_path):
    """Run train.forget on it in this process, with a new report each time; returns code, words and report."""
    number = 0

    def run(*flags):
        nonlocal number
        number += 1
        report = tmp_path / f"report{number}"
        outcome = call(train.forget, "--ensemble", ensemble, *flags, "--out", report)
        outcome.report = report
        return outcome

    return run


def only_error(outcome, code):
    """Return the last line of what a command said, the one sentence it failed with."""
    assert outcome.code == code, outcome.said
    *told, sentence = outcome.said.splitlines()
    assert sentence.startswith("error: ") and not any("rror" in line for line in told), outcome.said
    return sentence


# ----------------------------------------------------------------------------------------------- interruptions
ADVANCE, EXPORT = "jaxforget.sisa.ledger:Ledger.advance", "jaxforget.models.hub"
# when, function, call; the state of the request then
BOUNDARIES = {
    "before it is accepted": ("before", "jaxforget.sisa.ledger:Ledger.receive", 1, None),
    "accepted": ("after", "jaxforget.sisa.ledger:Ledger.receive", 1, "received"),
    "before it is planned": ("before", ADVANCE, 1, "received"),
    "planned": ("after", ADVANCE, 1, "planned"),
    "a checkpoint is written, and not in the ledger": ("after", "jaxforget.sisa.store:save_tree", 1, "planned"),
    "between slices": ("after", "jaxforget.sisa.ensemble:Ensemble._train_stage", 1, "planned"),
    "inside a slice": ("after", "jaxforget.training.checkpoints:Checkpoints.save", 1, "planned"),
    "some of a slice's checkpoints are written": ("after", "jaxforget.sisa.store:save_tree", 2, "planned"),
    "all is trained": ("before", ADVANCE, 2, "planned"),
    "retrained": ("after", ADVANCE, 2, "retrained"),
    "old stages left the ledger": ("after", "jaxforget.sisa.ledger:Ledger.drop_stages", 1, "retrained"),
    "some old checkpoints are erased": ("after", "jaxforget.files:remove", 4, "retrained"),
    "before a member is replaced": ("before", f"{EXPORT}:save", 1, "retrained"),
    "a member is half written": ("after", f"{EXPORT}:_write_files", 1, "retrained"),
    "a member is replaced": ("after", f"{EXPORT}:save", 1, "retrained"),
    "before the ledger is written anew": ("before", "jaxforget.sisa.ledger:Ledger.compact", 1, "retrained"),
    "before it is committed": ("before", ADVANCE, 3, "retrained"),
    "committed": ("after", ADVANCE, 3, "committed"),
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
    with shards.broken("after", ADVANCE, 2, shards.interrupt):
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
    with shards.broken("after", ADVANCE, 1, shards.interrupt):
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
    "planning": (ADVANCE, 1, 16, ["ledger.sqlite cannot be written"], "received"),
    "first checkpoint": ("jaxforget.sisa.store:save_tree", 1, 16, ["shard 0, slice 0", "File too large"], "planned"),
    "last checkpoint": ("jaxforget.sisa.store:save_tree", 3, 16, ["shard 2, slice 1", "File too large"], "planned"),
    "checkpoint inside a slice": (
        "jaxforget.sisa.ensemble:fit", 2, 20_000, ["slice 1, shards 0, 2", "File too large"], "planned"),
    "a stage in the ledger": (
        "jaxforget.sisa.ledger:Ledger.add_stages", 2, 16, ["ledger.sqlite cannot be written"], "planned"),
    "log": ("jaxforget.report.run:Run.log", 2, 16, ["metrics.jsonl cannot be written"], "planned"),
    "forgetting": (ADVANCE, 2, 16, ["ledger.sqlite cannot be written"], "planned"),
    "a member": (f"{EXPORT}:_write_files", 1, 2000, ["members/shard-0 cannot be written"], "retrained"),
    "the ledger anew": (
        "jaxforget.sisa.ledger:Ledger.compact", 1, 16, ["ledger.sqlite cannot be written anew"], "retrained"),
    "committing": (ADVANCE, 3, 16, ["ledger.sqlite cannot be written"], "retrained"),
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


# -------------------------------------------------------------------------------------------------- damaged files
def stage_directory(ensemble, shard, stage):
    """Return the directory of a stage's checkpoint."""
    with Ensemble(ensemble) as opened:
        return ensemble / "stages" / opened.needed()[shard][stage][:32]


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {"flipped": flip, "truncated": truncate, "deleted": lambda path: path.unlink()}


@pytest.fixture(scope="module")
def late(trained, ids, tmp_path_factory):
    """The ensemble without a record of a last slice, whose deletion starts from the slice before."""
    home = tmp_path_factory.mktemp("late")
    shutil.copytree(trained, home / "out")
    done(train.forget, "--ensemble", home / "out", "--id", ids[1], "--out", home / "report")
    return home / "out"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_that_is_needed(how, ensemble, forget, ids, late):
    DAMAGE[how](largest(stage_directory(ensemble, 2, 0)))
    sentence = only_error(forget("--id", ids[1]), 1)
    assert "shard 2, slice 0" in sentence and "is damaged and was removed" in sentence and "--resume" in sentence
    assert shards.requests(ensemble) == {1: "planned"}
    assert forget("--resume").code == 0
    assert_same(ensemble, late)


@pytest.mark.slow
def test_a_damaged_checkpoint_as_a_user_sees_it(ensemble, ids, tmp_path):
    flip(largest(stage_directory(ensemble, 2, 0)))
    process = running.start("train.forget", "--ensemble", ensemble, "--id", ids[1], "--out", tmp_path / "report")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and stdout == "" and stderr.count("\n") == 3, stderr
    assert stderr.splitlines()[-1].startswith("error: shard 2, slice 0: the checkpoint is damaged and was removed")


def test_a_checkpoint_that_is_gone(ensemble, forget, ids, late):
    shutil.rmtree(stage_directory(ensemble, 2, 0))
    assert "1 stages are missing" in forget("--status").said
    assert forget("--id", ids[1]).code == 0
    assert_same(ensemble, late)


def test_all_checkpoints_are_gone(ensemble, forget, ids, late):
    shutil.rmtree(ensemble / "stages")
    assert forget("--id", ids[1]).code == 0
    assert_same(ensemble, late)


def test_damage_anywhere_in_a_checkpoint(ensemble):
    """Whatever byte is wrong: a stage is as it was saved, or it is refused with one sentence."""
    directory = stage_directory(ensemble, 1, 1)
    refused = 0
    with Ensemble(ensemble) as opened:
        key = opened.needed()[1][1]
        digests = opened.store.digests()
        for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
            for place in (0, 0.3, 0.9):
                shutil.copytree(directory, ensemble / "kept", dirs_exist_ok=True)
                row = opened.ledger.stages()[key]
                flip(path, place)
                try:
                    assert opened.read([key]) == {key: digests[key]}
                except RunError as error:
                    refused += 1
                    assert "shard 1, slice 1" in str(error) and "\n" not in str(error)
                    assert not directory.exists() and key not in opened.store.have()
                    opened.ledger.add_stages([(key, *row.values())])
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(ensemble / "kept", directory)
    assert refused > 3


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_final_stage(how, ensemble, forget, trained):
    """--verify reads the disk, and so does whoever loads the member."""
    DAMAGE[how](largest(stage_directory(ensemble, 1, 1)))
    sentence = only_error(forget("--verify"), 1)
    assert "shard 1, slice 1" in sentence and "--resume" in sentence
    outcome = forget("--resume", "--verify")
    assert outcome.code == 0 and "6 of 6 stages equal training from scratch, bit for bit" in outcome.said
    assert_same(ensemble, trained)

    DAMAGE[how](largest(stage_directory(ensemble, 1, 1)))
    with Ensemble(ensemble) as opened, pytest.raises(RunError, match="shard 1, slice 1"):
        opened.params(1)


def test_damage_between_the_last_two_steps(ensemble, forget, ids, undisturbed):
    """The new stages are complete and the request is not committed: a stage that is lost then is trained again."""
    with shards.broken("after", ADVANCE, 2, shards.interrupt):
        assert forget("--id", *ids).code == 130
    flip(largest(stage_directory(ensemble, 0, 1)))
    assert "shard 0, slice 1" in only_error(forget("--resume"), 1)  # found by the export
    assert shards.requests(ensemble) == {1: "retrained"}
    assert forget("--resume").code == 0
    assert_same(ensemble, undisturbed.out)


def test_verify_tells_a_stage_that_training_does_not_give(ensemble, forget):
    """A stage that is whole and says something else, such as one that remembers."""
    with Ensemble(ensemble) as opened:
        key = opened.needed()[1][1]
        like = opened.step.init(jax.random.key(0), {"model": opened._initial})[0].trainable
        other = jax.tree.map(lambda leaf: leaf + 1, opened.store.get(key, like))
        opened.store.put([Finished(key, 1, 1, other, 8, 32)])
    outcome = forget("--verify")
    assert only_error(outcome, 1).endswith("differs from training from scratch: shard 1 slice 1")
    total = running.row(outcome.report, "this run")
    assert (total["stages_verified"], total["stages_different"]) == (5, 1)


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def refused(ensemble, tmp_path, monkeypatch):
    """Run train.forget and return the one sentence it is refused with."""
    monkeypatch.chdir(tmp_path)  # where the default --out would be made

    def refuse(*flags, out="out"):
        before = running.files(tmp_path)
        sentence = only_error(call(train.forget, *flags, *(("--out", tmp_path / out) if out else ())), 2)
        assert running.files(tmp_path) == before
        return sentence

    return refuse


@pytest.fixture
def files(tmp_path, ids):
    """Files of ids, by name."""
    home = tmp_path / "files"
    home.mkdir()
    (home / "empty.txt").write_text("\n \n")
    (home / "latin.txt").write_bytes("récord\n".encode("latin-1"))
    (home / "good.txt").write_text(f"{ids[0]}\n\n  {ids[1]}  \n{ids[0]}\n")
    (home / "unknown.txt").write_text(f"{ids[0]}\nnobody\n")
    (home / "empty.jsonl").write_text("")
    (home / "cut.jsonl").write_text('{"id": "record-01", "text": "a"}\n{"id": "rec')
    (home / "untold.jsonl").write_text('{"id": "record-01"}\n')
    shards.write_data(home / "good.jsonl", ids)
    return home


REFUSED = {
    "nothing given": ("", ["--ensemble is missing"]),
    "nothing to do": ("--ensemble {e}", ["nothing to do", "--id", "--status"]),
    "no such directory": ("--ensemble {e}/none --status", ["/none is not an ensemble", "train.sisa"]),
    "no ensemble": ("--ensemble {e}/members --id record-01", ["members is not an ensemble", "ledger.sqlite"]),
    "unknown ids": (
        "--ensemble {e} --id record-01 nobody nothing", ["2 of 3 ids", "nothing was done", "nobody", "nothing"]),
    "unknown ids in a file": ("--ensemble {e} --ids {f}/unknown.txt", ["1 of 2 ids", "nobody"]),
    "--id twice": ("--ensemble {e} --id record-01 --id record-02", ["--id is given twice"]),
    "no such file": ("--ensemble {e} --ids {f}/none.txt", ["none.txt", "No such file"]),
    "no such data file": ("--ensemble {e} --ids {f}/none.jsonl", ["none.jsonl", "no such file"]),
    "a directory": ("--ensemble {e} --ids {e}", ["is a directory"]),
    "empty file": ("--ensemble {e} --ids {f}/empty.txt", ["empty.txt", "holds no ids"]),
    "empty data file": ("--ensemble {e} --ids {f}/empty.jsonl", ["empty.jsonl", "no records"]),
    "not UTF-8": ("--ensemble {e} --ids {f}/latin.txt", ["latin.txt", "cannot be read as text"]),
    "a data file that is cut": ("--ensemble {e} --ids {f}/cut.jsonl", ["cut.jsonl, line 2"]),
    "a data file without text": ("--ensemble {e} --ids {f}/untold.jsonl", ["untold.jsonl, line 1", "--text-field"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_and_nothing_written(name, refused, ensemble, files):
    flags, expected = REFUSED[name]
    sentence = refused(*flags.format(e=ensemble, f=files).split())
    for part in expected:
        assert part in sentence


def test_deleting_everything_is_refused(refused, forget, ensemble):
    assert "would leave no record" in refused("--ensemble", ensemble, "--id", *IDS)
    with shards.broken("after", "jaxforget.sisa.ledger:Ledger.receive", 1, shards.interrupt):
        assert forget("--id", *IDS[1:]).code == 130
    assert "would leave no record" in refused("--ensemble", ensemble, "--id", IDS[0])  # with those that wait


def test_out_that_is_not_empty(refused, ensemble, tmp_path, ids):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for flags in (["--id", ids[0]], ["--resume"]):
        sentence = refused("--ensemble", ensemble, *flags)
        assert sentence.endswith("/out is not empty; choose another directory")


def test_what_the_ensemble_starts_from_has_changed(refused, ensemble, ids):
    """Settings and initial model determine the parameters, so a deletion by others would not be exact."""
    request = ("--ensemble", ensemble, "--id", ids[0])
    config = (ensemble / "config.json").read_text()
    about = json.loads(config)
    for name, value in (("seed", 7), ("train", about["config"]["train"] | {"learning_rate": 1.0})):
        (ensemble / "config.json").write_text(json.dumps(about | {"config": about["config"] | {name: value}}))
        assert f"config.json has changed since training ({name})" in refused(*request)
    for content in ("", "[1, 2]", '{"config": 3}'):
        (ensemble / "config.json").write_text(content)
        assert "config.json cannot be read" in refused(*request)
    (ensemble / "config.json").unlink()
    assert "config.json cannot be read" in refused(*request)
    (ensemble / "config.json").write_text(config)

    weights = (ensemble / "base" / "model.safetensors").read_bytes()
    flip(ensemble / "base" / "model.safetensors")
    assert "base has changed since training" in refused(*request)
    (ensemble / "base" / "model.safetensors").write_bytes(weights)
    (ensemble / "base" / "more.json").write_text("{}")
    assert "base has changed since training" in refused(*request)
    shutil.rmtree(ensemble / "base")
    assert "base has changed since training" in refused(*request)


def test_moved_ensembles_work(trained, ids, tmp_path, undisturbed):
    """No file of an ensemble holds where it lies, but for --out in its settings, which is not compared."""
    shutil.copytree(trained, tmp_path / "elsewhere" / "moved")
    flags = ("--ensemble", tmp_path / "elsewhere" / "moved", "--id", *ids)
    assert done(train.forget, *flags, "--out", tmp_path / "report")
    assert_same(tmp_path / "elsewhere" / "moved", undisturbed.out)


# --------------------------------------------------------------------------------------- what is fine and looks odd
def test_ids_from_files(ensemble, forget, files, ids, undisturbed, trained):
    outcome = forget("--ids", files / "good.txt")
    assert outcome.code == 0 and "request 1: 2 records, accepted" in outcome.said  # one of them was there twice
    assert_same(ensemble, undisturbed.out)
    shutil.rmtree(ensemble)
    shutil.copytree(trained, ensemble)
    outcome = forget("--ids", files / "good.jsonl", "--id", ids[0], ids[0])
    assert outcome.code == 0 and "request 1: 2 records, accepted" in outcome.said
    assert_same(ensemble, undisturbed.out)


def test_all_ids_of_a_file_count(files, ids):
    """--limit of the training is about the training's files."""
    config = train.forget.Config(ids=files / "good.jsonl")
    text = TextConfig(id_field="id", limit=1)
    assert train.forget.read_ids(config, SimpleNamespace(recipe=SimpleNamespace(text=text))) == list(ids)


def test_an_id_that_is_deleted(ensemble, forget, ids, late):
    assert forget("--id", ids[1]).code == 0
    before = running.files(ensemble)
    outcome = forget("--id", ids[1])
    assert outcome.code == 0 and f"already deleted: {ids[1]} (request 1)" in outcome.said
    assert running.files(ensemble) == before
    assert running.row(outcome.report, "this run")["already_deleted"] == 1
    assert not running.results(outcome.report)["receipts"]
    assert_same(ensemble, late)


def test_an_emptied_shard(ensemble, flags, forget, ids):
    where = shards.places(ensemble)
    outcome = forget("--id", *(one for one in IDS if where[one][0] == 1), "--verify")
    assert outcome.code == 0 and "4 of 4 stages equal training from scratch, bit for bit" in outcome.said
    assert running.row(outcome.report, "request 1")["note"] == "shard 1 is empty and has no vote"
    (receipt,) = running.results(outcome.report)["receipts"]
    assert receipt["shards_emptied"] == [1] and receipt["stages_retrained"] == receipt["examples_revisited"] == 0
    assert all(change["before"] and change["after"] is None for change in receipt["stages"])
    assert sorted(path.name for path in (ensemble / "members").iterdir()) == ["shard-0", "shard-2"]
    outcome = forget("--id", ids[0], "--verify")
    assert outcome.code == 0 and "4 of 4 stages equal" in outcome.said
    assert "15 examples in 2 of 3 shards; 0 stages are missing" in forget("--status").said
    shards.assert_forgotten(ensemble, [ids[0], *(one for one in IDS if where[one][0] == 1)])


def test_status_changes_nothing(ensemble, forget, ids):
    def status(*parts):
        before = running.files(ensemble.parent)
        outcome = forget("--status")
        assert outcome.code == 0 and running.files(ensemble.parent) == before
        assert all(part in outcome.printed + outcome.said for part in parts), outcome
        return outcome.said

    assert "finish with" not in status("24 examples in 3 of 3 shards; 0 stages are missing")
    with shards.broken("after", ADVANCE, 1, shards.interrupt):
        forget("--id", ids[0])
    status("request 1", "planned", f"finish with: python -m train.forget --ensemble {ensemble} --resume")
    forget("--resume")
    assert "finish with" not in status("request 1", "committed", "23 examples in 3 of 3 shards")


def test_nothing_to_resume(ensemble, forget, trained):
    outcome = forget("--resume")
    assert outcome.code == 0 and [row["name"] for row in running.results(outcome.report)["results"]] == ["this run"]
    assert_same(ensemble, trained)


# ----------------------------------------------------------------------------------------------- duplicates
@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """An ensemble with one record three times: twice the same, once in other signs."""
    home = tmp_path_factory.mktemp("twins")
    rows = [{"id": one, "text": text_of(one)} for one in IDS[:21]]
    text = text_of("said often")
    rows += [{"id": "once", "text": text}, {"id": "again", "text": text}, {"id": "loud", "text": text.upper() + "!"}]
    data = home / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done(train.sisa, *TRAINING, "--data", data, "--out", home / "out")
    return home / "out"


def test_duplicates_are_told(twins, tmp_path):
    shutil.copytree(twins, tmp_path / "ensemble")
    outcome = done(train.forget, "--ensemble", tmp_path / "ensemble", "--id", "once", "--out", tmp_path / "report")
    assert "2 other records say the same and stay in the ensemble" in outcome.said
    assert re.search(r"again \(shard \d, exact\)", outcome.said)
    assert re.search(r"loud \(shard \d, normalised\)", outcome.said)
    total = running.row(tmp_path / "report", "this run")
    assert (total["duplicates_left_exact"], total["duplicates_left_normalised"]) == (1, 1)
    assert running.row(tmp_path / "report", "request 1")["records"] == 1
    with Ledger(tmp_path / "ensemble") as ledger:
        assert ledger.where(["again", "loud", "once"]).keys() == {"again", "loud"}


def test_duplicates_are_deleted_too(twins, tmp_path):
    shutil.copytree(twins, tmp_path / "ensemble")
    flags = ("--id", "loud", "--with-duplicates", "--out", tmp_path / "report")
    outcome = done(train.forget, "--ensemble", tmp_path / "ensemble", *flags)
    assert "request 1: 3 records, accepted" in outcome.said and "say the same" not in outcome.said
    assert running.row(tmp_path / "report", "this run")["duplicates_left_exact"] == 0
    everything = b"".join(content or b"" for content in running.files(tmp_path / "ensemble").values())
    for word in text_of("said often").split():
        assert word.encode() not in everything and word.upper().encode() not in everything


# ------------------------------------------------------------------------------------------- what is left behind
def test_report(undisturbed, ids, trained):
    report = undisturbed.report
    document, about = running.results(report), json.loads((report / "config.json").read_text())
    assert document["command"] == about["command"] == "train.forget" and document["config"] == about["config"]
    assert document["schema"] == 1 and about["versions"] and about["device"]
    assert {path.name for path in report.iterdir()} == {"config.json", "metrics.jsonl", "results.json", "report.html"}
    request, total = document["results"]
    assert request["name"] == "request 1" and request["state"] == "committed" and total["name"] == "this run"
    assert (request["records"], request["shards"], request["stages_retrained"]) == (2, 2, 3)
    where = shards.places(trained)
    shard_N, slice_N = np.asarray([where[one] for one in IDS]).T
    deleted_N = np.asarray([one in ids for one in IDS])
    assert request["examples_revisited"] == deletion_visits(shard_N, slice_N, deleted_N, EPOCHS)
    count_SR = np.zeros((3, 2), int)
    np.add.at(count_SR, (shard_N[~deleted_N], slice_N[~deleted_N]), 1)
    full = training_visits(count_SR, EPOCHS)
    assert request["share_of_retraining"] == pytest.approx(request["examples_revisited"] / full)
    for name in ("request 1", "committed", "this run"):
        assert name in undisturbed.outcome.printed


def test_receipt(undisturbed, ids, trained):
    (receipt,) = running.results(undisturbed.report)["receipts"]
    with Ledger(undisturbed.out) as ledger, Ledger(trained) as before:
        (request,) = ledger.requests()
        assert request["receipt"] == receipt and request["ids"] == []
        was, now = before.stages(), ledger.stages()
    assert receipt["ids_sha256"] == sorted(map(id_hash, ids))
    assert receipt["received"] <= receipt["retrained"] <= receipt["committed"]
    places = {(stage["shard"], stage["slice"]): stage for stage in receipt["stages"]}
    assert places.keys() == {(0, 0), (0, 1), (2, 1)}

    def digests(stages):
        return {(stage["shard"], stage["stage"]): stage["digest"] for stage in stages.values()}

    for place, stage in places.items():
        assert stage["before"] == digests(was)[place] != stage["after"] == digests(now)[place]
    assert receipt["shards"] == [0, 2] and receipt["shards_emptied"] == [] and receipt["batch"] == [1]
    assert receipt["versions"] and receipt["device"] and receipt["config_sha256"]


def test_the_report_holds_no_trace(undisturbed, ids):
    shards.assert_forgotten(undisturbed.report, ids)
    shards.assert_forgotten(undisturbed.out, ids)


def test_a_page_that_tells_its_command_does_not_tell_ids(forget, ids, monkeypatch):
    """As where the command is a process of its own."""
    monkeypatch.setattr(page, "program", lambda: "train.forget")
    monkeypatch.setattr(sys, "argv", ["train.forget", "--id", *ids])
    assert ids[0] in page._command_line()
    outcome = forget("--id", *ids)
    assert outcome.code == 0, outcome.said
    shards.assert_forgotten(outcome.report, ids)


def test_the_page_needs_no_network(undisturbed):
    written = (undisturbed.report / "report.html").read_text()
    assert "<table" in written and "request 1" in written
    pages.check(written)


def test_metrics(undisturbed):
    """Only the shards concerned have losses, for the steps that they have."""
    lines = running.metrics(undisturbed.report)
    assert [(line["stage"], line["step"]) for line in lines] == [
        (f"slice {stage}", step) for stage, steps in ((0, 4), (1, 8)) for step in range(1, steps + 1)
    ]
    for line in lines:
        assert [x is not None for x in line["loss"]] == [True, False, line["stage"] == "slice 1"]


def test_verify_page(ensemble, forget, ids):
    outcome = forget("--id", ids[0], "--verify")
    assert outcome.code == 0 and "6 of 6 stages equal training from scratch, bit for bit" in outcome.said
    assert running.row(outcome.report, "this run")["stages_verified"] == 6
    page = (outcome.report / "report.html").read_text()
    with Ledger(ensemble) as ledger:
        for stage in ledger.stages().values():
            assert page.count(stage["digest"][:16]) == 2  # as served and from scratch
    assert "shard 2, slice 1" in page and "Verification" in page
    pages.check(page)


# -------------------------------------------------------------------------------------------- other ensembles
def train_forget_verify(tmp_path, *flags):
    """Train, delete a record of every shard with --verify, and require the members to be the ensemble's."""
    out = tmp_path / "out"
    done(train.sisa, *PLAN, *flags, "--epochs", 3, "--out", out)
    where = shards.places(out)
    ids = [next(one for one in IDS if where[one] == place) for place in [(0, 0), (1, 1), (2, 0)]]
    outcome = done(train.forget, "--ensemble", out, "--id", *ids, "--verify", "--out", tmp_path / "report")
    assert "6 of 6 stages equal training from scratch, bit for bit" in outcome.said
    shards.assert_forgotten(out, ids)
    with Ensemble(out) as opened:
        for shard in range(3):
            _, exported = hub.load(out / "members" / f"shard-{shard}")
            jax.tree.map(np.testing.assert_array_equal, exported, opened.params(shard))
    return out


def test_adapters(tmp_path):
    """With LoRA a stage is its adapters alone, and members are merged."""
    data, model = shards.write_data(tmp_path / "data.jsonl"), running.save_model(tmp_path / "model")
    out = train_forget_verify(tmp_path, "--data", data, "--model", model, "--lora.rank", 2)
    size = sum(path.stat().st_size for path in (out / "stages").rglob("*") if "/d/" in str(path))
    assert size / 6 < (out / "base" / "model.safetensors").stat().st_size / 2


@pytest.mark.slow  # for its programs
def test_classes(tmp_path):
    rows = [{"id": one, "text": text_of(one), "label": ("no", "yes")[i % 2]} for i, one in enumerate(IDS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = running.save_model(tmp_path / "model", family="distilbert", head="masked")
    out = train_forget_verify(
        tmp_path, "--data", data, "--model", model, "--task", "classification", "--evaluate", data
    )
    votes = {row["name"]: row for row in running.results(out)["results"] if row["name"] != "training"}
    assert all(0 <= row["macro_f1"] <= 100 and 0 <= row["accuracy"] <= 100 for row in votes.values())
    assert votes["ensemble, majority: data.jsonl"]["nll"] is None
    assert hub.load(out / "members" / "shard-0")[0].config.labels == ("no", "yes")


@pytest.mark.slow
@pytest.mark.parametrize("task, family", [("masked", "bert"), ("seq2seq", "t5")])
def test_other_tasks(task, family, tmp_path):
    rows = [{"id": one, "question": f"Who is {i}?", "answer": text_of(one)} for i, one in enumerate(IDS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_forget_verify(tmp_path, "--data", data, "--task", task, "--size.family", family, "--evaluate", data)
