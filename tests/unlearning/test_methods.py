"""The seven methods of Yao et al. (arXiv 2402.15159): their formulas on closed-form logits, and shared promises."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, make_examples

from jaxforget.errors import UserError
from jaxforget.training.batches import Batches
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.objectives import kl_divergence, next_token, sequence_mean, token_logp
from jaxforget.unlearning import METHODS, Setting, choose
from jaxforget.unlearning.adversarial_samples import adversarial_labels
from jaxforget.unlearning.random_labels import random_labels

TOY = Toy()
PARAMS = TOY.init(jax.random.key(0))
SETS = {
    "forget": make_examples(8, seed=1, prefix="f"),
    "retain": make_examples(12, seed=2, prefix="r"),
    "general": make_examples(10, seed=3, prefix="g", width=6),
}
SETTING = Setting(TOY, PARAMS, SETS, rows=4, seed=0, special_ids=(0,), pad_id=0)


@dataclasses.dataclass(frozen=True)
class Table:
    """Logits 2 sin(0.7 b + 1.3 t + 0.9 v + 0.13 t v + shift): the closed form of the golden values."""

    max_length: int = 6
    vocab_size: int = 7

    def batch_logits(self, params, batch):
        b, t, v = np.ogrid[:2, :6, :7]
        return jnp.asarray(2 * np.sin(0.7 * b + 1.3 * t + 0.9 * v + 0.13 * t * v), jnp.float32) + 0 * params["zero"]

    def shifted(self, shift):
        b, t, v = np.ogrid[:2, :6, :7]
        return jnp.asarray(2 * np.sin(0.7 * b + 1.3 * t + 0.9 * v + 0.13 * t * v + shift), jnp.float32)


def text(rows, real):
    """Plain text as the released code labels it: every real token after the first is predicted."""
    tokens = np.array(rows, np.int32)
    labels = np.full_like(tokens, -100)
    for n, length in enumerate(real):
        labels[n, : length - 1] = tokens[n, 1:length]
    return tokens, labels


FORGET = text([[1, 2, 3, 4, 5, 6], [2, 1, 5, 6, 0, 0]], [6, 4])
RETAIN = text([[5, 3, 1, 2, 6, 0], [4, 5, 3, 4, 6, 0]], [5, 5])


@pytest.mark.parametrize(
    "shift, labels, expected",
    [
        (0.0, FORGET[1], [2.375147612112154, 2.0974108118434978]),
        (2.0, RETAIN[1], [2.9403064734548585, 1.7547612262482284]),
    ],
)
def test_sequence_losses_are_golden(shift, labels, expected):
    logp, scored = token_logp(Table().shifted(shift), labels)
    np.testing.assert_allclose(-sequence_mean(logp, scored), expected, rtol=1e-6)  # float32


def test_gradient_ascent_value_is_golden():
    table = Table()
    batch = {"tokens": FORGET[0], "labels": FORGET[1], "factor": np.float32([-1, -1]), "weight": np.float32([1, 1])}
    report, _ = mean_gradient()(next_token(table), {"model": {"zero": jnp.zeros((1, 1, 1))}}, batch, None)
    assert float(report["loss"]) == pytest.approx(-2.236279211977826, rel=1e-6)


def test_ascent_descent_value_is_golden():
    # The released trainer on forget sequence 0 and retain sequence 1, factors -1 and +1: -0.3101931929319628.
    forget, retain = (
        -sequence_mean(*token_logp(Table().shifted(s), labels)) for s, labels in ((0.0, FORGET[1]), (2.0, RETAIN[1]))
    )
    method = METHODS["ascent_descent_indist"]
    value = -method.forget_weight * forget[0] + method.retain_weight * retain[1]
    assert float(value) == pytest.approx(-0.3101931929319628, rel=1e-5)


def test_kl_is_golden_and_the_released_form_differs_by_the_reference_entropy():
    reference, student = Table().shifted(2.3), Table().shifted(2.0)
    scored = RETAIN[1] != -100
    kl_BT = kl_divergence(reference, student)
    assert float(kl_BT[scored].mean()) == pytest.approx(0.06117536845052944, rel=1e-5)
    p = jax.nn.softmax(reference)
    cross_BT = -(p * jnp.log(jax.nn.softmax(student) + 1e-12)).sum(-1)  # as released
    entropy_BT = -(p * jax.nn.log_softmax(reference)).sum(-1)
    np.testing.assert_allclose(cross_BT - kl_BT, entropy_BT, rtol=1e-5)
    assert float(cross_BT[scored].mean()) == pytest.approx(1.4269148474379498, rel=1e-6)


# Every method


def loss_and_gradient(name, params=PARAMS, sets=SETS, rows=4):
    recipe = METHODS[name].recipe(SETTING._replace(sets=sets, rows=rows))
    batches = Batches(recipe.streams, 1, 0)
    batch = {key: value[0] for key, value in batches.take(0, 1, 1).items()}
    rest = {"reference": PARAMS} if recipe.reference else {}

    def losses(model, batch, key):
        return recipe.objective({"model": model, **rest}, batch, key)

    return mean_gradient()(losses, params, batch, None), batch, losses


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_the_right_changes_nothing(name):
    (report, grads), _, _ = loss_and_gradient(name)
    wide = {key: examples.widen({"tokens": 13, "labels": 13}) for key, examples in SETS.items()}
    (wide_report, wide_grads), _, _ = loss_and_gradient(name, sets=wide)
    chex.assert_trees_all_close((report, grads), (wide_report, wide_grads), rtol=1e-5, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_per_example(name):
    """Permuting rows permutes losses; per-example gradients sum to the batch gradient."""
    _, batch, losses = loss_and_gradient(name)
    order = np.random.default_rng(0).permutation(len(batch["weight"]))
    permuted = {key: value[order] for key, value in batch.items()}
    np.testing.assert_allclose(losses(PARAMS, permuted, None), losses(PARAMS, batch, None)[order], rtol=1e-5, atol=1e-6)
    one = lambda example: jax.grad(lambda p: losses(p, jax.tree.map(lambda x: x[None], example), None)[0])(PARAMS)  # noqa: E731
    grads_B = jax.vmap(one)(jax.tree.map(jnp.asarray, batch))
    mean = jax.tree.map(lambda g: g.mean(axis=0), grads_B)
    (_, whole), _, _ = loss_and_gradient(name)
    chex.assert_trees_all_close(mean, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_raises_the_forget_loss(name):
    """A small step along the method's own gradient makes the forget set less likely."""
    batch = {**SETS["forget"].columns, "factor": np.ones(8, np.float32)}
    forget_loss = jax.jit(lambda p: next_token(TOY)({"model": p}, batch, None).mean())
    learned = PARAMS
    for _ in range(100):  # a model that has not learned the set has nothing to unlearn
        learned = jax.tree.map(lambda p, g: p - 0.3 * g, learned, jax.jit(jax.grad(forget_loss))(learned))
    (_, grads), _, _ = loss_and_gradient(name, params=learned, rows=8)
    stepped = jax.tree.map(lambda p, g: p - 0.02 * g, learned, grads)
    assert float(forget_loss(stepped)) > float(forget_loss(learned))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs])
