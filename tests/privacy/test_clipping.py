"""Every estimator against one gradient at a time, for every model family; clipping, noise and what they promise."""

import collections
import dataclasses
import functools

import formula
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxforget.errors import UserError
from jaxforget.models import gpt2
from jaxforget.models.layers import linear
from jaxforget.models.model import build
from jaxforget.privacy import taps
from jaxforget.privacy.accounting import PrivacyConfig
from jaxforget.privacy.clipping import Clipping, check_units, clipped_sum
from jaxforget.privacy.noise import Adaptive, gaussian_noise, private_gradient, set_privacy
from jaxforget.privacy.recipe import adaptive_multiplier
from jaxforget.training.ensemble import member, stack
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.objectives import classification, next_token
from jaxforget.training.step import Trainable, make_step
from jaxforget.training.trainable import everything, subset

KEY = jax.random.key(0)
TAPPED = ("ghost", "bookkeep")
SMALL = gpt2.Config(vocab_size=31, n_positions=12, n_embd=8, n_layer=2, n_head=2)


def batch_of(rows=4, tokens=12, vocabulary=31, seed=0):
    """Rows of different lengths, padded, with all columns that any family reads."""
    rng = np.random.default_rng(seed)
    length_B = rng.integers(2, tokens + 1, rows)
    real_BT = np.arange(tokens)[None] < length_B[:, None]
    token_BT = np.where(real_BT, rng.integers(1, vocabulary, (rows, tokens)), 0)
    label_BT = np.where(np.roll(real_BT, -1, 1) & real_BT, np.roll(token_BT, -1, 1), -100)
    label_BT[:, -1] = -100
    columns = {
        "tokens": token_BT, "labels": label_BT, "length": length_B, "label": rng.integers(0, 3, rows),
        "decoder_tokens": np.where(real_BT, rng.integers(1, vocabulary, (rows, tokens)), 0),
        "segments": rng.integers(0, 2, (rows, tokens)),
    }  # fmt: skip
    batch = {name: jnp.asarray(column, jnp.int32) for name, column in columns.items()}
    return batch | {"weight": jnp.ones(rows), "factor": jnp.ones(rows), "draw": jnp.zeros(rows, jnp.uint32)}


def setting(model, params, trainable: Trainable | None = None):
    """Return the losses of the model's task and what moves."""
    trainable = trainable or everything()
    objective = classification(model) if model.config.head == "classification" else next_token(model)
    moving, frozen = trainable.init(KEY, {"model": params})
    return lambda moving, batch, key: objective(trainable.combine(frozen, moving), batch, key), moving


def one_by_one(losses, moving, batch, rows=1):
    """Norms, and the clipped sum as a function of the bound, from one ordinary gradient a unit."""

    @jax.jit
    def gradient(moving, unit):
        def mean(moving):
            weight = unit["weight"]
            return jnp.sum(weight * losses(moving, unit, KEY)) / jnp.sum(weight)

        return jax.grad(mean)(moving)

    units = [jax.tree.map(lambda x: x[u : u + rows], batch) for u in range(0, len(batch["weight"]), rows)]  # noqa: B023
    grads = [jax.tree.map(lambda x: np.asarray(x, np.float64), gradient(moving, unit)) for unit in units]
    norms = np.asarray([np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(one))) for one in grads])

    def total(bound):
        factors = np.minimum(1.0, bound / norms)
        return jax.tree.map(lambda *each: sum(f * x for f, x in zip(factors, each, strict=True)), *grads)

    return norms, total


@functools.partial(jax.jit, static_argnums=(0, 4))
def clipped(losses, moving, batch, bound, how):
    return clipped_sum(losses, moving, batch, KEY, jnp.float32(bound), how)


