"""Members side by side: each is trained by its own batches alone, whatever the others do. K members, S steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, make_examples

from jaxforget.errors import NonFiniteLoss
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.checkpoints import Checkpoints
from jaxforget.training.ensemble import MemberBatches, join_parts, member, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.loop import fit
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig, adamw, set_schedule
from jaxforget.training.step import make_run, make_step
from jaxforget.training.trainable import everything

TOY = Toy()
STEP = make_step(next_token(TOY), everything(), mean_gradient(2), adamw(OptimizerConfig(weight_decay=0.1)))
HOW = pytest.mark.parametrize("how", ["map", "vmap"])
CHUNK = 4


def batches(count: int, seed: int, epochs: int = 3) -> Batches:
    return Batches((Stream(make_examples(count, seed=seed), 4),), epochs, seed)


A, B, C, D = batches(10, 1), batches(3, 2), batches(7, 3), batches(5, 4, epochs=1)
UNEVEN = MemberBatches((A, B, None, C))  # 9, 3, no and 6 steps


def start(seed: int, steps: int = 5):
    state, _ = STEP.init(jax.random.key(seed), {"model": TOY.init(jax.random.key(100 + seed))})
    return set_schedule(state, learning_rate=0.05, total=steps)


FROZEN = STEP.init(jax.random.key(0), {"model": TOY.init(jax.random.key(0))})[1]


def states(seeds=(0, 1, 2, 3), rows=UNEVEN):
    return [start(seed, batch.steps if batch else 1) for seed, batch in zip(seeds, rows.members, strict=True)]


def train(how, state_K, rows, **settings):
    """Returns the outcome and the lines of the log."""
    lines = []
    settings = {"chunk": CHUNK, "log": lambda step, metrics: lines.append((step, metrics)), **settings}
    return fit(members(STEP, how), stack(state_K), FROZEN, rows, **settings), lines


@functools.cache
def undisturbed(how):
    return train(how, states(), UNEVEN)


def same_bits(one, other):
    """Compare states, keys of randomness among them."""
    plain = [
        jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
        for tree in (one, other)
    ]
    chex.assert_trees_all_equal(*plain, strict=True)


# ---------------------------------------------------------------------------------------------- batches


def test_steps_and_counts():
    assert [b.steps for b in (A, B, C)] == [9, 3, 6] and UNEVEN.steps == 9
    assert UNEVEN.active == [A, B, C]
    for first, last, expected in [
        (0, 1, [1, 1, 0, 1]), (0, 4, [4, 3, 0, 4]), (3, 5, [2, 0, 0, 2]), (2, 7, [5, 1, 0, 4]), (5, 9, [4, 0, 0, 1]),
        (8, 9, [1, 0, 0, 0]), (0, 0, [0, 0, 0, 0]),
    ]:  # fmt: skip
        count_K = UNEVEN.count(first, last)
        assert count_K.dtype == np.int32 and count_K.tolist() == expected


def test_a_member_has_the_batches_it_would_have_alone():
    alone = {k: b.take(0, b.steps, b.steps) for k, b in enumerate(UNEVEN.members) if b}
    for first in range(UNEVEN.steps):
        for last in range(first + 1, min(first + CHUNK, UNEVEN.steps) + 1):
            taken = UNEVEN.take(first, last, CHUNK)
            count_K = UNEVEN.count(first, last)
            assert set(taken) == set(alone[0])
            for name, column_KS in taken.items():
                assert column_KS.shape[:2] == (4, CHUNK) and column_KS.dtype == alone[0][name].dtype
                for k, count in enumerate(count_K):
                    if count:
                        np.testing.assert_array_equal(column_KS[k, :count], alone[k][name][first : first + count])
                    else:
                        assert not column_KS[k].any()


def test_tokens_are_those_of_the_visits():
    assert UNEVEN.tokens == A.tokens + B.tokens + C.tokens
    for steps in range(UNEVEN.steps + 1):
        seen = 0
        for row in UNEVEN.active:
            for step in range(min(steps, row.steps)):
                batch = row.take(step, step + 1, 1)
                seen += int((batch["length"] * (batch["weight"] > 0)).sum())
        assert UNEVEN.tokens_until(steps) == seen


# ---------------------------------------------------------------------------------------------- members


def test_stack_and_member_are_inverse():
    trees = states()
    for k, tree in enumerate(trees):
        same_bits(member(stack(trees), k), tree)


def test_parts_of_all_are_held_once_and_others_stacked():
    one, two = ({"w": np.full(2, x, np.float32)} for x in (1.0, 2.0))
    own, parts = join_parts([{"model": one, "reference": one, "head": head} for head in (one, two)])
    assert own == ("head",) and parts["model"] is parts["reference"]
    np.testing.assert_array_equal(parts["head"]["w"], [[1, 1], [2, 2]])
    equal = {"w": one["w"].copy()}  # equal numbers in another object may change apart
    assert join_parts([{"model": one}, {"model": equal}])[0] == ("model",)


@HOW
def test_members_start_alike_with_keys_of_their_own(how):
    parts = {"model": TOY.init(jax.random.key(5))}
    keys = jax.random.split(jax.random.key(1), 3)
    state_K, frozen = members(STEP, how).init(keys, parts)
    for k in range(3):
        expected, alone = STEP.init(keys[k], parts)
        same_bits(member(state_K, k), expected)
        same_bits(frozen, alone)


def test_auto_is_map_on_a_cpu_and_vmap_elsewhere(monkeypatch):
    lift = members.__wrapped__  # not the cached one
    arguments = (stack(states()), FROZEN, UNEVEN.take(0, 1, CHUNK), UNEVEN.count(0, 1))

    def program(how):
        return str(jax.make_jaxpr(lift(STEP, how).run)(*arguments))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert program("auto") == program("map") != program("vmap")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program("auto") == program("vmap")


@HOW
def test_an_idle_member_keeps_its_state(how):
    outcome, _ = undisturbed(how)
    for k, before in enumerate(states()):
        after = member(outcome.state, k)
        if UNEVEN.members[k] is None:
            same_bits(after, before)
        else:
            assert int(after.step) == UNEVEN.members[k].steps
            assert (np.asarray(after.trainable["model"]["mix"]["kernel"])
                    != np.asarray(before.trainable["model"]["mix"]["kernel"])).any()  # fmt: skip
    assert outcome.steps == 9 and outcome.tokens == UNEVEN.tokens


@HOW
def test_no_steps_for_anybody_change_nothing(how):
    state_K = stack(states())
    before = jax.tree.map(jnp.copy, state_K)
    taken = UNEVEN.take(0, 1, CHUNK)
    after, _ = make_run(members(STEP, how))(state_K, FROZEN, taken, np.zeros(4, np.int32))
    same_bits(after, before)


@HOW
@pytest.mark.parametrize("others", [
    (A, B, C, D), (D, B, C, A), (None, B, None, None), (C, B, A, None),
], ids=["all", "others", "nobody", "longer"])  # fmt: skip
def test_a_member_does_not_depend_on_the_others(how, others):
    """Neither on their data, nor on how many steps they have, nor on whether they train at all."""
    undisturbed_outcome, undisturbed_lines = undisturbed(how)
    rows = MemberBatches(others)
    outcome, lines = train(how, states((7, 1, 8, 9), rows), rows)
    same_bits(member(outcome.state, 1), member(undisturbed_outcome.state, 1))
    for (_, line), (_, expected) in zip(lines[: B.steps], undisturbed_lines[: B.steps], strict=True):
        assert {name: values[1] for name, values in line.items()} == {
            name: values[1] for name, values in expected.items()
        }


@HOW
def test_nothing_of_a_broken_member_reaches_another(how):
    """Neither a member whose parameters are NaN, nor an idle one."""
    expected, _ = undisturbed(how)
    broken = [
        state._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, state.trainable)) if k in (0, 2) else state
        for k, state in enumerate(states())
    ]
    state_K, run = stack(broken), make_run(members(STEP, how))
    for first in range(0, UNEVEN.steps, CHUNK):
        last = min(first + CHUNK, UNEVEN.steps)
        state_K, _ = run(state_K, FROZEN, UNEVEN.take(first, last, CHUNK), UNEVEN.count(first, last))
    assert np.isnan(state_K.trainable["model"]["mix"]["kernel"][0]).all()
    for k in (1, 3):
        same_bits(member(state_K, k), member(expected.state, k))


@HOW
def test_members_equal_separate_runs(how):
    outcome, lines = undisturbed(how)
    for k, rows in enumerate(UNEVEN.members):
        if rows is None:
            continue
        alone_lines = []
        alone = fit(STEP, states()[k], FROZEN, rows, chunk=CHUNK, log=lambda n, m, to=alone_lines: to.append((n, m)))
        if how == "map":
            same_bits(member(outcome.state, k), alone.state)
            assert [(n, {name: v[k] for name, v in m.items()}) for n, m in lines[: rows.steps]] == alone_lines
        else:  # vmap rounds differently; Adam turns a last-bit difference into about 1e-5 after a few steps
            chex.assert_trees_all_close(member(outcome.state, k).trainable, alone.state.trainable, atol=1e-4)


@HOW
@pytest.mark.parametrize("every", [1, 2, 3])
def test_cuts_do_not_change_the_numbers(how, every):
    """A cut may lie within one member, at the end of another and after that of a third."""
    outcome, lines = train(how, states(), UNEVEN, checkpoint_every=every)
    expected, expected_lines = undisturbed(how)
    same_bits(outcome.state, expected.state)
    assert lines == expected_lines


# ---------------------------------------------------------------------------------------------- the log


@HOW
def test_metrics_are_none_where_a_member_had_no_step(how):
    _, lines = undisturbed(how)
    assert [step for step, _ in lines] == list(range(1, 10))
    for step, metrics in lines:
        assert set(metrics) == {"loss", "grad_norm"}
        for values in metrics.values():
            assert len(values) == 4
            for value, rows in zip(values, UNEVEN.members, strict=True):
                if rows is None or step > rows.steps:
                    assert value is None
                else:
                    assert isinstance(value, float) and np.isfinite(value) and value > 0


@HOW
def test_progress_counts_the_tokens_of_all_members(how):
    seen = []
    train(how, states(), UNEVEN, show=seen.append)
    assert [(one.step, one.steps, one.tokens) for one in seen] == [
        (n, 9, UNEVEN.tokens_until(n)) for n in (4, 8, 9)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


@HOW
@pytest.mark.parametrize("kill_at", [2, 4, 5, 7, 9])
def test_a_killed_run_resumes_to_the_same_bits_and_the_same_log(how, kill_at, tmp_path):
    """Before, between and after the ends of the shorter members, which are at 3 and 6."""
    expected, all_lines = undisturbed(how)
    before, resumed_at = [], []

    def log(step, metrics):
        if step == kill_at:
            raise Killed
        before.append((step, metrics))

    keep = {"checkpoint_every": 2, "resumed": resumed_at.append}
    with Checkpoints(tmp_path / "c") as store, pytest.raises(Killed):
        train(how, states(), UNEVEN, checkpoints=store, log=log, **keep)
    with Checkpoints(tmp_path / "c") as store:
        outcome, after = train(how, states(), UNEVEN, checkpoints=store, **keep)
    # A chunk ends at a checkpoint; its metrics are read, and it is written, before the next but one.
    assert resumed_at == [0, 2 * ((kill_at - 1) // 2)]
    same_bits(outcome.state, expected.state)
    assert [line for line in before if line[0] <= resumed_at[1]] + after == all_lines
    assert outcome.tokens == UNEVEN.tokens


# ---------------------------------------------------------------------------------------------- bad losses


@HOW
def test_a_bad_loss_of_one_member_stops_all(how, tmp_path):
    """Member 3 explodes at its third step; the others are fine."""

    def explode(parts, batch, key):
        return next_token(TOY)(parts, batch, key) + jnp.log(parts["model"]["fuse"])

    constant = OptimizerConfig(schedule="constant", warmup=0.0, max_grad_norm=0.0)
    step = make_step(explode, everything(), mean_gradient(2), adamw(constant))

    def fresh(fuse):  # Adam takes 0.05 off it at every step
        params = {**TOY.init(jax.random.key(1)), "fuse": jnp.float32(fuse)}
        state, frozen = step.init(jax.random.key(3), {"model": params})
        return set_schedule(state, learning_rate=0.05, total=9), frozen

    lines = []
    state_K = stack([fresh(fuse)[0] for fuse in (9.0, 9.0, -1.0, 0.07)])  # the idle one's loss would be NaN
    told = pytest.raises(NonFiniteLoss, match=r"the loss is \[\d.*, None, nan\] at step 3; lower")
    with Checkpoints(tmp_path / "c") as store, told:
        fit(members(step, how), state_K, fresh(1.0)[1], UNEVEN, chunk=CHUNK, checkpoints=store, checkpoint_every=2,
            log=lambda n, metrics: lines.append(n))  # fmt: skip
    assert lines == [1, 2]
    with Checkpoints(tmp_path / "c") as store:
        kept, _ = store.restore(stack([fresh(9.0)[0]] * 4))
        assert kept.step.tolist() == [2, 2, 0, 2]  # the state before


@HOW
def test_what_an_idle_member_holds_does_not_stop_the_others(how):
    """Only losses of members that train count; the idle one's would be NaN."""
    state_K = states()
    state_K[2] = state_K[2]._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, state_K[2].trainable))
    outcome, lines = train(how, state_K, UNEVEN)
    assert len(lines) == 9
    same_bits(member(outcome.state, 0), member(undisturbed(how)[0].state, 0))
