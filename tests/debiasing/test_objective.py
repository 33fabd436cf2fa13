"""Removal losses and regimes: who gets which gradient, and that modules train beside each other or by themselves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from classifiers import FAMILIES_OF, classifier, examples, toy

from jaxforget.debiasing.differences import fixed, gated, layout_of, sparse
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.objective import RemovalConfig, debiasing, draw_adversaries, nll, over_members
from jaxforget.debiasing.optimizer import grouped, module_groups
from jaxforget.debiasing.removal import REMOVALS, adversarial, information, mmd, reverse
from jaxforget.errors import UserError
from jaxforget.metrics.leakage_heads import draw_heads, head_logp
from jaxforget.privacy.clipping import Clipping, clipped_sum
from jaxforget.privacy.noise import gaussian_noise, private_gradient, set_privacy
from jaxforget.training.batches import Batches, Stream
from jaxforget.training.ensemble import member, members, stack
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.optimizer import OptimizerConfig, set_schedule
from jaxforget.training.step import make_run, make_step
from jaxforget.training.trainable import subset

MODEL, PARAMS = toy()
LAYOUT = layout_of(MODEL)
GATES = GateConfig()
KEY = jax.random.key(3)
SHARES = [jnp.asarray([0.5, 0.5]), jnp.asarray([0.25, 0.75])]
OPTIMIZER = OptimizerConfig(schedule="constant", warmup=0.0)
ADVERSARIES = RemovalConfig()
each_removal = pytest.mark.parametrize("name", REMOVALS)


def parts_of(config=ADVERSARIES, attributes=2):
    heads = draw_adversaries(jax.random.key(9), config, 16, SHARES[:attributes])
    return {"model": PARAMS, "adversary": heads, "shares": SHARES[:attributes]}


def batch_of(count=16, seed=0):
    batches = Batches((Stream(examples(count, seed), count),), 1, 0)
    return {name: jnp.asarray(column[0]) for name, column in batches.take(0, 1, 1).items()}


def step_of(objective, trainable, modules, gradient=None, noise=None):
    optimizer = grouped(module_groups(modules, gate_rate=5.0, adversary_rate=1.0, core_rate=1.0), OPTIMIZER)
    optimizer = optax.chain(noise, optimizer) if noise else optimizer
    return make_step(objective, trainable, gradient or mean_gradient(), optimizer)


def train(step, parts, batches, key=KEY, steps=12, prepare=lambda state: state):
    state, frozen = jax.jit(step.init)(key, parts)
    state = prepare(set_schedule(state, learning_rate=0.01, total=steps))
    state, metrics = make_run(step)(state, frozen, batches.take(0, steps, steps), steps)
    return jax.jit(step.combine)(frozen, state.trainable), state, metrics


@pytest.mark.parametrize("name", ["small", *FAMILIES_OF])
def test_the_pooled_state_and_the_head_are_the_model(name):
    model, params = classifier(name)
    batch = batch_of(6) | {"length": jnp.asarray([8, 5, 3, 8, 1, 2])}
    x_BD = jax.jit(model.pooled)(params, batch)
    assert x_BD.shape == (6, 16)
    np.testing.assert_allclose(model.classify(params, x_BD), jax.jit(model.batch_logits)(params, batch), rtol=1e-6,
                               atol=1e-6)  # fmt: skip


# ----------------------------------------------------------------------------------------------- removals


def test_reversal_is_the_identity_forward_and_scaled_back():
    value, grad = jax.value_and_grad(lambda x: jnp.sum(reverse(x, 0.7) ** 2))(jnp.asarray([1.0, -2.0]))
    assert float(value) == 5.0
    np.testing.assert_allclose(grad, [-1.4, 2.8], rtol=1e-6)


def random_case(count=10, classes=3):
    rng = np.random.default_rng(0)
    x_BD = jnp.asarray(rng.normal(size=(count, 16)), jnp.float32)
    heads = draw_heads(KEY, 5, 16, classes)
    return x_BD, jnp.asarray(rng.integers(0, classes, count)), jnp.ones(count), heads


def test_adversaries_descend_what_the_representation_climbs():
    x_BD, y_B, w_B, heads = random_case()

    def plain(x, heads):
        return -jnp.mean(jnp.take_along_axis(head_logp(heads, x, KEY), y_B[None, :, None], 2)[..., 0], axis=0).sum()

    expected = jax.jit(jax.grad(plain, (0, 1)))(x_BD, heads)
    found = jax.jit(jax.grad(lambda x, heads: adversarial(x, y_B, w_B, heads, 2.0, KEY).sum(), (0, 1)))(x_BD, heads)
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[0], -2.0 * expected[0], rtol=1e-5, atol=1e-7)


def test_information_is_zero_where_heads_cannot_tell_and_bounded_by_log_classes():
    x_BD, y_B, w_B, heads = random_case()
    blind = jax.tree.map(jnp.zeros_like, heads)
    np.testing.assert_allclose(information(x_BD, y_B, w_B, blind, 1.0, KEY), np.log(3), rtol=1e-6)  # the heads' loss
    sure = jax.tree.map(lambda x: 100.0 * x, heads)
    one = jax.jit(lambda scale: information(x_BD, y_B, w_B, sure, scale, None))
    both = one(1.0) - one(0.0)
    assert (both >= 0).all() and (both <= np.log(3) + 1e-5).all() and both.max() > 0.9

    both_sides = jax.jit(jax.grad(lambda x, h, scale: information(x, y_B, w_B, h, scale, KEY).sum(), (0, 1)))
    (still, learning), (moved, same) = both_sides(x_BD, heads, 0.0), both_sides(x_BD, heads, 3.0)
    assert float(jnp.abs(still).max()) == 0 and float(jnp.abs(moved).max()) > 0
    chex.assert_trees_all_equal(learning, same)  # heads learn to predict, whatever the model wants


def test_information_counts_classes_alike():
    """A class that is a quarter of the rows weighs as much in what heads see as the other."""
    x_BD, _, _, heads = random_case(16, classes=2)
    y_B = jnp.asarray([0] * 4 + [1] * 12)
    w_B = 1 / (2 * jnp.where(y_B == 0, 0.25, 0.75))
    seen_B = information(x_BD, y_B, w_B, heads, 1.0, None) - information(x_BD, y_B, w_B, heads, 0.0, None)
    p_HBC = np.exp(np.asarray(head_logp(heads, x_BD), np.float64))
    kl_B = (p_HBC * np.log(2 * p_HBC)).sum(-1).mean(0)
    assert float(seen_B.mean()) == pytest.approx((kl_B[:4].mean() + kl_B[4:].mean()) / 2, rel=1e-4)


def test_mmd_by_pairs():
    x_BD, y_B, w_B, heads = random_case(12)
    x, y = np.asarray(x_BD, np.float64), np.asarray(y_B)
    square = ((x[:, None] - x[None]) ** 2).sum(-1)
    median = np.median(square[~np.eye(len(x), dtype=bool)])
    kernel = sum(np.exp(-square / (2 * f * median)) for f in (0.25, 0.5, 1, 2, 4))
    mean = lambda a, b: kernel[np.ix_(y == a, y == b)].mean()  # noqa: E731
    expected = sum(mean(a, a) + mean(b, b) - 2 * mean(a, b) for a in range(3) for b in range(a + 1, 3))
    distance = jax.jit(lambda x, y, scale: mmd(x, y, jnp.ones(len(y)), heads, scale, KEY))
    np.testing.assert_allclose(distance(x_BD, y_B, 2.0), 2 * expected, rtol=1e-4)
    twice, same = x_BD[:2].repeat(2, 0), jnp.tile(x_BD[:2], (2, 1))
    one, other = (distance(twice, jnp.asarray(y), 1.0) for y in ([0, 1, 0, 1], [1, 0, 1, 0]))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(distance(same, jnp.asarray([0, 0, 1, 1]), 1.0), 0, atol=1e-6)  # the same two rows
    np.testing.assert_array_equal(distance(x_BD[:3], jnp.asarray([0, 0, 1]), 1.0), 0)  # one row of a class


@each_removal
def test_rows_of_unknown_attribute_teach_the_task_alone(name):
    config = RemovalConfig(removal=name)
    objective = jax.jit(debiasing(MODEL, config, ((0,),), gates=None))
    logits = jax.jit(MODEL.batch_logits)
    parts, batch = parts_of(config), batch_of(16)
    half = batch | {"attributes": batch["attributes"].at[:8].set(-1)}
    found = objective(parts, half, KEY)
    task = nll(logits(PARAMS, batch), batch["label"])
    if not REMOVALS[name].couples:
        np.testing.assert_allclose(found[:8], task[:8], rtol=1e-6)
        np.testing.assert_allclose(found[8:], objective(parts, batch, KEY)[8:], rtol=1e-5)

    def gradient(rows):
        changed = half | {"tokens": half["tokens"].at[rows].set(9)}
        return objective(parts, changed, KEY)[8:] - nll(logits(PARAMS, changed), batch["label"])[8:]

    np.testing.assert_allclose(gradient(slice(0, 8)), gradient(slice(0, 0)), atol=1e-6)


def test_padding_changes_no_row():
    """The last batch of an epoch repeats a row with weight 0, which must not count where rows are compared."""
    config = RemovalConfig(removal="mmd")
    objective = jax.jit(debiasing(MODEL, config, ((0,),), gates=None))
    batch = batch_of(8)
    padded = {n: jnp.concatenate([x, jnp.broadcast_to(x[:1], (24, *x.shape[1:]))]) for n, x in batch.items()}
    padded["weight"] = padded["weight"].at[8:].set(0.0)
    parts = parts_of(config)
    np.testing.assert_allclose(objective(parts, padded, KEY)[:8], objective(parts, batch, KEY), rtol=1e-5)


@each_removal
def test_what_couples_rows_says_so(name):
    config = RemovalConfig(removal=name)
    objective = jax.jit(debiasing(MODEL, config, ((0,),), gates=None))
    batch = batch_of() | {"attributes": jnp.asarray([[0, 0], [1, 1]] * 8)}
    others = {n: x.at[2:].set(x[2:][::-1]) if n == "attributes" else x for n, x in batch.items()}
    among = [float(objective(parts_of(config), rows, KEY)[0]) for rows in (batch, others)]
    assert (abs(among[0] - among[1]) > 1e-6) == REMOVALS[name].couples


def test_classes_weigh_alike():
    """A head that knows nothing but the class sizes gains nothing: its gradient over a balanced loss is 0."""
    parts = parts_of() | {"adversary": jax.tree.map(jnp.zeros_like, parts_of()["adversary"])}
    batch = batch_of(16) | {"attributes": jnp.asarray([[0, 0]] * 4 + [[0, 1]] * 12)}  # attribute 1: 4 and 12 of 16
    objective = debiasing(MODEL, RemovalConfig(), ((1,),), gates=None)
    grads = jax.jit(jax.grad(lambda parts: objective(parts, batch, KEY).sum()))(parts)["adversary"]
    np.testing.assert_allclose(grads[1]["down"]["bias"], 0, atol=1e-5)
    chex.assert_trees_all_equal(grads[0], jax.tree.map(jnp.zeros_like, grads[0]))  # not its attribute


@pytest.mark.parametrize("setting", [{"scale": -1.0}, {"heads": 0}, {"sparsity": -0.1}, {"removal": "wishes"}])
def test_settings_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        RemovalConfig(**setting)


# ------------------------------------------------------------------------------------------------ regimes


def gradients(objective, trainable, parts, batch):
    moving, frozen = trainable.init(KEY, parts)
    return jax.jit(jax.grad(lambda moving: objective(trainable.combine(frozen, moving, KEY), batch, KEY).sum()))(moving)


@pytest.mark.parametrize("head", [True, False], ids=["shared head", "frozen head"])
def test_a_core_beside_its_modules_learns_its_own_loss_alone(head):
    trainable = gated(LAYOUT, GATES, 2, ("model/.*", "adversary/.*"), head=head)
    objective = debiasing(MODEL, RemovalConfig(), ((0,), (1,)), core=True, gates=GATES)
    batch = batch_of()
    found = gradients(objective, trainable, parts_of(), batch)
    task = jax.jit(jax.grad(lambda params: nll(MODEL.batch_logits(params, batch), batch["label"]).sum()))(PARAMS)
    backbone = {name: part for name, part in task.items() if name not in ("pool", "score")}
    chex.assert_trees_all_close({n: found["model"][n] for n in backbone}, backbone, rtol=1e-4, atol=1e-6)
    # The modules start at 0, so each adds one more gradient of the same loss to a shared head.
    times = 3.0 if head else 1.0
    chex.assert_trees_all_close(found["model"]["score"], jax.tree.map(lambda x: times * x, task["score"]), rtol=1e-4,
                                atol=1e-6)  # fmt: skip
    assert all(float(jnp.abs(module["w"]).max()) > 0 for module in found["modules"])


def test_one_module_for_both_attributes_and_the_whole_model():
    batch = batch_of()
    objective = debiasing(MODEL, RemovalConfig(), ((0, 1),), gates=None)
    merged = gradients(objective, gated(LAYOUT, GATES, 1, ("adversary/.*",)), parts_of(), batch)
    assert all(float(jnp.abs(heads["down"]["bias"]).max()) > 0 for heads in merged["adversary"])
    whole = jax.jit(jax.grad(lambda parts: objective(parts, batch, KEY).sum()))(parts_of())
    assert float(jnp.abs(whole["model"]["score"]["kernel"]).max()) > 0


@pytest.mark.slow
def test_modules_of_two_attributes_train_side_by_side_over_a_frozen_core():
    """As members of one program, each with its attribute in the batch; as if trained alone, bit for bit under map."""
    step = step_of(
        debiasing(MODEL, RemovalConfig(), ((0,),), gates=GATES), gated(LAYOUT, GATES, 1, ("adversary/.*",)), 1
    )
    batches = Batches((Stream(examples(), 32),), 8, 0)

    def only(j, stacked):
        return stacked | {"attributes": stacked["attributes"][..., j : j + 1]}

    parts = parts_of(attributes=1)
    alone = [jax.jit(step.init)(jax.random.fold_in(KEY, j), parts) for j in range(2)]
    taken = batches.take(0, 6, 6)
    both = stack([only(j, taken) for j in range(2)])
    run = make_run(members(step, "map"))
    after, _ = run(stack([state for state, _ in alone]), alone[0][1], both, np.asarray([6, 6], np.int32))
    for j, (state, frozen) in enumerate(alone):
        expected, _ = make_run(step)(state, frozen, only(j, taken), 6)
        chex.assert_trees_all_equal(member(after.trainable, j), expected.trainable)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["map", "vmap"])
def test_members_with_cores_of_their_own(how):
    """Seeds whose cores and places differ, in one program."""
    step = step_of(debiasing(MODEL, RemovalConfig(), ((0,),), gates=None), fixed(LAYOUT, 1, ("adversary/.*",)), 1)
    taken = Batches((Stream(examples(), 32),), 8, 0).take(0, 4, 4)
    rng = np.random.default_rng(0)
    parts = [
        parts_of(attributes=1) | {"model": toy(s)[1],
                                  "modules": [sparse(0.01 * rng.normal(size=LAYOUT.size), 0.02)]}
        for s in (1, 2)
    ]  # fmt: skip
    own = ("model", "modules")
    together = {**parts[0], **{name: stack([one[name] for one in parts]) for name in own}}
    lifted = members(step, how, own)
    keys = jax.random.split(KEY, 2)
    state, frozen = jax.jit(lifted.init)(keys, together)
    state = set_schedule(state, learning_rate=np.full(2, 0.01, np.float32), total=np.full(2, 4))
    after, _ = make_run(lifted)(state, frozen, stack([taken, taken]), np.asarray([4, 4], np.int32))
    joined = jax.jit(lifted.combine)(frozen, after.trainable)
    for k, one in enumerate(parts):
        expected, _, _ = train(step, one, Batches((Stream(examples(), 32),), 8, 0), keys[k], 4)
        # Where a gradient is 0 but for rounding, as of a key's bias, Adam makes steps of it.
        tolerance = {"atol": 0.0 if how == "map" else 1e-3, "rtol": 0.0}
        chex.assert_trees_all_close(member(joined["on"], k), expected["on"], **tolerance)


def leaking(params, seed=5):
    """Share of the attribute's classes that the nearest class mean tells, on rows that were not trained on."""
    pooled = jax.jit(MODEL.pooled)
    found = [(pooled(params, dict(rows.columns)), rows.columns["attributes"][:, 0])
             for rows in (examples(400, seed), examples(400, seed + 1))]  # fmt: skip
    (x, y), (test_x, test_y) = found
    mean_CD = jnp.stack([x[y == c].mean(axis=0) for c in (0, 1)])
    told = jnp.argmin(((test_x[:, None] - mean_CD[None]) ** 2).sum(-1), axis=1)
    return float(np.mean([(np.asarray(told)[test_y == c] == c).mean() for c in (0, 1)]))


