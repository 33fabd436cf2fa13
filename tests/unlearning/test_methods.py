"""What every row of METHODS promises, and the labels that two of them draw."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from conftest import make_examples
from toys import MODEL, OTHER, PARAMS, SETS, SETTING, compiled, evaluate, first_batch, forward, mean_loss, prepared

from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.models.layers import merge
from jaxforget.training.objectives import next_token
from jaxforget.unlearning import METHODS, PAPER, check_setting, choose
from jaxforget.unlearning.adversarial_samples import adversarial_labels
from jaxforget.unlearning.random_labels import random_labels

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # a loss alone; terms of both signs cancel
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_neither_padding_on_the_right_nor_jit_changes_anything(name):
    def wide(examples):
        return examples.widen({"tokens": 13, "labels": 13})

    setting = SETTING._replace(sets={key: wide(examples) for key, examples in SETS.items()},
                               encode=lambda records: wide(toys.encode(records)))  # fmt: skip
    recipe = METHODS[name].recipe(setting)
    batch = first_batch(recipe)
    losses_B = recipe.objective({"model": OTHER, **recipe.parts}, batch, jax.random.key(1))
    np.testing.assert_allclose(mean_loss(losses_B, batch), evaluate(name)[0], **CLOSE)


@every_method
def test_what_no_label_reaches_changes_nothing(name):
    """Tokens in the padding, and all that a row of weight 0 holds: bit for bit."""
    _, batch = prepared(name)
    loss, grads = evaluate(name)
    changed = dict(batch)
    for kind in ("", "preferred_"):
        if f"{kind}tokens" in batch:
            scored_BT = batch[f"{kind}labels"] != IGNORED
            after_BT = np.cumsum(scored_BT[:, ::-1], axis=1)[:, ::-1] == 0  # no label from here on
            after_BT[:, 1:] &= after_BT[:, :-1]  # the last labelled token itself stands one further
            changed[f"{kind}tokens"] = np.where(after_BT, 7, batch[f"{kind}tokens"])
    assert (changed["tokens"] != batch["tokens"]).any()
    chex.assert_trees_all_equal(evaluate(name, batch=changed), (loss, grads))

    without = {**batch, "weight": batch["weight"] * (np.arange(len(batch["weight"])) % 4 != 1)}
    absurd = dict(without)
    for column in ("reference_logp", "preferred_reference_logp"):
        if column in batch:
            absurd[column] = np.where(without["weight"] > 0, batch[column], 1e30).astype(np.float32)
    absurd["tokens"] = np.where(without["weight"][:, None] > 0, batch["tokens"], 9)
    chex.assert_trees_all_equal(evaluate(name, batch=absurd), evaluate(name, batch=without))


@every_method
def test_losses_are_per_example(name):
    """The order of rows does not matter, and rows that weigh twice count as if they stood there twice."""
    _, batch = prepared(name)
    order = np.random.default_rng(0).permutation(len(batch["weight"]))
    permuted = {key: value[order] for key, value in batch.items()}
    chex.assert_trees_all_close(evaluate(name, batch=permuted), evaluate(name), **ROUNDING)
    one, other = (dict(batch, weight=batch["weight"] * (np.arange(len(order)) % 2 == rest)) for rest in (0, 1))
    shares = [half["weight"].sum() / batch["weight"].sum() for half in (one, other)]
    halves = [jax.tree.map(lambda x, share=share: x * share, evaluate(name, batch=half))
              for half, share in zip((one, other), shares, strict=True)]  # fmt: skip
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *halves), evaluate(name), **ROUNDING)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs])
def test_micro_batches_of_one_stream_change_nothing(name):
    recipe, batch = prepared(name)
    whole_B = forward(recipe.objective)(OTHER, dict(recipe.parts), batch)
    for stream in (0, 1):
        part = {key: value[batch["stream"] == stream] for key, value in batch.items()}
        losses_B = forward(recipe.objective)(OTHER, dict(recipe.parts), part)
        np.testing.assert_allclose(losses_B, whole_B[batch["stream"] == stream], **CLOSE)


@every_method
def test_members_change_nothing(name):
    recipe, batch = prepared(name)
    both = jax.tree.map(lambda *x: jnp.stack(x), PARAMS, OTHER)
    losses_KB = forward(recipe.objective, "members")(both, dict(recipe.parts), batch)
    for losses_B, params in zip(losses_KB, (PARAMS, OTHER), strict=True):
        np.testing.assert_allclose(mean_loss(losses_B, batch), evaluate(name, params)[0], **CLOSE)


@every_method
@pytest.mark.parametrize("how", toys.MOVING)
def test_adapters_and_sparse_differences_take_any_method(name, how):
    """A model with a moved part has the loss of the same parameters written out."""
    recipe, batch = prepared(name)
    model, written_out = _moved(how)
    losses_B = forward(recipe.objective)(model, dict(recipe.parts), batch)
    np.testing.assert_allclose(mean_loss(losses_B, batch), evaluate(name, written_out)[0], **CLOSE)


@functools.cache
def _moved(how):
    """Return a model of which some has moved, as a step sees it, and the same without adapters."""
    trainable = toys.MOVING[how]
    moving, frozen = trainable.init(jax.random.key(5), {"model": OTHER, "other": {"x": np.float32(1)}})
    moved = jax.tree.map(lambda x: x + 0.3 * np.cos(np.arange(x.size).reshape(x.shape)).astype(np.float32), moving)
    parts = trainable.combine(frozen, moved, jax.random.key(0))
    assert parts["other"] == {"x": 1.0}
    written_out = jax.tree.map(np.asarray, merge(parts["model"]))
    assert not np.allclose(written_out["blocks"]["mix"]["kernel"], OTHER["blocks"]["mix"]["kernel"])
    return parts["model"], written_out


@pytest.fixture(scope="module")
def learned():
    """The model once it knows the forget set: one that does not has nothing to unlearn."""
    batch = {**SETS["forget"].columns, "factor": np.ones(8, np.float32), "key": 0}

    def loss(params):
        return next_token(MODEL)({"model": params}, batch, None).mean()

    def down(_, params):
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))

    params = jax.jit(lambda params: jax.lax.fori_loop(0, 150, down, params))(PARAMS)
    return jax.tree.map(np.asarray, params), jax.jit(loss)


# Distillation towards refusals and towards flat or random states says nothing about the first step.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("idk_nll", "rmu", "pdu")])
def test_the_first_step_raises_the_forget_loss(name, learned):
    params, loss = learned
    recipe = METHODS[name].recipe(SETTING._replace(params=params))
    _, grads = compiled(recipe.objective)(params, dict(recipe.parts), first_batch(recipe))
    size = 0.05 / max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    stepped = jax.tree.map(lambda p, g: p - size * g, params, grads)
    if recipe.finish:
        stepped = recipe.finish({"model": stepped, **recipe.parts})
    assert float(loss(stepped)) > float(loss(params)) + 1e-4


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs])
def test_an_empty_retain_set_is_refused(name):
    method = METHODS[name]
    sets = {**SETS, method.needs[0]: SETS["retain"].take([])}
    with pytest.raises(UserError, match="^(the retain set|the general set|a training set) is empty[^.]*$"):
        toys.Batches(method.recipe(SETTING._replace(sets=sets)).streams, 1, 0)
    with pytest.raises(UserError, match=f"^method {name} needs --{method.needs[0]}$"):
        check_setting(method, name, SETTING._replace(sets={"forget": SETS["forget"]}))


def test_groups_leave_out_what_lacks_a_set_and_names_do_not():
    """A forget and a retain file are enough for a run of the paper's methods."""
    told = []
    general = ("ascent_descent_general", "ascent_kl_general")
    assert tuple(choose(["paper"], ["forget", "retain"], told.append)) == tuple(n for n in PAPER if n not in general)
    assert told == [f"left out, since they need --general: {', '.join(general)}"]
    assert not [name for name, method in choose(["all"], ["forget"], told.append).items() if method.needs]
    assert len(told) == 3 and "--retain: ascent_descent_indist, " in told[2]
    told.clear()
    assert general[0] in choose(["paper", general[0]], ["forget", "retain"], told.append)
    assert told == [f"left out, since they need --general: {general[1]}"]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if hasattr(method, "retain_weight")])