def test_zero_retain_weight_leaves_scaled_ascent(name):
    method = dataclasses.replace(METHODS[name], forget_weight=1.0, retain_weight=0.0)
    recipe = method.recipe(SETTING)
    batch = {key: value[0] for key, value in Batches(recipe.streams, 1, 0).take(0, 1, 1).items()}
    parts = {"model": PARAMS, "reference": PARAMS}
    mixed = mean_gradient()(lambda m, b, k: recipe.objective({**parts, "model": m}, b, k), PARAMS, batch, None)[1]
    (_, ascent), _, _ = loss_and_gradient("gradient_ascent")
    chex.assert_trees_all_close(mixed, ascent, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["ascent_kl_indist", "ascent_kl_general"])
def test_kl_has_no_gradient_at_the_reference(name):
    method = dataclasses.replace(METHODS[name], forget_weight=0.0)
    recipe = method.recipe(SETTING)
    batch = {key: value[0] for key, value in Batches(recipe.streams, 1, 0).take(0, 1, 1).items()}
    grads = mean_gradient()(
        lambda m, b, k: recipe.objective({"model": m, "reference": PARAMS}, b, k), PARAMS, batch, None
    )[1]
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-6  # rounding of p - q


def test_ascent_is_descent_with_the_factor_turned():
    (ascent, up), batch, losses = loss_and_gradient("gradient_ascent")
    turned = dict(batch, factor=-batch["factor"])
    descent, down = mean_gradient()(losses, PARAMS, turned, None)
    assert float(ascent["loss"]) == -float(descent["loss"])
    chex.assert_trees_all_equal(up, jax.tree.map(jnp.negative, down))


