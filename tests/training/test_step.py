"""The four slots: what they promise, and that new ones plug in without touching the step or the loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Toy, make_examples

from jaxforget.errors import UserError
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import drawn_token, next_token, next_token_with_kl
from jaxforget.training.optimizer import OptimizerConfig, TrainConfig, adamw, schedule, set_schedule
from jaxforget.training.step import Trainable, make_run, make_step
from jaxforget.training.trainable import everything, subset

TOY = Toy()
KEY = jax.random.key(7)


def toy_step(objective=None, trainable=None, gradient=None, **settings):
    config = OptimizerConfig(**{"learning_rate": 0.05, "warmup": 0.0, **settings})
    step = make_step(
        objective or next_token(TOY), trainable or everything(), gradient or mean_gradient(), adamw(config)
    )
    return step, config


def start(step, parts=None, rate=0.05, total=10):
    state, frozen = step.init(KEY, parts or {"model": TOY.init(jax.random.key(1))})
    return set_schedule(state, learning_rate=rate, total=total), frozen


def one_batch(batches, index=0):
    return {name: value[0] for name, value in batches.take(index, index + 1, 1).items()}


def test_equal_compositions_are_one_function():
    # The learning rate lives in the state, so it does not make another program.
    assert toy_step(learning_rate=0.1)[0] is toy_step(learning_rate=0.2)[0]
    assert adamw(TrainConfig(epochs=3)) is adamw(OptimizerConfig())


def test_a_step_is_traced_once_over_chunks_of_any_length():
    counting = chex.assert_max_traces(next_token(TOY), n=2)  # eval_shape for the metrics, then the program itself
    step, _ = toy_step(objective=counting)
    batches = Batches((Stream(make_examples(10), 4),), 5, 0)
    run = make_run(step)
    state, frozen = start(step)
    for first in range(0, batches.steps, 4):
        count = min(4, batches.steps - first)
        state, _ = run(state, frozen, batches.take(first, first + count, 4), count)
    assert int(state.step) == batches.steps == 15


def test_chunks_do_not_change_the_numbers():
    step, _ = toy_step()
    batches = Batches((Stream(make_examples(10), 4),), 4, 0)
    run = make_run(step)

    def train(cuts):
        state, frozen = start(step, total=batches.steps)
        for first, last in zip([0, *cuts], [*cuts, batches.steps], strict=True):
            state, _ = run(state, frozen, batches.take(first, last, batches.steps), last - first)
        return state

    chex.assert_trees_all_equal(train([]).trainable, train([1, 2, 7, 11]).trainable)


def test_state_is_donated_and_the_parameters_given_are_not():
    step, _ = toy_step()
    params = TOY.init(jax.random.key(1))
    state, frozen = start(step, {"model": params})
    batches = Batches((Stream(make_examples(8), 4),), 1, 0)
    moved, _ = make_run(step)(state, frozen, batches.take(0, 2, 2), 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert float(optax.tree.norm(optax.tree.sub(moved.trainable["model"], params))) > 0


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_microbatches_give_the_gradient_of_the_whole_batch(microbatch):
    batch = one_batch(Batches((Stream(make_examples(6), 8),), 1, 0))  # two rows of padding
    params = {"model": TOY.init(KEY)}
    losses = lambda p, b, k: next_token(TOY)(p, b, k)  # noqa: E731
    whole = mean_gradient()(losses, params, batch, KEY)
    split = mean_gradient(microbatch)(losses, params, batch, KEY)
    chex.assert_trees_all_close(whole, split, rtol=1e-5, atol=1e-7)  # float32 sums in another order


def test_padding_contributes_exactly_nothing():
    batch = one_batch(Batches((Stream(make_examples(3), 8),), 1, 0))
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    wild = dict(batch, tokens=batch["tokens"].copy(), factor=batch["factor"].copy())
    wild["tokens"][3:] = 9
    wild["factor"][3:] = np.inf
    params = {"model": TOY.init(KEY)}
    for microbatch in (None, 2):
        gradient = mean_gradient(microbatch)
        loss, _ = gradient(next_token(TOY), params, batch, KEY)
        wild_loss, _ = gradient(next_token(TOY), params, wild, KEY)
        assert float(loss["loss"]) == float(wild_loss["loss"])
    wild["factor"][3:] = 1e3
    chex.assert_trees_all_equal(
        mean_gradient()(next_token(TOY), params, batch, KEY), mean_gradient()(next_token(TOY), params, wild, KEY)
    )


@pytest.mark.parametrize("rows", [(4, 4), (2, 6), (6, 1)])
def test_stream_factors_hold_whatever_the_row_counts(rows):
    forget, retain = make_examples(rows[0], seed=1), make_examples(rows[1], seed=2, width=7, prefix="r")
    batches = Batches((Stream(forget, rows[0], -0.5), Stream(retain, rows[1], 0.3)), 1, 0)
    params = {"model": TOY.init(KEY)}
    report, _ = mean_gradient()(next_token(TOY), params, one_batch(batches), KEY)

    def mean_loss(examples):
        batch = {**examples.columns, "factor": np.ones(len(examples), np.float32)}
        return float(next_token(TOY)(params, batch, KEY).mean())

    assert float(report["loss"]) == pytest.approx(-0.5 * mean_loss(forget) + 0.3 * mean_loss(retain), rel=1e-5)


def test_token_weighting_is_the_mean_over_tokens():
    examples = make_examples(6)
    batch = one_batch(Batches((Stream(examples, 8),), 1, 0, "token"))
    params = {"model": TOY.init(KEY)}
    report, _ = mean_gradient(2)(next_token(TOY), params, batch, KEY)
    logp = jax.nn.log_softmax(TOY.logits(params["model"], examples.columns["tokens"]))
    scored = examples.scored
    picked = np.take_along_axis(np.asarray(logp), np.where(scored, examples.columns["labels"], 0)[..., None], 2)[..., 0]
    assert float(report["loss"]) == pytest.approx(-picked[scored].mean(), rel=1e-5)


def test_frozen_leaves_do_not_move_and_have_no_optimizer_state():
    step, _ = toy_step(trainable=subset("model/mix/.*"))
    params = TOY.init(jax.random.key(1))
    state, frozen = start(step, {"model": params})
    batches = Batches((Stream(make_examples(8), 4),), 3, 0)
    state, _ = make_run(step)(state, frozen, batches.take(0, 6, 6), 6)
    after = step.combine(frozen, state.trainable)["model"]
    chex.assert_trees_all_equal(after["embed"], params["embed"])
    chex.assert_trees_all_equal(after["head"], params["head"])
    assert float(jnp.abs(after["mix"]["kernel"] - params["mix"]["kernel"]).max()) > 1e-3
    moving = sum(leaf.size for leaf in jax.tree.leaves(params["mix"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2 * moving + 8


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="mlp"):
        subset("model/mlp/.*").init(KEY, {"model": TOY.init(KEY)})


def test_a_low_rank_difference_plugs_in_as_a_trainable():
    def init(key, parts):
        shape = parts["model"]["head"]["kernel"].shape
        down = 0.1 * jax.random.normal(key, (shape[0], 2))
        return {"down": down, "up": jnp.zeros((2, shape[1]))}, parts

    def combine(frozen, moving, key=None):
        head = {"kernel": frozen["model"]["head"]["kernel"] + moving["down"] @ moving["up"]}
        return {**frozen, "model": {**frozen["model"], "head": head}}

    step, _ = toy_step(trainable=Trainable(init, combine))
    state, frozen = start(step)
    batches = Batches((Stream(make_examples(8), 4),), 10, 0)
    state, metrics = make_run(step)(state, frozen, batches.take(0, 20, 20), 20)
    assert float(metrics["loss"][-2:].mean()) < float(metrics["loss"][:2].mean())
    assert np.linalg.matrix_rank(np.asarray(state.trainable["down"] @ state.trainable["up"]), tol=1e-6) == 2


def test_a_clipped_sum_plugs_in_as_a_gradient():
    clip = 0.05

    def clipped(losses, trainable, batch, key):
        def one(example):
            return losses(trainable, jax.tree.map(lambda x: x[None], example), key)[0]

        grads_B = jax.vmap(
            lambda example: jax.grad(lambda p: losses(p, jax.tree.map(lambda x: x[None], example), key)[0])(trainable)
        )(batch)
        norm_B = jax.vmap(optax.tree.norm)(grads_B)
        scale_B = batch["weight"] * jnp.minimum(1.0, clip / norm_B)
        return {"loss": jnp.mean(jax.vmap(one)(batch)), "norms": norm_B}, jax.tree.map(
            lambda g: jnp.tensordot(scale_B, g, 1), grads_B
        )

    step, _ = toy_step(gradient=clipped)
    state, frozen = start(step)
    batches = Batches((Stream(make_examples(6), 4),), 2, 0)
    _, metrics = make_run(step)(state, frozen, batches.take(0, 4, 4), 4)
    assert metrics["norms"].shape == (4, 4)
    assert (metrics["norms"] > clip).all()  # so every example was clipped
    rows = np.array([4, 2, 4, 2])
    assert (np.asarray(metrics["grad_norm"]) <= clip * rows * (1 + 1e-5)).all()


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_members_equal_separate_runs(how):
    step, _ = toy_step()
    together = members(step, how)
    keys = jax.random.split(KEY, 3)
    parts = {"model": TOY.init(jax.random.key(1))}
    rates = [0.01, 0.05, 0.1]
    streams = [Batches((Stream(make_examples(8, seed=s), 4),), 3, s) for s in range(3)]
    alone = []
    for key, rate, batches in zip(keys, rates, streams, strict=True):
        state, frozen = step.init(key, parts)
        state = set_schedule(state, learning_rate=rate, total=6)
        alone.append(make_run(step)(state, frozen, batches.take(0, 6, 6), 6)[0].trainable)
    state_K, frozen = together.init(keys, parts)
    states = [
        set_schedule(jax.tree.map(lambda x, k=k: x[k], state_K), learning_rate=r, total=6) for k, r in enumerate(rates)
    ]
    state_K = jax.tree.map(lambda *x: jnp.stack(x), *states)
    batch_KS = {n: np.stack([b.take(0, 6, 6)[n] for b in streams]) for n in streams[0].take(0, 1, 1)}
    state_K, metrics = make_run(together)(state_K, frozen, batch_KS, np.full(3, 6))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert metrics["loss"].shape == (3, 6)
    if how == "map":
        chex.assert_trees_all_equal(state_K.trainable, expected)
    else:  # vmap rounds differently; Adam turns a last-bit difference into about 1e-5 after a few steps
        chex.assert_trees_all_close(state_K.trainable, expected, atol=1e-4)


def test_warmup_and_cosine_follow_their_formula():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.2, schedule="cosine", max_grad_norm=0.0)
    tx = schedule(config)
    state = tx.init(None)._replace(peak=jnp.float32(2.0), total=jnp.float32(10.0))
    rates = []
    for _ in range(10):
        update, state = tx.update(jnp.float32(1.0), state)
        rates.append(-float(update))
    expected = [1.0, 2.0] + [2.0 * 0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)  # a float32 cosine


def test_kl_stream_reads_the_reference_and_vanishes_at_it():
    forget, retain = make_examples(4, seed=1), make_examples(4, seed=2, prefix="r")
    batch = one_batch(Batches((Stream(forget, 4, -1.0), Stream(retain, 4, 1.0)), 1, 0))
    model, other = TOY.init(KEY), TOY.init(jax.random.key(9))
    at_reference = next_token_with_kl(TOY)({"model": model, "reference": model}, batch, KEY)
    np.testing.assert_allclose(at_reference[4:], 0.0, atol=1e-6)
    plain = next_token(TOY)({"model": model}, batch, KEY)
    np.testing.assert_allclose(at_reference[:4], plain[:4], rtol=1e-6)
    moved = next_token_with_kl(TOY)({"model": model, "reference": other}, batch, KEY)
    assert (moved[4:] > 0).all()


def test_drawn_labels_follow_the_model():
    """Gradients have mean 0 and the Fisher information as covariance: along a direction, the variance of log p."""
    model, draws = TOY.init(KEY), 4000
    tokens_BT = jnp.tile(jnp.array([[1, 4, 2, 7]]), (draws, 1))
    batch = {"tokens": tokens_BT, "labels": jnp.tile(jnp.array([[4, -100, 3, -100]]), (draws, 1)),
             "draw": jnp.arange(draws, dtype=jnp.uint32), "factor": jnp.ones(draws)}  # fmt: skip
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape), model)
    along = jax.jit(lambda batch: jax.jvp(lambda m: drawn_token(TOY)({"model": m}, batch, KEY), (model,), (direction,)))
    losses_B, slope_B = along(batch)
    logits_TV, moved_TV = jax.jvp(lambda m: TOY.logits(m, tokens_BT[:1])[0], (model,), (direction,))
    p_TV = jax.nn.softmax(logits_TV)
    spread_T = jnp.sum(p_TV * jnp.square(moved_TV - jnp.sum(p_TV * moved_TV, axis=-1, keepdims=True)), axis=-1)
    entropy_T = -jnp.sum(p_TV * jnp.log(p_TV), axis=-1)
    variance = (spread_T[0] + spread_T[2]) / 4  # of the mean of two independent draws
    assert abs(slope_B.mean()) < 4 * jnp.sqrt(variance / draws)
    np.testing.assert_allclose(slope_B.var(), variance, rtol=0.15)
    np.testing.assert_allclose(losses_B.mean(), (entropy_T[0] + entropy_T[2]) / 2, rtol=0.03)
    back = jax.tree.map(lambda x: x[::-1], batch)
    np.testing.assert_array_equal(along(back)[0][::-1], losses_B)  # a draw goes with its example