@pytest.fixture(scope="module")
def leaky():
    """A core that was trained to tell the attribute and the class."""

    def tells(parts, batch, key):
        x_BD = MODEL.pooled(parts["model"], batch)
        task_B = nll(MODEL.classify(parts["model"], x_BD), batch["label"])
        return task_B + nll(x_BD[:, :2], batch["attributes"][:, 0])

    batches = Batches((Stream(examples(400), 50),), 40, 0)
    parts, _, _ = train(step_of(tells, subset("model/.*"), 1), parts_of(), batches, steps=160)
    return jax.tree.map(np.asarray, parts["model"])


def test_a_module_takes_out_what_the_core_tells_and_keeps_the_task(leaky):
    assert leaking(leaky) > 0.85  # an attribute that is told right in nine of ten rows
    rows = Batches((Stream(examples(400), 50),), 40, 0)
    config = RemovalConfig(removal="information", scale=3.0)
    step = step_of(debiasing(MODEL, config, ((0,),), gates=GATES), gated(LAYOUT, GATES, 1, ("adversary/.*",)), 1)
    parts, state, _ = train(step, parts_of() | {"model": leaky}, rows, steps=240)
    chex.assert_trees_all_equal(parts["model"], leaky)  # the core, head included, is what it was
    on = parts["on"][0]
    held_out = dict(examples(400, 7).columns)
    logits = jax.jit(MODEL.batch_logits)
    accuracy = [float((logits(p, held_out).argmax(-1) == held_out["label"]).mean()) for p in (leaky, on)]
    assert leaking(on) < 0.65 and accuracy[1] > accuracy[0] - 0.05, (leaking(on), accuracy)