def test_weights_of_0_leave_the_other_term(name):
    """L(w_f, w_r) = w_f L(1, 0) + w_r L(0, 1)."""
    results = []
    for forget, retain in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        method = dataclasses.replace(METHODS[name], forget_weight=forget, retain_weight=retain)
        if name == "pdu":
            method = dataclasses.replace(method, epsilon=0.25)
        recipe = method.recipe(SETTING)
        assert len(recipe.streams) == (1 if not method.needs else 2)
        batch = first_batch(recipe)
        results.append(mean_loss(forward(recipe.objective)(OTHER, dict(recipe.parts), batch), batch))
    assert results[2] == pytest.approx(2.0 * results[0] + 3.0 * results[1], rel=1e-5)


@pytest.mark.parametrize("name", ["ascent_kl_indist", "ascent_kl_general"])
def test_kl_has_no_gradient_at_the_reference(name):
    recipe = dataclasses.replace(METHODS[name], forget_weight=0.0).recipe(SETTING)
    _, grads = compiled(recipe.objective)(PARAMS, dict(recipe.parts), first_batch(recipe))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-6  # rounding of p - q


def test_ascent_is_descent_with_the_factor_turned():
    _, batch = prepared("gradient_ascent")
    ascent, up = evaluate("gradient_ascent")
    descent, down = evaluate("gradient_ascent", batch=dict(batch, factor=-batch["factor"]))
    assert float(ascent) == -float(descent)
    chex.assert_trees_all_equal(up, jax.tree.map(jnp.negative, down))