def test_random_labels_are_fixed_uniform_and_keep_special_tokens():
    examples = make_examples(400, seed=4)
    labels = random_labels(examples, 11, 0, special_ids=(3,)).columns["labels"]
    again = random_labels(examples.take(np.arange(399, -1, -1)), 11, 0, special_ids=(3,)).columns["labels"][::-1]
    np.testing.assert_array_equal(labels, again)  # a draw depends on the example, not on where it stands
    true, scored = examples.columns["labels"], examples.scored
    np.testing.assert_array_equal(labels[~scored], true[~scored])
    np.testing.assert_array_equal(labels[true == 3], 3)
    drawn = labels[scored & (true != 3)]
    counts = np.bincount(drawn, minlength=11)
    expected = len(drawn) / 11
    assert ((counts - expected) ** 2 / expected).sum() < 29.6  # chi-square, 10 degrees of freedom, p = 0.001
    assert (random_labels(examples, 11, 1).columns["labels"] != random_labels(examples, 11, 0).columns["labels"]).any()


def test_adversarial_labels_are_the_best_wrong_tokens():
    examples = SETS["forget"]
    chosen = adversarial_labels(TOY, PARAMS, examples, forbidden_id=0, batch=3)
    true, scored = examples.columns["labels"], examples.scored
    assert (chosen[scored] != true[scored]).all() and (chosen[scored] != 0).all()
    logits = np.asarray(TOY.logits(PARAMS, examples.columns["tokens"])).copy()
    logits[..., 0] = -np.inf
    np.put_along_axis(logits, np.where(scored, true, 0)[..., None], -np.inf, axis=-1)
    np.testing.assert_array_equal(chosen[scored], logits.argmax(-1)[scored])
    assert (chosen[~scored] == -100).all()


def test_released_adversarial_alignment_is_another_labelling():
    examples = SETS["forget"]
    ours, released = (adversarial_labels(TOY, PARAMS, examples, released=flag) for flag in (False, True))
    assert (ours != released).any()
    # The sample from position j + 1, forbidding the token read there, supervises position j.
    logits = np.asarray(TOY.logits(PARAMS, examples.columns["tokens"])).copy()
    np.put_along_axis(logits, examples.columns["tokens"][..., None], -np.inf, axis=-1)
    best = logits.argmax(-1)
    scored = examples.scored
    np.testing.assert_array_equal(released[:, :-1][scored[:, :-1]], best[:, 1:][scored[:, :-1]])


def test_unknown_methods_are_named_with_the_valid_ones():
    with pytest.raises(UserError, match="gradient_descent.*gradient_ascent.*ascent_kl_general"):
        choose(("gradient_descent",))
    assert list(choose(("all",))) == list(METHODS) and len(METHODS) == 7
