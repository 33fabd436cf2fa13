"""Leaving datasets out: exact steps, paired runs, and nothing read that was left out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import make_examples
from worlds import GOLDEN, TOY, quadratic_losses, quadratic_sets

from jaxforget.data.sampling import order
from jaxforget.data.tokens import concatenate
from jaxforget.errors import UserError
from jaxforget.influence.losses import set_losses
from jaxforget.influence.truth import TruthConfig, load_truth, retrain, run_batches, subsets
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything

TRAIN = {f"t{k}": make_examples(n, seed=k, prefix=f"t{k}-", width=5 + k) for k, n in enumerate((6, 9, 4))}
QUERIES = {f"q{q}": make_examples(5, seed=70 + q, prefix=f"q{q}-") for q in range(2)}
TRAINING = TrainConfig(epochs=2, batch_size=4, learning_rate=0.03, microbatch=4)


def params(seed):
    return TOY.init(jax.random.key(1000 + seed))


def truth_of(directory, train=TRAIN, **settings):
    keep = settings.pop("keep", None)
    config = TruthConfig(**{"seeds": 2, "subsets": 3, **settings})
    return retrain(next_token(TOY), params, train, QUERIES, config, TRAINING, directory, keep=keep)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return truth_of(tmp_path_factory.mktemp("truth"))


def steps_read(batches):
    """Give the keys of the rows with weight, step by step."""
    taken = batches.take(0, batches.steps, batches.steps)
    return [keys[weights > 0] for keys, weights in zip(taken["key"], taken["weight"], strict=True)]


def keys_of(examples):
    return set(examples.columns["key"].astype(np.uint32))


def test_fixed_steps_never_reads_what_is_left_out():
    full = run_batches(TRAIN, (True, True, True), TRAINING, 0, 0)
    assert full.steps == 10  # ceil(19 / 4) * 2
    for k, examples in enumerate(TRAIN.values()):
        kept = [j != k for j in range(3)]
        for steps, expected in ((full.steps, full.steps), (0, -(-(19 - len(examples)) // 4) * 2)):
            batches = run_batches(TRAIN, kept, TRAINING, 0, steps)
            read = steps_read(batches)
            assert batches.steps == len(read) == expected
            assert not set(np.concatenate(read)) & keys_of(examples)
            rest = [keys_of(one) for j, one in enumerate(TRAIN.values()) if j != k]
            assert set(np.concatenate(read)) == set.union(*rest)
            assert batches.tokens == batches.tokens_until(batches.steps)


def test_runs_of_a_seed_are_pairs():
    """What two runs share they read in the same relative order, in the first epoch of both."""
    full = np.concatenate(steps_read(run_batches(TRAIN, (True, True, True), TRAINING, 3, 0))[:5])
    without = np.concatenate(steps_read(run_batches(TRAIN, (True, False, True), TRAINING, 3, 10)))[:10]
    gone = keys_of(TRAIN["t1"])
    assert [key for key in full if key not in gone] == without.tolist()


def test_keeping_everything_is_full_training(truth):
    """The member that keeps all is, to the bit, a run by itself on all data."""
    step = make_step(next_token(TOY), everything(), mean_gradient(4), adamw(TRAINING))
    batches = Batches((Stream(concatenate(list(TRAIN.values())), 4),), 2, 1, "token")
    state, frozen = step.init(jax.random.key(1), {"model": params(1)})
    state = set_schedule(state, learning_rate=0.03, total=batches.steps)
    alone = step.combine(frozen, fit(step, state, frozen, batches).state.trainable)["model"]
    stacked = jax.tree.map(lambda x: x[None], alone)
    losses = [set_losses(next_token(TOY), stacked, one).mean_K[0] for one in QUERIES.values()]
    np.testing.assert_allclose(truth.full_OQ[1], losses, rtol=1e-6)


def test_groups_and_vmap_change_nothing(truth, tmp_path):
    for name, settings in {"groups": {"width": 5}, "vmap": {"members": "vmap"}}.items():
        other = truth_of(tmp_path / name, **settings)
        for field in ("full_OQ", "without_OKQ", "subset_OJQ"):
            np.testing.assert_allclose(getattr(other, field), getattr(truth, field), rtol=2e-5)
    assert (truth.influence_OKQ == truth.without_OKQ - truth.full_OQ[:, None]).all()
    assert truth.about["steps"] == 10 and truth.about["runs"] == 14


def test_the_poison_of_a_dataset_stays_with_its_readers(tmp_path, truth):
    """Other tokens in one dataset change every run but those without it."""
    changed = dataclasses.replace(TRAIN["t1"], columns=TRAIN["t1"].columns | {
        "tokens": (TRAIN["t1"].columns["tokens"] + 3) % 11})  # fmt: skip
    other = truth_of(tmp_path, {**TRAIN, "t1": changed})
    np.testing.assert_array_equal(other.without_OKQ[:, 1], truth.without_OKQ[:, 1])
    for j, kept_K in enumerate(truth.kept_JK):
        assert (other.subset_OJQ[:, j] == truth.subset_OJQ[:, j]).all() == (not kept_K[1])
    assert (other.full_OQ != truth.full_OQ).all() and (other.without_OKQ[:, 0] != truth.without_OKQ[:, 0]).all()


def test_the_models_of_full_runs_are_handed_out(tmp_path, truth):
    found = {}
    truth_of(tmp_path, keep=lambda seed, step, model: found.update({(seed, step): model}))
    assert list(found) == [(0, 10), (1, 10)]
    for (seed, _), model in found.items():
        stacked = jax.tree.map(lambda x: x[None], model)
        losses = [set_losses(next_token(TOY), stacked, one).mean_K[0] for one in QUERIES.values()]
        np.testing.assert_allclose(truth.full_OQ[seed], losses, rtol=1e-6)


def test_killed_and_resumed(truth, tmp_path):
    """A run killed after its first checkpoint goes on from there, to the same bits; a finished group is left alone."""

    class Killed(Exception):
        pass

    def show(progress):
        if progress.step > 4:
            raise Killed

    settings = {"seeds": 2, "subsets": 3, "checkpoint_every": 4, "width": 7}
    call = functools.partial(
        retrain, next_token(TOY), params, TRAIN, QUERIES, TruthConfig(**settings), TRAINING, tmp_path
    )
    with pytest.raises(Killed):
        call(show=show)
    steps = []
    again = call(log=lambda step, metrics: steps.append(step))
    assert steps[0] == 5 and steps[6] == 1  # of the first group what was left, then the second
    for field in ("full_OQ", "without_OKQ", "subset_OJQ"):
        np.testing.assert_array_equal(getattr(again, field), getattr(truth, field))
    call(show=show)  # nothing left to do


def test_saved_and_loaded(truth, tmp_path):
    truth.save(tmp_path / "truth.npz")
    again = load_truth(tmp_path / "truth.npz")
    assert (again.datasets, again.queries, again.about) == (truth.datasets, truth.queries, truth.about)
    np.testing.assert_array_equal(again.influence_OKQ, truth.influence_OKQ)
    for content in (b"", b"no archive"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match="bad.npz is not a truth.npz"):
            load_truth(tmp_path / "bad.npz")


def test_subsets_are_halves_drawn_by_name():
    names = [f"d{k}" for k in range(9)]
    kept = subsets(names, 50)
    assert (kept.sum(axis=1) == 4).all() and 10 < kept[:, 0].sum() < 35
    np.testing.assert_array_equal(subsets(names, 20), kept[:20])  # more subsets keep the first
    shuffled = order(np.arange(9, dtype=np.uint64), 0, 0)
    np.testing.assert_array_equal(subsets([names[i] for i in shuffled], 50), kept[:, shuffled])


@pytest.mark.skipif(GOLDEN is None, reason="the golden file is not beside the checkout")
def test_quadratic_world(tmp_path):
    """Trained to convergence, the runs are at the minima of what they keep: the closed-form influence."""
    world = GOLDEN["quadratic_world"]
    training = TrainConfig(epochs=1000, batch_size=4, learning_rate=0.1, warmup=0.0, max_grad_norm=0.0, microbatch=4)
    with jax.enable_x64(True):
        found = retrain(
            quadratic_losses, lambda seed: {"theta": np.zeros(3)}, quadratic_sets("train"), quadratic_sets("query"),
            TruthConfig(seeds=1), training, tmp_path, chunk=250,
        )  # fmt: skip
    expected = world["scores[k][q]"]["ground_truth_leave_dataset_out"]
    np.testing.assert_allclose(found.influence_OKQ[0], expected, atol=1e-6)
    np.testing.assert_allclose(found.full_OQ[0], world["base_loss_query"], atol=1e-6)


def test_one_dataset_has_no_truth(tmp_path):
    with pytest.raises(UserError, match="two or more"):
        truth_of(tmp_path, {"t0": TRAIN["t0"]})