def distance(a, b):
    """Relative L2 distance of two trees."""
    pairs = list(zip(*([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (a, b)), strict=True))
    return (sum(np.sum(np.square(x - y)) for x, y in pairs) / sum(np.sum(np.square(y)) for _, y in pairs)) ** 0.5


def assert_agree(losses, moving, batch, rows=1, estimators=("vmap", *TAPPED), tolerance=1e-5):
    norms, total = one_by_one(losses, moving, batch, rows)
    bound = float(np.median(norms))  # some are cut, some are not
    total = total(bound)
    for name in estimators:
        found = clipped(losses, moving, batch, bound, Clipping(name, rows))
        np.testing.assert_allclose(found.norm_GU[0], norms, rtol=tolerance)
        assert distance(found.total, total) < tolerance, name


DEFAULT = (("gpt2", 4), ("llama", 4))  # the others compile for minutes


# 12 tokens: gradients of kernels cost less than Gram matrices; 4: the other way round.
@pytest.mark.parametrize("name, tokens", [
    pytest.param(name, tokens, marks=[] if (name, tokens) in DEFAULT else pytest.mark.slow)
    for name in formula.CONFIGS for tokens in (4, 12)
])  # fmt: skip
def test_every_family(name, tokens):
    losses, moving = setting(*formula.model(name))
    assert_agree(losses, moving, batch_of(tokens=tokens))


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5"))])
def test_units_of_several_rows(name):
    losses, moving = setting(*formula.model(name))
    batch = batch_of(rows=6, tokens=4)
    batch["weight"] = jnp.asarray([1.0, 1, 2, 1, 1, 0])  # the last unit has one row
    assert_agree(losses, moving, batch, rows=2)


@pytest.mark.parametrize("options, tied", [
    ({"scan_layers": False}, True),
    *(pytest.param(options, tied, marks=pytest.mark.slow) for options, tied in (
        ({"scan_layers": False}, False), ({"remat": "full"}, True), ({"remat": "full"}, False),
        ({"remat": "dots", "scan_layers": False}, True), ({"remat": "dots", "scan_layers": False}, False),
    )),
], ids=str)  # fmt: skip
def test_options_of_the_stack(options, tied):
    model = build(dataclasses.replace(SMALL, tie_word_embeddings=tied), **options)
    losses, moving = setting(model, model.init(KEY))
    assert_agree(losses, moving, batch_of(tokens=4), estimators=TAPPED)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama-classification", marks=pytest.mark.slow)])
def test_adapters_and_subsets(name):
    model, params = formula.model(name)
    for trainable in (lora(LoraConfig(rank=2, targets=("q|v|qkv", "mlp/.*"))), subset(r"model/blocks/.*/kernel")):
        losses, moving = setting(model, params, trainable)
        wave = lambda x: 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
        moving = jax.tree.map(lambda x: x + wave(x), moving)  # noqa: B023
        assert_agree(losses, moving, batch_of(tokens=4), estimators=TAPPED)


def test_forms_are_chosen_by_size():
    """A tied table and large kernels by factors, small ones and long texts by the gradient itself."""
    losses, moving = setting(*formula.model("gpt2"))
    forms = {}
    for tokens, second_pass in ((4, True), (4, False), (12, True)):
        batch = batch_of(tokens=tokens)
        plans = taps.plan(lambda moving: losses(moving, batch, KEY), moving, 4, 4, second_pass)  # noqa: B023
        forms[tokens, second_pass] = collections.Counter(plan.form for plan in plans)
        assert sorted(len(plan.uses) for plan in plans) == [1] * 15 + [2]  # the tied table alone; nothing is seen twice
    assert forms[4, True] == {"norm": 5, "factors": 1, "explicit": 10}  # 4 kernels and the positions; 6 norms, 4 biases
    assert forms[4, False] == {"factors": 6, "explicit": 10}
    assert forms[12, True]["explicit"] > 10


# ------------------------------------------------------------------------------------------------ golden integers
def test_golden_norms_of_every_use():
    """Integer cases worked out by hand."""
    spec = taps.Spec(rows=1, units=1, form="factors")

    def tap(use, a, b, shape):
        a = None if a is None else jnp.asarray(a, jnp.int32 if use == "gather" else jnp.float32)
        return spec.rule(use, a, jnp.asarray(b, jnp.float32), shape)

    assert tap("product", [[1, 2], [3, 4]], [[1, 0], [2, -1]], (2, 2))["square"] == 174
    assert taps.EXPLICIT["shift"](None, jnp.asarray([[[1.0, 0], [2, -1]]]), (2,)).tolist() == [[3, -1]]
    ids, h = [0, 2, 0], [[1, 1], [0, 1], [2, 0]]
    e, g = [[1, 0], [0, 2], [1, -1]], [[1, 0, -1], [0, 1, -1], [-1, 0, 1]]
    tied = {"gather": tap("gather", ids, e, (3, 2)), "score": tap("score", h, g, (3, 2))}
    assert (tied["gather"]["square"], tied["score"]["square"]) == (9, 8)
    plan = taps.Plan("factors", (taps.Use("gather", (3, 2), None, None),), ())
    assert taps.squared_norm(plan, tied) == 3  # 9 + 8 - 14
    total = taps.weighted_sum(plan, tied, jnp.ones(1))
    np.testing.assert_array_equal(total, [[1, 0], [0, 1], [1, 0]])
    # Two sequences of a unit share positions: their cotangents add up before they are squared.
    pair = taps.Spec(rows=2, units=1, form="factors").rule(
        "gather", jnp.asarray([0, 1, 0, 1]), jnp.asarray([[1.0, 0], [0, 2], [2, 1], [-1, 1]]), (2, 2))  # fmt: skip
    assert pair["square"] == 20


# ------------------------------------------------------------------------------------------------------ properties
@pytest.fixture(scope="module")
def small():
    model = build(SMALL)
    return setting(model, model.init(KEY))


@pytest.mark.parametrize("name", ("vmap", *TAPPED))
def test_padding_order_and_bad_units(small, name):
    """Padding adds exactly nothing, order does not matter, and a unit without a finite gradient leaves the others."""
    losses, moving = small
    batch, how = batch_of(rows=4, tokens=6), Clipping(name)
    found = clipped(losses, moving, batch, 0.5, how)
    turned = clipped(losses, moving, jax.tree.map(lambda x: x[::-1], batch), 0.5, how)
    np.testing.assert_allclose(turned.norm_GU[:, ::-1], found.norm_GU, rtol=1e-6)
    assert distance(turned.total, found.total) < 1e-6
    three = clipped(losses, moving, batch | {"weight": jnp.asarray([1.0, 1, 0, 1])}, 0.5, how)
    for bad in (batch["tokens"].at[2].set(99), batch["tokens"].at[2, 0].set(99)):  # no row of the table: NaN
        with_bad = clipped(losses, moving, batch | {"tokens": bad}, 0.5, how)
        assert not np.isfinite(with_bad.norm_GU[0, 2]) and np.isfinite(np.delete(with_bad.norm_GU[0], 2)).all()
        assert distance(with_bad.total, three.total) < 1e-6
    nothing = clipped(losses, moving, batch | {"weight": jnp.zeros(4)}, 0.5, how)
    assert not any(np.any(x) for x in jax.tree.leaves(nothing.total)) and not nothing.real_U.any()
    worst = clipped(losses, moving, batch | {"tokens": jnp.full_like(batch["tokens"], 99)}, 0.5, how)
    assert not any(np.any(x) for x in jax.tree.leaves(worst.total))


@pytest.mark.parametrize("how", [
    Clipping("bookkeep"), Clipping("ghost"), Clipping("bookkeep", auto_s=True), Clipping("bookkeep", rows=2),
    Clipping("bookkeep", groups=(r".*/blocks/.*", r".*norm.*")), Clipping("ghost", groups=(r".*/blocks/.*",)),
], ids=str)  # fmt: skip
def test_one_unit_changes_the_sum_by_at_most_the_sensitivity(small, how):
    """And by exactly that much where its gradient is cut."""
    losses, moving = small
    batch, bound = batch_of(rows=4, tokens=6), 0.05
    changes = []
    for u in range(4 // how.rows):
        weight = batch["weight"].at[u * how.rows : (u + 1) * how.rows].set(0.0)
        with_, without = (clipped(losses, moving, b, bound, how).total for b in (batch, batch | {"weight": weight}))
        changes.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, with_, without))))
    limit = float(how.sensitivity(jnp.float32(bound)))
    assert max(changes) <= limit * (1 + 1e-5)
    np.testing.assert_allclose(changes, limit, rtol=1e-4 if not how.auto_s else 0.02)  # all are far above the bound


