"""The loop: resume is exact, bad losses stop it, checkpoints survive donation, evaluation can end a run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, make_examples

from jaxforget.errors import NonFiniteLoss
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.step import make_step
from jaxforget.training.trainable import everything

TOY = Toy()
BATCHES = Batches((Stream(make_examples(10), 4),), 6, seed=3)  # 18 steps
STEP = make_step(next_token(TOY), everything(), mean_gradient(), adamw(OptimizerConfig(learning_rate=0.05)))


def fresh(rate=0.05):
    state, frozen = STEP.init(jax.random.key(3), {"model": TOY.init(jax.random.key(1))})
    return set_schedule(state, learning_rate=rate, total=BATCHES.steps), frozen


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 5, 11, 17])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_killed_run_resumes_to_the_same_bits_and_the_same_log(tmp_path, kill_at, chunk):
    def train(store, kill_at=None):
        lines = []

        def log(step, metrics):
            if step == kill_at:
                raise Killed
            lines.append((step, metrics))

        state, frozen = fresh()
        resumed_at = []
        try:
            outcome = fit(STEP, state, frozen, BATCHES, chunk=chunk, checkpoints=store, checkpoint_every=3, log=log,
                          resumed=resumed_at.append)  # fmt: skip
        except Killed:
            outcome = None
        return outcome, lines, resumed_at[0]

    undisturbed, all_lines, _ = train(None)
    with Checkpoints(tmp_path / "c") as store:
        cut, before, _ = train(store, kill_at)
    assert cut is None
    with Checkpoints(tmp_path / "c") as store:
        outcome, after, resumed_at = train(store)
    assert resumed_at <= kill_at and (resumed_at > 0 or kill_at <= 3 + chunk)
    chex.assert_trees_all_equal(outcome.state.trainable, undisturbed.state.trainable)
    chex.assert_trees_all_equal(outcome.state.opt_state, undisturbed.state.opt_state)
    assert [line for line in before if line[0] <= resumed_at] + after == all_lines
    assert outcome.tokens == undisturbed.tokens == BATCHES.tokens


def test_a_finished_run_does_nothing_more(tmp_path):
    steps = []
    for _ in range(2):
        with Checkpoints(tmp_path / "c") as store:
            outcome = fit(STEP, *fresh(), BATCHES, checkpoints=store, log=lambda step, metrics: steps.append(step))
    assert steps == list(range(1, BATCHES.steps + 1)) and outcome.steps == BATCHES.steps


def test_a_checkpoint_holds_the_state_from_before_donation(tmp_path):
    state = jax.tree.map(jnp.array, {"a": np.arange(200_000.0, dtype=np.float32), "key": jax.random.key(2)})
    overwrite = jax.jit(lambda x: {**x, "a": x["a"] * 0 - 1}, donate_argnums=0)
    with Checkpoints(tmp_path / "c") as store:
        store.save(1, state, {"seconds": 2.5})
        state = overwrite(state)
        jax.block_until_ready(state["a"])
    with Checkpoints(tmp_path / "c") as store:
        loaded, notes = store.restore(state)
    np.testing.assert_array_equal(loaded["a"], np.arange(200_000.0, dtype=np.float32))
    assert notes == {"seconds": 2.5}
    np.testing.assert_array_equal(jax.random.key_data(loaded["key"]), jax.random.key_data(jax.random.key(2)))


def test_half_written_checkpoints_are_ignored(tmp_path):
    state = {"a": jnp.ones(3)}
    with Checkpoints(tmp_path / "c", keep=3) as store:
        store.save(1, state)
    (tmp_path / "c" / "2.orbax-checkpoint-tmp-7").mkdir()
    with Checkpoints(tmp_path / "c") as store:
        assert store.restore(state) is not None


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path):
    def explode(parts, batch, key):
        return next_token(TOY)(parts, batch, key) + jnp.where(batch["key"] == 0, 0.0, jnp.log(parts["model"]["fuse"]))

    def shrink():  # a constant gradient pulls the fuse below 0 within a few steps
        params = {**TOY.init(jax.random.key(1)), "fuse": jnp.float32(0.12)}
        state, frozen = step.init(jax.random.key(3), {"model": params})
        return set_schedule(state, learning_rate=0.05, total=BATCHES.steps), frozen

    step = make_step(explode, everything(), mean_gradient(), adamw(OptimizerConfig(schedule="constant", warmup=0.0)))
    lines = []
    with Checkpoints(tmp_path / "c") as store, pytest.raises(NonFiniteLoss, match=r"at step 4\b"):
        fit(step, *shrink(), BATCHES, chunk=8, checkpoints=store, checkpoint_every=8,
            log=lambda n, metrics: lines.append(n))  # fmt: skip
    assert lines == [1, 2, 3]
    with Checkpoints(tmp_path / "c") as store:
        assert store.restore(shrink()[0]) is None  # the broken state was not saved


def test_evaluation_sees_regular_steps_and_can_stop():
    seen = []

    def evaluate(step, parts):
        seen.append(step)
        assert set(parts) == {"model"}
        return step >= 10

    outcome = fit(STEP, *fresh(), BATCHES, chunk=4, evaluate_every=5, evaluate=evaluate)
    assert seen == [0, 5, 10] and outcome.stopped_at == outcome.steps == 10
    assert outcome.tokens == BATCHES.tokens_until(10) < BATCHES.tokens


def test_a_stopped_run_stays_stopped_on_resume(tmp_path):
    for _ in range(2):
        with Checkpoints(tmp_path / "c") as store:
            outcome = fit(STEP, *fresh(), BATCHES, checkpoints=store, evaluate_every=5, evaluate=lambda s, p: s >= 5)
        assert outcome.stopped_at == outcome.steps == 5