# ---------------------------------------------------------------------------------------------------- labels
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
    chosen = adversarial_labels(MODEL, PARAMS, examples, forbidden_id=0, batch=3)
    true, scored = examples.columns["labels"], examples.scored
    assert (chosen[scored] != true[scored]).all() and (chosen[scored] != 0).all()
    logits = np.asarray(MODEL.batch_logits(PARAMS, examples.columns)).copy()
    logits[..., 0] = -np.inf
    np.put_along_axis(logits, np.where(scored, true, 0)[..., None], -np.inf, axis=-1)
    np.testing.assert_array_equal(chosen[scored], logits.argmax(-1)[scored])
    assert (chosen[~scored] == IGNORED).all()


def test_released_adversarial_alignment_is_another_labelling():
    examples = SETS["forget"]
    ours, released = (adversarial_labels(MODEL, PARAMS, examples, released=flag) for flag in (False, True))
    assert (ours != released).any()
    # The sample from position j + 1, forbidding the token read there, supervises position j.
    logits = np.asarray(MODEL.batch_logits(PARAMS, examples.columns)).copy()
    np.put_along_axis(logits, examples.columns["tokens"][..., None], -np.inf, axis=-1)
    best = logits.argmax(-1)
    scored = examples.scored
    np.testing.assert_array_equal(released[:, :-1][scored[:, :-1]], best[:, 1:][scored[:, :-1]])


# --------------------------------------------------------------------------------------------------- choosing
def test_methods_are_chosen_by_name():
    with pytest.raises(UserError, match="gradient_descent.*all, paper, gradient_ascent.*ascent_kl_general"):
        choose(("gradient_descent",))
    assert list(choose(("all",))) == list(METHODS)
    assert tuple(choose(("paper",))) == PAPER and len(PAPER) == 7 and "npo" not in PAPER
    assert list(choose(("npo", "paper"))) == ["npo", *PAPER]


@pytest.mark.parametrize("name, change, words", [
    ("npo", {"beta": 0.0}, "beta is 0.0; it must be above 0"),
    ("wga", {"beta": -1.0}, "beta is -1.0; it must be at least 0"),
    ("simnpo", {"retain_weight": -1.0}, "retain_weight is -1.0"),
    ("undial", {"retain_loss": "activations"}, "retain_loss is 'activations'; use one of nll, kl"),
    ("rmu", {"retain_loss": "all"}, "use one of activations, nll, kl"),
    ("dpo", {"prefer": "refuse"}, "use one of field, refusal, generated"),
    ("npo", {"retain_set": "approximate"}, "use one of retain, general"),
    ("pdu", {"retain_loss": "kl"}, "epsilon is 0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(name, change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(METHODS[name], **change)


def test_settings_that_do_not_fit_are_refused():
    for name, change, setting, words in [
        ("rmu", {"layer": 2}, SETTING, "method rmu: layer is 2; the model has blocks 0 to 1"),
        ("ceu", {"skip": 9}, SETTING, "method ceu: no forget example has more than skip = 9 scored tokens"),
        ("dpo", {"field": "other"}, SETTING, "method dpo: .* forget record 'f0' has no text in field 'other'"),
        ("idk_nll", {}, SETTING._replace(records=[dataclasses.replace(toys.RECORDS[0], prompt=None)]),
         "method idk_nll: needs questions and answers, but forget record 'f0' is plain text"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_setting(dataclasses.replace(METHODS[name], **change), name, setting)