@pytest.mark.slow
def test_groups_agree_between_estimators(small):
    losses, moving = small
    batch, groups = batch_of(rows=4, tokens=6), (r".*/blocks/.*", r".*norm.*")
    found = [clipped(losses, moving, batch, 0.7, Clipping(name, groups=groups)) for name in ("vmap", *TAPPED)]
    assert found[0].norm_GU.shape == (3, 4)
    for other in found[1:]:
        np.testing.assert_allclose(other.norm_GU, found[0].norm_GU, rtol=1e-5)
        assert distance(other.total, found[0].total) < 1e-5
    whole = clipped(losses, moving, batch, 0.7, Clipping("vmap"))
    np.testing.assert_allclose(np.linalg.norm(found[0].norm_GU, axis=0), whole.norm_GU[0], rtol=1e-5)
    with pytest.raises(UserError, match="group pattern 'heads' takes no parameter"):
        clipped(losses, moving, batch, 0.7, Clipping("vmap", groups=("heads",)))


@pytest.mark.parametrize("norms, auto_s, factors", [
    ([0.5, 1, 2, 4], False, [1, 1, 0.5, 0.25]),
    ([0.5, 1, 2, 4], True, [1.960784, 0.990099, 0.497512, 0.249377]),
])  # fmt: skip
def test_golden_factors(norms, auto_s, factors):
    """A model of one bias whose gradient of each example is that example's number."""
    def losses(moving, batch, key):
        return moving["b"] * batch["x"]

    batch = {"x": jnp.asarray(norms, jnp.float32), "weight": jnp.ones(4)}
    for u, factor in enumerate(factors):
        alone = batch | {"weight": jnp.zeros(4).at[u].set(1.0)}
        found = clipped_sum(losses, {"b": jnp.float32(0)}, alone, KEY, jnp.float32(1), Clipping("vmap", auto_s=auto_s))
        assert float(found.total["b"]) == pytest.approx(factor * norms[u], abs=2e-6 * norms[u])


