"""UnTrac and UnTrac-Inv: closed forms, identities, and independence of everything that must not matter."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import make_examples
from worlds import GOLDEN, TOY, quadratic_question, toy_question

from jaxforget.data.tokens import IGNORED, concatenate
from jaxforget.errors import UserError
from jaxforget.influence.losses import set_losses
from jaxforget.influence.optimizers import SCALINGS
from jaxforget.influence.untrac import UnTrac, UnTracInv, answers
from jaxforget.models.sharding import make_mesh
from jaxforget.training.objectives import next_token, next_token_with_kl

golden = pytest.mark.skipif(GOLDEN is None, reason="the golden file is not beside the checkout")


@pytest.fixture
def doubles():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------- closed forms
@golden
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_quadratic_world(optimizer, steps, doubles):
    settings = {"optimizer": optimizer, "learning_rate": 0.05}
    question, scores = quadratic_question(), GOLDEN["quadratic_world"]["scores[k][q]"]
    methods = {"untrac": UnTrac(epochs=steps, **settings), "untrac_inv": UnTracInv(steps=steps, **settings)}
    for name, method in methods.items():
        expected = np.array(scores[f"{name}_{optimizer}_lr0.05_T{steps}"])
        found = method.answer(question)
        np.testing.assert_allclose(found.scores_KQ, expected, atol=1e-8, rtol=0)
        assert found.notes == () and np.isnan(found.curves["collapsed_at"]).all()


@golden
def test_small_steps_approach_products_of_gradients(doubles):
    """Identity 1: UnTrac and Inv coincide with GradDot, and are odd in the rate."""
    question, scores = quadratic_question(), GOLDEN["quadratic_world"]["scores[k][q]"]
    graddot = np.array(scores["graddot"])
    tiny = np.array(scores["untrac_sgd_lr1e-6_T1_divided_by_lr"])
    for method in (UnTrac(optimizer="sgd"), UnTracInv(optimizer="sgd", steps=1)):
        smallest, small = answers(method, question, (1e-6, 1e-3))
        np.testing.assert_allclose(smallest.scores_KQ / 1e-6, graddot, atol=1e-5)
        np.testing.assert_allclose(small.scores_KQ / 1e-3, graddot, rtol=3e-3)
        if isinstance(method, UnTrac):
            np.testing.assert_allclose(smallest.scores_KQ / 1e-6, tiny, atol=1e-8)


def gradient(question, examples):
    """Differentiate the mean loss over the tokens of a set, without batches."""
    count_N = (examples.columns["labels"] != IGNORED).sum(axis=1)

    def loss(model):
        batch = {**examples.columns, "factor": np.ones(len(examples))}
        batch.pop("key")
        return question.objective({"model": model}, batch, None) @ count_N / count_N.sum()

    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(question.parts["model"]))])


def products(question):
    """Give <g_k, g_q>."""
    train, queries = (
        np.stack([gradient(question, one) for one in sets.values()]) for sets in (question.train, question.queries)
    )
    return train @ queries.T


def test_one_full_batch_step_is_a_product_of_gradients():
    """On a language model whose sets differ in size and length: the loss of a set is a mean over its tokens."""
    question = toy_question()
    expected = products(question)
    for method in (UnTrac(optimizer="sgd", batch_size=8), UnTracInv(optimizer="sgd", steps=1)):
        up, down = answers(method, question, (1e-3, 0.0))
        np.testing.assert_allclose(up.scores_KQ / 1e-3, expected, rtol=0.05, atol=0.02 * np.abs(expected).max())
        assert not down.scores_KQ.any()  # nothing moves at rate 0


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_one_pass_of_small_steps_is_proportional_to_graddot(batch_size):
    """Identity 4, for equal lengths: of whatever batches an epoch is made."""
    same = [make_examples(8, seed=s, prefix=f"{s}-", width=6) for s in range(6)]
    for examples in same:  # equal lengths, so that means over tokens and over examples agree
        examples.columns["labels"][:, :3] = 1 + np.arange(24).reshape(8, 3) % 10
        examples.columns["labels"][:, 3:] = IGNORED
    question = toy_question()
    train = {f"t{k}": one for k, one in enumerate(same[:4])}
    question = dataclasses.replace(question, train=train, queries={"q0": same[4], "q1": same[5]})
    dots = products(question)
    rate = 1e-3 * batch_size / 8
    scores = UnTrac(optimizer="sgd", learning_rate=rate, batch_size=batch_size).answer(question).scores_KQ
    steps = 8 / batch_size
    np.testing.assert_allclose(scores / (rate * steps), dots, rtol=0.05, atol=0.02 * np.abs(dots).max())


@pytest.mark.parametrize("optimizer", SCALINGS)
def test_a_dataset_like_the_query_helps_most(optimizer):
    question = toy_question(sizes=(6, 6, 6, 6))
    question = dataclasses.replace(question, queries={"same": question.train["t1"]})
    rate = 0.02 if optimizer in ("sgd", "momentum") else 0.002
    for method in (UnTrac(optimizer=optimizer, learning_rate=rate), UnTracInv(optimizer=optimizer, learning_rate=rate)):
        scores_K = method.answer(question).scores_KQ[:, 0]
        assert scores_K.argmax() == 1 and scores_K[1] > 0


# ------------------------------------------------------------------------------------ what must not matter
def test_members_are_what_they_are_alone():
    """Rates, orders and datasets side by side, mapped or vmapped, in groups or together; sets of different sizes."""
    question = toy_question()
    method = UnTrac(learning_rate=3e-3, orders=2, every=3, members="map")
    both = answers(method, question, (3e-3, 1e-2))
    for variant in (
        dataclasses.replace(method, members="vmap"), dataclasses.replace(method, width=2),
        dataclasses.replace(method, width=1, members="vmap"),
    ):  # fmt: skip
        found = variant.answer(question)
        np.testing.assert_allclose(found.scores_KQ, both[0].scores_KQ, atol=1e-6)
        np.testing.assert_allclose(found.curves["query_change"], both[0].curves["query_change"], atol=1e-6)
    for k, (name, examples) in enumerate(question.train.items()):
        alone = dataclasses.replace(question, train={name: examples})
        found = answers(dataclasses.replace(method, learning_rate=1e-2), alone, (1e-2,))[0]
        np.testing.assert_allclose(found.scores_KQ[0], both[1].scores_KQ[k], atol=1e-6)
    turns = [
        dataclasses.replace(method, orders=1).answer(dataclasses.replace(question, seed=s)).scores_KQ for s in (0, 1)
    ]
    np.testing.assert_allclose(np.mean(turns, axis=0), both[0].scores_KQ, atol=1e-6)
    assert np.abs(turns[0] - turns[1]).max() > 1e-5  # the order does matter
    assert both[0].curves["step"].tolist() == [3, 6, 8]


@pytest.mark.mesh
def test_idle_members_fill_the_devices():
    question = toy_question()
    assert len(question.train) % 4  # or nobody would be idle
    for method in (UnTrac(learning_rate=3e-3), UnTracInv(learning_rate=3e-3)):
        alone = method.answer(question)
        with jax.set_mesh(make_mesh("member=4")):
            found = method.answer(question)
        np.testing.assert_allclose(found.scores_KQ, alone.scores_KQ, atol=1e-6)


def test_inverse_members_are_what_they_are_alone():
    question = toy_question()
    whole = UnTracInv(learning_rate=3e-3, microbatch=0).answer(question)
    for settings in ({"width": 1}, {"members": "vmap", "microbatch": 3}):
        variant = UnTracInv(learning_rate=3e-3, **settings)
        np.testing.assert_allclose(variant.answer(question).scores_KQ, whole.scores_KQ, atol=1e-6)
    for name, examples in question.train.items():
        tokens_N = (examples.columns["labels"] != IGNORED).sum(axis=1)
        k = list(question.train).index(name)
        np.testing.assert_allclose(tokens_N @ whole.examples[name] / tokens_N.sum(), whole.scores_KQ[k], rtol=1e-9)
    sums = UnTracInv(learning_rate=3e-3, sums=True).answer(question).scores_KQ
    size_K = np.array([(e.columns["labels"] != IGNORED).sum() for e in question.train.values()])
    np.testing.assert_allclose(sums, whole.scores_KQ * (size_K / size_K.mean())[:, None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_losses_do_not_depend_on_evaluation_batches(rows):
    """Sets are padded to one width and split anywhere; the mean is over tokens, against plain float64 sums."""
    question = toy_question()
    for examples in question.queries.values():
        model_K = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), question.parts["model"])
        found = set_losses(question.objective, model_K, examples, rows=rows)
        wide = examples.widen({"tokens": 13, "labels": 13})
        padded = set_losses(question.objective, model_K, concatenate([wide, wide]), rows=rows)
        np.testing.assert_allclose(padded.mean_K, found.mean_K, rtol=1e-6)
        logits = np.asarray(TOY.logits(question.parts["model"], examples.columns["tokens"]), np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        labels = examples.columns["labels"]
        picked = np.take_along_axis(logp, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        expected = -picked[labels != IGNORED].sum() / (labels != IGNORED).sum()
        assert found.mean_K[0] == pytest.approx(expected, rel=1e-6)


def test_a_permutation_reads_every_example_once():
    """One step of SGD an example at a tiny rate: leaving one example out takes its own gradient out."""
    question = toy_question(sizes=(5,))
    scores = UnTrac(optimizer="sgd", learning_rate=1e-3, limit=3).answer(question).scores_KQ
    part = UnTrac(optimizer="sgd", learning_rate=1e-3).answer(question).scores_KQ
    assert np.abs(scores - part).max() > 1e-6


# ------------------------------------------------------------------------------------------ collapse and anchors
def test_a_collapsed_member_is_named_and_spoils_no_other():
    question = dataclasses.replace(toy_question(), chance=float(np.log(TOY.vocab_size)))
    method = UnTrac(optimizer="sgd", every=2)
    calm = method.answer(question)
    wild, beside = answers(method, question, (1e30, method.learning_rate))
    np.testing.assert_array_equal(beside.scores_KQ, calm.scores_KQ)
    assert beside.notes == () and np.isnan(beside.curves["collapsed_at"]).all()
    assert not np.isfinite(wild.scores_KQ).all() and "losses went above 2 times" in wild.notes[0]
    assert (wild.curves["collapsed_at"] == 2).any() and (wild.curves["step"] == [2, 4, 6, 8]).all()
    inverse, beside = answers(UnTracInv(optimizer="sgd"), question, (1e30, 1e-4))
    assert inverse.notes and not beside.notes and np.isfinite(beside.scores_KQ).all()


@pytest.mark.parametrize("anchor", [{"l2": 1e4}, {"kl_weight": 1e3}])
def test_anchors_hold_the_model_where_it_was(anchor):
    question = dataclasses.replace(toy_question(), anchored=next_token_with_kl(TOY))
    settings = {"optimizer": "sgd", "learning_rate": 5e-5, "epochs": 40}
    free, held = (UnTrac(**settings, **one).answer(question).scores_KQ for one in ({}, anchor))
    assert np.abs(held).max() < 0.5 * np.abs(free).max()


def test_an_anchor_of_weight_zero_is_none():
    """KL to theta0 and its gradient are 0 at theta0: the first step is the free one."""
    question = dataclasses.replace(toy_question(), anchored=next_token_with_kl(TOY))
    settings = {"optimizer": "sgd", "learning_rate": 1e-2, "batch_size": 8}
    free = UnTrac(**settings).answer(question).scores_KQ
    for anchor in ({"l2": 3.0}, {"kl_weight": 3.0}):
        np.testing.assert_allclose(UnTrac(**settings, **anchor).answer(question).scores_KQ, free, atol=2e-6)


@pytest.mark.parametrize("settings", [{"optimizer": "lion"}, {"orders": 0}, {"collapse": float("nan")},
                                      {"batch_size": 4, "microbatch": 3}, {"kl_weight": 1.0}])  # fmt: skip
def test_settings_that_cannot_be_used(settings):
    with pytest.raises(UserError, match=next(iter(settings)) if "microbatch" not in settings else "microbatch 3"):
        UnTrac(**settings).answer(toy_question())


def test_objective_of_the_toy_is_shared():
    assert next_token(TOY) is toy_question().objective  # or every question would compile its own programs
