"""A run on 8 devices is the run on one: every kind of step, members that never talk, checkpoints, and bad input."""

import functools
import re

import jax
import numpy as np
import pytest
from conftest import make_examples

from jaxforget.errors import UserError
from jaxforget.models import llama, sharding
from jaxforget.models.model import build
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.recipe import private_run
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import Checkpoints, digest
from jaxforget.training.collectives import collectives
from jaxforget.training.ensemble import MemberBatches, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import TrainConfig, adamw, set_schedule
from jaxforget.training.sparse import lay_out, sparse_difference
from jaxforget.training.step import make_run, make_step, place
from jaxforget.training.trainable import everything
from jaxforget.unlearning import METHODS, Setting
from jaxforget.unlearning.run import step_of

pytestmark = pytest.mark.mesh

KEY = jax.random.key(3)
MODEL = build(llama.Config(
    model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
))  # fmt: skip
# Adam divides gradients by their size; with this epsilon those near 0 stay near 0 and rounding is not blown up.
TRAIN = TrainConfig(epochs=2, batch_size=8, microbatch=0, epsilon=1e-2, warmup=0.0, weight_decay=0.1)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXAMPLES, OTHERS = make_examples(20, vocab=32), make_examples(12, seed=1, vocab=32, prefix="r")
MIX = "data=2,fsdp=2,tensor=2"
CHUNK = 3  # of every run here, so that runs of one mesh share a program


@functools.cache
def params():
    return jax.tree.map(np.asarray, MODEL.init(jax.random.key(1)))


def set_mesh(text):
    return jax.set_mesh(sharding.make_mesh(text))


# --------------------------------------------------------------------------------------------------- steps
def plain(microbatch=None, moving=None):
    step = make_step(next_token(MODEL), moving or everything(), mean_gradient(microbatch), adamw(TRAIN))
    return step, {"model": params()}, Batches((Stream(EXAMPLES, 8),), 2, 0)


def sparse():
    layout = lay_out(params(), ("blocks/mlp/.*kernel", "embed/table"), MODEL.config.stacks)
    return plain(moving=sparse_difference(layout, np.arange(0, layout.size, 3)))


def unlearning(name):
    sets = {"forget": EXAMPLES, "retain": OTHERS, "general": OTHERS}
    recipe = METHODS[name].recipe(Setting(MODEL, params(), sets, 8, 0))
    return step_of(recipe, TRAIN, everything()), {"model": params(), **recipe.parts}, Batches(recipe.streams, 2, 0)


def private(estimator):
    """Poisson batches, the largest of which no mesh divides; noise as large as what it hides."""
    run = private_run(PrivacyConfig(noise=1.0, clip=0.5, estimator=estimator), TRAIN, EXAMPLES, 1, "record")
    step = make_step(next_token(MODEL), everything(), run.gradient, run.optimizer)
    assert max(map(len, run.batches.draws)) % 4
    return step, {"model": params()}, run.batches, run.prepare


KINDS = {
    "plain": plain,
    "microbatches": lambda: plain(4),
    "lora": lambda: plain(moving=lora(LoraConfig(rank=2, targets=("q|v|down",), also=("head",)))),
    "sparse": sparse,
    "ascent with KL": lambda: unlearning("ascent_kl_indist"),
    "a part that moves": lambda: unlearning("pdu"),
    "dp vmap": lambda: private("vmap"),
    "dp ghost": lambda: private("ghost"),
    "dp bookkeep": lambda: private("bookkeep"),
}


def trained(kind):
    """Train by a kind of step. Returns the metrics of every step, and what moved on the host."""
    step, parts, batches, *prepare = KINDS[kind]()
    state, frozen = step.init(KEY, parts)
    state = set_schedule(state, learning_rate=0.05, total=batches.steps)
    for complete in prepare:
        state = complete(state)
    lines = []
    outcome = fit(step, state, frozen, batches, chunk=CHUNK, log=lambda n, metrics: lines.append(metrics))
    return lines, sharding.host(outcome.state.trainable)


alone = functools.cache(trained)
CASES = [("ascent with KL", MIX)]  # rows, two streams, a frozen part; the others are slow
MESHES = ("data=4", "fsdp=4", "tensor=2", MIX)
SLOW = [(kind, mesh) for kind in KINDS for mesh in MESHES if (kind, mesh) not in CASES]


@pytest.mark.parametrize("kind, mesh", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_a_sharded_run_is_the_run_on_one_device(kind, mesh):
    lines, moved = alone(kind)
    with set_mesh(mesh):
        found = trained(kind)
    for one, other in zip(found[0], lines, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], **CLOSE, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found[1], moved)


# ------------------------------------------------------------------------------------------------- members
def ensemble(count, how="map"):
    """Return a lifted step, its state and frozen parts, and batches of different lengths."""
    step = plain()[0]
    streams = [Batches((Stream(make_examples(8 + k, seed=k, vocab=32), 8),), 2, k) for k in range(count)]
    states = []
    for k, batches in enumerate(streams):
        state, frozen = step.init(jax.random.key(k), {"model": params()})
        states.append(set_schedule(state, learning_rate=0.05, total=batches.steps))
    return members(step, how), stack(states), frozen, MemberBatches(tuple(streams))