def test_what_taps_cannot_see_is_refused(small):
    losses, moving = small
    batch = batch_of(rows=4, tokens=6)

    def regularised(moving, batch, key):
        return losses(moving, batch, key) + 0.1 * jnp.sum(jnp.square(moving["model"]["embed"]["table"]))

    with pytest.raises(UserError, match="something besides the operations .* use the estimator vmap"):
        clipped_sum(regularised, moving, batch, KEY, jnp.float32(1), Clipping("bookkeep"))
    unused = moving | {"more": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(UserError, match="no operation tells of more/kernel"):
        run = lambda moving, batch, key: losses({"model": moving["model"]}, batch, key)  # noqa: E731
        clipped_sum(run, unused, batch, KEY, jnp.float32(1), Clipping("ghost"))


def test_batch_coupling_is_refused(small):
    losses, moving = small
    batch = batch_of(rows=4, tokens=6)
    check_units(losses, moving, batch, KEY)
    with pytest.raises(UserError, match="depends on the others of its batch"):
        check_units(lambda m, b, k: losses(m, b, k) - jnp.mean(losses(m, b, k)), moving, batch, KEY)


@pytest.mark.parametrize("name", TAPPED)
def test_half_precision_keeps_the_bound(name):
    """64 units that all point the same way, so that the sum is long and its rounding would be too."""
    model = build(SMALL, dtype="bfloat16")
    losses, moving = setting(model, model.init(KEY))
    batch = jax.tree.map(lambda x: jnp.repeat(x[:1], 64, axis=0), batch_of(rows=1, tokens=4))
    one_less = batch | {"weight": batch["weight"].at[0].set(0.0)}
    for bound in (0.1, 0.137, 0.19):
        with_, without = (clipped(losses, moving, b, bound, Clipping(name)).total for b in (batch, one_less))
        change = float(optax.tree.norm(jax.tree.map(jnp.subtract, with_, without)))
        assert 0.98 * bound < change <= bound * (1 + 1e-4)
    # Nor may a unit that is not finite, by the other way that its sum is made, change how the others are rounded.
    with_bad = batch | {"tokens": batch["tokens"].at[0].set(99)}
    with_, without = (clipped(losses, moving, b, bound, Clipping(name)).total for b in (with_bad, one_less))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, with_, without))) <= bound * 1e-3


def test_a_parameter_read_past_the_operations_is_refused(small):
    """Its gradient would lack a part that nothing else notices: sums over leaves meet taps and values alike."""
    losses, moving = small
    batch = batch_of(rows=4, tokens=6)

    def decayed(moving, batch, key):
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(moving["model"])]
        return losses(moving, batch, key) + 1e-3 * sum(squares)

    with pytest.raises(UserError, match="something besides the operations of models/layers.py reads model/"):
        check_units(decayed, moving, batch, KEY)
    check_units(decayed, moving, batch, KEY, "vmap")