# --------------------------------------------------------------------------- with ensembles and with privacy


def test_a_module_shared_by_an_ensemble():
    """One member is the plain objective; of several the difference is one, and every one gets better."""
    plain = debiasing(MODEL, RemovalConfig(), ((0,),), gates=GATES)
    trainable = gated(LAYOUT, GATES, 1, ("adversary/.*",))
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], {n: parts_of()[n] for n in ("model", "adversary")})
    found = gradients(over_members(plain), trainable, parts_of() | one, batch_of())
    expected = gradients(plain, trainable, parts_of(), batch_of())
    chex.assert_trees_all_close(found["modules"], expected["modules"], rtol=1e-4, atol=1e-6)
    cores = stack([toy(s)[1] for s in (1, 2, 3)])
    task = over_members(debiasing(MODEL, RemovalConfig(), ((),), gates=GATES))
    batches = Batches((Stream(examples(), 32),), 8, 0)
    parts, state, metrics = train(step_of(task, gated(LAYOUT, GATES), 1), {"model": cores}, batches, steps=24)
    assert state.trainable["modules"][0]["w"].shape == (LAYOUT.size,)
    chex.assert_trees_all_equal(parts["model"], cores)
    assert float(metrics["loss"][-4:].mean()) < float(metrics["loss"][:4].mean())


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["gated", "fixed"])
def test_a_module_trained_with_privacy(phase):
    """The clipped sum of modules and adversaries together is bounded, and noise moves only what is kept."""
    gates = GATES if phase == "gated" else None
    objective = debiasing(MODEL, RemovalConfig(), ((0,),), gates=gates)
    others = ("adversary/.*",)
    trainable = gated(LAYOUT, GATES, 1, others) if gates else fixed(LAYOUT, 1, others)
    kept = sparse(np.random.default_rng(0).normal(size=LAYOUT.size), 0.05)
    parts = parts_of() | ({} if gates else {"modules": [kept]})
    how = Clipping("vmap")
    moving, frozen = trainable.init(KEY, parts)

    def losses(moving, batch, key):
        return objective(trainable.combine(frozen, moving, key), batch, key)

    total = clipped_sum(losses, moving, batch_of(), KEY, jnp.float32(0.5), how)
    assert float(optax.tree.norm(total.total)) <= 16 * 0.5 + 1e-4 and bool((total.norm_GU > 0.5).any())
    step = step_of(objective, trainable, 1, private_gradient(how, 32.0), gaussian_noise())
    batches = Batches((Stream(examples(), 32),), 4, 0)
    after, _, metrics = train(step, parts, batches, prepare=functools.partial(set_privacy, bound=0.5, multiplier=0.5))
    assert bool(jnp.isfinite(metrics["loss"]).all())
    chex.assert_trees_all_equal(after["model"], PARAMS)
    if not gates:
        moved = LAYOUT.add(jax.tree.map(jnp.zeros_like, PARAMS), jnp.zeros(LAYOUT.size).at[kept["place"]].set(1.0))
        chex.assert_trees_all_equal(
            jax.tree.map(lambda on, base, may: bool(((on == base) | (may == 1)).all()), after["on"][0], PARAMS, moved),
            jax.tree.map(lambda _: True, moved),
        )