def compiled(step, state, frozen, rows):
    state, frozen = place(step, state, frozen)
    batches = sharding.place_whole(rows.take(0, CHUNK, CHUNK), lead=True)
    return make_run(step).lower(state, frozen, batches, rows.count(0, CHUNK)).compile().as_text()


COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter")


def test_members_on_devices_of_their_own_have_the_same_bits_and_send_nothing():
    step, state, frozen, rows = ensemble(8)
    expected = digest(fit(step, state, frozen, rows, chunk=CHUNK).state.trainable)
    step, state, frozen, rows = ensemble(8)
    with set_mesh("member=8"):
        assert not COLLECTIVE.search(compiled(step, state, frozen, rows))
        outcome = fit(step, state, frozen, rows, chunk=CHUNK)
        assert digest(sharding.host(outcome.state.trainable)) == expected
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(outcome.state)} == {8}


@pytest.mark.slow
@pytest.mark.parametrize("axis, how", [("data", "map"), ("fsdp", "vmap"), ("tensor", "map")])
def test_beside_another_axis_nothing_goes_from_member_to_member(axis, how):
    expected = sharding.host(fit(*ensemble(2), chunk=CHUNK).state.trainable)
    mesh = sharding.make_mesh(f"member=2,{axis}=2")
    with jax.set_mesh(mesh):
        sent = collectives(compiled(*ensemble(2, how)), mesh)
        found = sharding.host(fit(*ensemble(2, how), chunk=CHUNK).state.trainable)
    assert set(sent) == {axis}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ("member=2,fsdp=2", "member=2,data=2,fsdp=2"))
def test_members_wait_for_nobody_who_has_fewer_steps(mesh):
    """A difference over all of a model is permuted among all devices, whose loops then must be equally long."""
    layout = lay_out(params(), (".*",), MODEL.config.stacks)

    def run():
        step, parts, rows = plain(moving=sparse_difference(layout, np.arange(0, layout.size, 3)))
        state, frozen = step.init(KEY, parts)
        state = set_schedule(state, learning_rate=0.05, total=rows.steps)
        outcome = fit(members(step, "map"), stack([state, state]), frozen, MemberBatches((rows, None)), chunk=4)
        return sharding.host(outcome.state.trainable), sharding.host(outcome.state.step)

    expected, steps_K = run()
    assert steps_K.tolist() == [6, 0]
    with set_mesh(mesh):
        found, counted_K = run()
    assert counted_K.tolist() == [6, 0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found, expected)


# --------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_of_8_devices_goes_on_with_2_and_with_1(tmp_path):
    """Killed after 3 of 6 steps; the other numbers of devices have programs of their own."""

    def run(name, stop=None):
        step, parts, batches = plain()
        state, frozen = step.init(KEY, parts)
        state = set_schedule(state, learning_rate=0.05, total=batches.steps)
        lines = []

        def log(n, metrics):
            lines.append(metrics["loss"])
            if n == stop:
                raise KeyboardInterrupt

        with Checkpoints(tmp_path / name) as store:
            outcome = fit(step, state, frozen, batches, chunk=CHUNK, checkpoints=store, checkpoint_every=CHUNK, log=log)
        return lines, outcome.state

    lines, moved = alone("plain")
    expected = [metrics["loss"] for metrics in lines]
    for name, mesh in {"two": "fsdp=2", "one": None}.items():
        with set_mesh(MIX), pytest.raises(KeyboardInterrupt):
            run(name, stop=4)
        with set_mesh(mesh) if mesh else jax.default_device(None):
            rest, state = run(name)
        np.testing.assert_allclose(rest, expected[3:], **CLOSE)
        jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), sharding.host(state.trainable), moved)
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {2 if mesh else 1}


# ----------------------------------------------------------------------------------------------- bad input
def test_rows_that_do_not_divide_are_refused():
    batch = {"tokens": np.zeros((12, 8), np.int32)}
    with set_mesh("data=4,fsdp=2"):
        for rows, near in ((12, "8 or 16"), (3, "8"), (17, "16 or 24")):
            said = rf"{rows} rows at a time do not divide over the 8 devices of data and fsdp; take {near} \(batch"
            for microbatch in (None, 0, rows):
                with pytest.raises(UserError, match=said):
                    TrainConfig(microbatch=microbatch).microbatch_of(rows)
        with pytest.raises(UserError, match="12 rows at a time"):
            jax.eval_shape(sharding.pin_rows, batch)
        assert TrainConfig().microbatch_of(64) == 32 and TrainConfig().microbatch_of(16, 24) == 8
        assert TrainConfig(microbatch=0).microbatch_of(12, 4) is None  # of one batch together
    assert TrainConfig().microbatch_of(64) == 4


def test_members_that_do_not_divide_are_refused():
    with set_mesh("member=4"), pytest.raises(UserError) as error:
        jax.eval_shape(lambda x_K: sharding.apart(lambda x: x, x_K), np.zeros((6, 2)))
    assert str(error.value) == "6 members do not divide over the 4 devices of the member axis; train 4 or 8 together"