def test_what_a_parameter_does_before_it_is_used_is_seen():
    """The operation that follows is then differentiated as well, and has nobody to tell."""

    def scaled(moving, batch, key):
        return jnp.sum(linear(batch["x"] * jnp.sum(jnp.square(jax.tree.leaves(moving)[0])), moving["kernel"]), axis=1)

    batch = {"x": jnp.arange(12.0).reshape(4, 3), "weight": jnp.ones(4)}
    with pytest.raises(UserError, match="something besides the operations of models/layers.py reads kernel"):
        check_units(scaled, {"kernel": jnp.ones((3, 3))}, batch, KEY)


def test_a_use_traced_once_and_run_twice_is_no_use():
    """Its norm would be that of parts, not of their sum: it becomes NaN, and the loss says so."""
    kernel = {"kernel": jnp.ones((3, 3)) * 0.3}

    def losses(moving, batch, key):
        twice = jax.lax.scan(lambda x, _: (jnp.tanh(linear(x, moving["kernel"])), None), batch["x"], None, length=2)[0]
        return jnp.sum(twice * batch["y"], axis=1)

    batch = {"x": jnp.ones((4, 3)), "y": jnp.arange(12.0).reshape(4, 3), "weight": jnp.ones(4)}
    assert np.isfinite(clipped(losses, kernel, batch, 1.0, Clipping("vmap")).norm_GU).all()
    for name in TAPPED:
        found = clipped(losses, kernel, batch, 1.0, Clipping(name))
        assert np.isnan(found.norm_GU).all() and not np.any(found.total["kernel"])


# ----------------------------------------------------------------------------------------------------- in the step
def private_step(microbatch=None, adaptive=None, expected=8.0, rate=1.0):
    model = build(SMALL)
    gradient = private_gradient(Clipping("bookkeep"), expected, microbatch, adaptive)
    step = make_step(next_token(model), everything(), gradient, optax.chain(gaussian_noise(), optax.sgd(rate)))
    return step, step.init(KEY, {"model": model.init(KEY)})


def moved(step, start, batch, bound=0.1, multiplier=0.0):
    state, frozen = start
    after, report = jax.jit(step.update)(set_privacy(state, bound=bound, multiplier=multiplier), frozen, batch)
    return jax.tree.map(lambda a, b: np.asarray(b - a), state.trainable, after.trainable), report, after


@pytest.mark.slow
def test_microbatches_and_skipped_padding_do_not_change_the_step():
    whole, report, _ = moved(*private_step(), batch_of(rows=8, tokens=6))
    for microbatch in (1, 4):
        parts, same, _ = moved(*private_step(microbatch=microbatch), batch_of(rows=8, tokens=6))
        assert distance(parts, whole) < 1e-5
        np.testing.assert_allclose([same[n] for n in ("loss", "norm", "clipped", "units")],
                                   [report[n] for n in ("loss", "norm", "clipped", "units")], rtol=1e-5)  # fmt: skip
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch_of(rows=8, tokens=6))
    padded["weight"] = padded["weight"].at[8:].set(0.0)
    padded["tokens"] = padded["tokens"].at[12:].set(99)  # would be NaN if it were computed into the sum
    more, _, _ = moved(*private_step(microbatch=4), padded)
    assert distance(more, whole) < 1e-5


def test_noise_is_sigma_c_over_the_expected_size_whatever_the_batch():
    """Also for an empty batch; leaves, steps and keys have noise of their own, and a key gives the same again."""
    step, start = private_step(expected=16.0)
    empty = batch_of(rows=4, tokens=6) | {"weight": jnp.zeros(4)}
    full = batch_of(rows=4, tokens=6)
    quiet, report, _ = moved(step, start, full)
    noise, said, after = moved(step, start, empty, multiplier=2.0)
    assert said["units"] == 0 and said["loss"] == 0 and said["sensitivity"] == pytest.approx(0.1 / 16)
    again, _, _ = moved(step, start, full, multiplier=2.0)
    numbers = np.concatenate([x.ravel() for x in jax.tree.leaves(noise)])
    assert numbers.std() == pytest.approx(2.0 * 0.1 / 16, rel=4 / (2 * numbers.size) ** 0.5)
    assert abs(numbers.mean()) < 4 * numbers.std() / numbers.size**0.5
    same = jax.tree.map(lambda a, b, c: np.max(np.abs(a - b - c)), again, quiet, noise)
    assert max(jax.tree.leaves(same)) < 1e-6
    leaves = [x.ravel()[:8] for x in jax.tree.leaves(noise)]
    assert len({leaf.tobytes() for leaf in leaves}) == len(leaves)
    later, _, _ = moved(step, (after, start[1]), empty, multiplier=2.0)
    assert abs(np.corrcoef(numbers, np.concatenate([x.ravel() for x in jax.tree.leaves(later)]))[0, 1]) < 0.1
    assert report["sensitivity"] == said["sensitivity"]


