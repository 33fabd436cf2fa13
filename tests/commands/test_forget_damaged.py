"""train.forget: with damaged checkpoints. What is damaged is told, removed, and trained again to the same bits."""

import shutil

import jax
import pytest
import running
import shards
from shards import assert_same, flip, only_error

from jaxforget.errors import RunError
from jaxforget.sisa.ensemble import Ensemble
from jaxforget.sisa.store import Finished

pytest_plugins = ("forgetting",)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads cut short


def stage_directory(ensemble, shard, stage):
    """Return the directory of a stage's checkpoint."""
    with Ensemble(ensemble) as opened:
        return ensemble / "stages" / opened.needed()[shard][stage][:32]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {"flipped": flip, "truncated": truncate, "deleted": lambda path: path.unlink()}


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
    with shards.broken("after", shards.ADVANCE, 2, shards.interrupt):
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