@pytest.mark.slow
def test_adaptive_bound_follows_the_quantile():
    """C <- C exp(-rate (b - quantile)), b the noisy share of units within C of the expected number."""
    adaptive = Adaptive(quantile=0.25, rate=0.2, noise=0.0)
    step, start = private_step(adaptive=adaptive, rate=0.0)
    batch = batch_of(rows=8, tokens=6)
    _, report, after = moved(step, start, batch, bound=1e-3)
    assert report["clipped"] == 1 and after.memory.bound == pytest.approx(1e-3 * np.exp(0.2 * 0.25))
    run = jax.jit(step.update)
    state = set_privacy(start[0], bound=1e-3, multiplier=0.0)
    for _ in range(200):
        state, report = run(state, start[1], batch)
    norms, _ = one_by_one(*setting(build(SMALL), build(SMALL).init(KEY)), batch)
    assert np.sort(norms)[0] * 0.9 < state.memory.bound < np.sort(norms)[2] * 1.1
    golden = {(1.0, 10.0): 1.001252, (1.0, 1.0): 1.154701, (0.8, 5.0): 0.802572}
    assert {pair: round(adaptive_multiplier(*pair), 6) for pair in golden} == golden


@pytest.mark.slow
def test_the_adaptive_count_changes_by_half_a_unit():
    """What is released is the sum of [norm <= C] - 1/2, whose sensitivity the noise is made for."""
    adaptive = Adaptive(quantile=0.5, rate=1.0, noise=0.0)
    step, start = private_step(adaptive=adaptive, rate=0.0, expected=8.0)
    batch = batch_of(rows=8, tokens=6)
    for bound in (1e-3, 1e3):  # all beyond it, all within
        logs = []
        for weight in (jnp.ones(8), jnp.ones(8).at[3].set(0.0)):
            logs.append(float(jnp.log(moved(step, start, batch | {"weight": weight}, bound=bound)[2].memory.bound)))
        assert abs(logs[0] - logs[1]) * 8.0 == pytest.approx(0.5, abs=1e-4)


def test_divergence_shows():
    """Without a finite unit the loss is NaN, so that the loop stops; without any unit it is 0."""
    step, (state, frozen) = private_step()
    broken = state._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, state.trainable))
    assert np.isnan(jax.jit(step.update)(broken, frozen, batch_of(rows=4, tokens=6))[1]["loss"])


@pytest.mark.parametrize("settings, said", [
    ({"noise": 1.0, "groups": ("(",)}, "group pattern '\\(' is not a regular expression"),
    ({"noise": 1.0, "quantile": 1.5}, "quantile is 1.5; it must be between 0 and 1"),
    ({"noise": 1.0, "quantile": 0.5, "auto_s": True}, "quantile adapts one bound"),
], ids=lambda value: "")  # fmt: skip
def test_settings(settings, said):
    with pytest.raises(UserError, match=said):
        PrivacyConfig(**settings)


def test_noise_that_leaves_nothing_for_the_count_is_refused():
    with pytest.raises(UserError, match="noise 2 is more than the adaptive bound's count can have .* batch, 1.6"):
        adaptive_multiplier(2.0, 0.8)


@pytest.mark.slow
def test_members_of_different_levels_share_one_program():
    """Bound and noise live in the state: vmap over states is a sweep, each member as it would be alone."""
    step, (state, frozen) = private_step()
    batch = batch_of(rows=4, tokens=6)
    levels = [(0.1, 0.0), (0.5, 0.0), (0.1, 3.0)]
    states = [set_privacy(state, bound=c, multiplier=z) for c, z in levels]
    together, _ = jax.jit(jax.vmap(step.update, (0, None, None)))(stack(states), frozen, batch)
    for k, (bound, multiplier) in enumerate(levels):
        _, _, alone = moved(step, (state, frozen), batch, bound, multiplier)
        assert distance(member(together, k).trainable, jax.device_get(alone.trainable)) < 1e-6
