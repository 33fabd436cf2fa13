"""Every baseline by the same promises, and products of gradients against the golden file and whole matrices."""

import dataclasses

import dense
import jax
import numpy as np
import pytest
from worlds import GOLDEN, quadratic_question, toy_question

from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.influence.curvature import Arnoldi, LiSSA
from jaxforget.influence.ekfac import EKFAC
from jaxforget.influence.first_order import GradCos, GradDot, GradSign, TracIn
from jaxforget.influence.fisher import DampedFisher
from jaxforget.influence.trak import TRAK, project

METHODS = {
    "graddot": GradDot(),
    "gradcos": GradCos(),
    "gradcos_examples": GradCos(of="examples"),
    "gradsign": GradSign(),
    "gradsign_query": GradSign(sign_of="query"),
    "tracin": TracIn(),
    "lissa": LiSSA(iterations=20, damping=0.1),
    "arnoldi": Arnoldi(iterations=12, eigenvectors=8, damping=0.01),
    "fisher": DampedFisher(),
    "ekfac": EKFAC(),
    "trak": TRAK(dimension=64),
}
golden = pytest.mark.skipif(GOLDEN is None, reason="the golden file is not beside the checkout")


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def asked():
    """The question of `dense`, with two checkpoints."""
    question = dense.question()
    before = jax.tree.map(lambda x: 0.9 * x, question.parts["model"])
    return dataclasses.replace(question, checkpoints=((0.1, before), (0.05, question.parts["model"])))


# ------------------------------------------------------------------------------------------- every method
@pytest.mark.parametrize("name", METHODS)
def test_a_dataset_that_is_the_query_helps_it_most(name):
    score_K = METHODS[name].answer(asked()).scores_KQ[:, 0]
    assert score_K[1] > 0 and score_K.argmax() == 1


@pytest.mark.parametrize("name", METHODS)
def test_microbatches_and_examples_change_nothing(name):
    """Sets of 4 to 9 examples by microbatches of 8 and 2; examples, where there are some, average to the score."""
    method, question = METHODS[name], asked()
    options = {"examples": True} if hasattr(method, "examples") else {}
    whole = method.answer(question)
    found = dataclasses.replace(method, microbatch=2, **options).answer(question)
    assert whole.scores_KQ.shape == (3, 2) and whole.scores_KQ.dtype == np.float64
    np.testing.assert_allclose(found.scores_KQ, whole.scores_KQ, rtol=1e-7, atol=1e-9 * np.abs(whole.scores_KQ).max())
    assert found.forward_tokens > 0
    if not options and name != "trak":
        assert found.examples is None
        return
    for name, score_Q in zip(question.train, found.scores_KQ, strict=True):
        weight_N = (question.train[name].columns["labels"] != IGNORED).sum(axis=1)
        assert found.examples[name].shape == (len(weight_N), 2)
        np.testing.assert_allclose(weight_N @ found.examples[name] / weight_N.sum(), score_Q, rtol=1e-7)


@pytest.mark.parametrize("field, value", [
    ("microbatch", 0), ("iterations", 0), ("eigenvectors", 0), ("scale", -1.0), ("damping", -1.0),
    ("hessian_examples", -1), ("fisher_examples", -1), ("gigabytes", 0.0), ("dimension", 33), ("of", "pairs"),
    ("sign_of", "both"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told(field, value):
    having = [method for method in METHODS.values() if hasattr(method, field)]
    assert having
    for method in having:
        with pytest.raises(UserError, match=field):
            dataclasses.replace(method, **{field: value}).answer(asked())


def test_questions_that_cannot_be_answered_are_told():
    question = dense.question()
    with pytest.raises(UserError, match="checkpoints"):
        TracIn().answer(question)
    with pytest.raises(UserError, match="checkpoints"):
        TRAK(ensemble=True).answer(question)
    silent = question.train["t0"].columns | {"labels": np.full_like(question.train["t0"].columns["labels"], IGNORED)}
    silent = dataclasses.replace(question.train["t0"], columns=silent)
    with pytest.raises(UserError, match="'t0' has no scored tokens"):
        GradDot().answer(dataclasses.replace(question, train={"t0": silent}))
    with pytest.raises(UserError, match="layers.py"):
        EKFAC().answer(toy_question())


# --------------------------------------------------------------------------------- products of gradients
@golden
@pytest.mark.parametrize("row, method", [
    ("graddot", GradDot()), ("graddot", GradDot(examples=True)), ("gradcos_dataset_sum", GradCos()),
    ("gradcos_dataset_sum", GradCos(of="examples")),  # sets of one example
    ("gradsign", GradSign()), ("tracin_lr0.05_checkpoints_0_half_full", TracIn()),
    ("tracin_lr0.05_checkpoints_0_half_full", TracIn(examples=True)),
    ("hif_exact_mean_hessian_no_damping", LiSSA(iterations=400, damping=0.0, scale=2.0, hessian_examples=0)),
    ("hif_exact_mean_hessian_no_damping", Arnoldi(iterations=3, eigenvectors=3)),  # one eigenvalue is double
    ("hif_exact_mean_hessian_no_damping", Arnoldi(iterations=5, eigenvectors=5)),  # more than there are dimensions
])  # fmt: skip
def test_golden(row, method):
    question = quadratic_question()
    model = question.parts["model"]
    points = [jax.tree.map(lambda x, s=share: s * x, model) for share in (0.0, 0.5, 1.0)]
    answer = method.answer(dataclasses.replace(question, checkpoints=tuple((0.05, one) for one in points)))
    expected = np.array(GOLDEN["quadratic_world"]["scores[k][q]"][row])
    np.testing.assert_allclose(answer.scores_KQ, expected, atol=1e-8, rtol=0)
    assert answer.notes == ()


def test_products_are_those_of_whole_gradients():
    question, rows = asked(), dense.own_gradients()
    train_KP, query_QP = dense.gradients()
    mean = {name: (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0) for name, x in rows.items()}
    units = [np.stack([mean[name] for name in named]) for named in (question.train, question.queries)]
    for method, expected in [
        (GradDot(), train_KP @ query_QP.T),
        (GradSign(), np.sign(train_KP) @ query_QP.T),
        (GradSign(sign_of="query"), train_KP @ np.sign(query_QP).T),
        (GradCos(of="examples"), units[0] @ units[1].T),
    ]:
        np.testing.assert_allclose(method.answer(question).scores_KQ, expected, rtol=1e-8)
    parts = GradDot(examples=True).answer(question).examples
    for name, part in parts.items():
        np.testing.assert_allclose(part, rows[name] @ query_QP.T, rtol=1e-8, atol=1e-12)


def test_many_queries_go_through_in_groups():
    """More queries than are on the device at a time; with examples, and for the recursion of LiSSA."""
    question = asked()
    columns = {f"q{i}": examples for i, examples in enumerate(list(question.queries.values()) * 5)}
    many = dataclasses.replace(question, queries=columns)
    for method in (GradDot(examples=True), LiSSA(iterations=3)):
        few_KQ, many_KQ = (method.answer(one).scores_KQ for one in (question, many))
        np.testing.assert_allclose(many_KQ, np.tile(few_KQ, 5), rtol=1e-9)


def test_a_language_model_in_single_precision():
    """Dropping to float32 and widths that differ between sets change scores by rounding alone."""
    with jax.enable_x64(False):
        question = toy_question()
        dots, parts = GradDot().answer(question), GradDot(examples=True, microbatch=2).answer(question)
    np.testing.assert_allclose(parts.scores_KQ, dots.scores_KQ, rtol=1e-4, atol=1e-5 * np.abs(dots.scores_KQ).max())


# --------------------------------------------------------------------------------------------------- TRAK
def trak_scores(question, phi, doubt, damping):
    """The formula of TRAK by whole matrices. phi, doubt: of all sets by name."""
    inner = sum(phi[name].T @ phi[name] for name in question.train)
    inverse = np.linalg.inv(inner + damping * np.trace(inner) / len(inner) * np.eye(len(inner)))
    count = {name: dense.count(name) for name in phi}
    return np.array([
        [np.average(phi[k] @ inverse @ np.average(phi[q], axis=0, weights=count[q]) * doubt[k], weights=count[k])
         for q in question.queries] for k in question.train
    ])  # fmt: skip


@pytest.mark.parametrize("dimension", [0, 32])
def test_trak_is_its_formula(dimension):
    question = asked()
    flat, unravel = dense.flat_model()
    doubt = {name: 1 - np.exp(-loss_N) for name, loss_N in dense.own_losses(flat).items()}
    phi = {name: -rows_NP / doubt[name][:, None] for name, rows_NP in dense.own_gradients().items()}
    if dimension:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(question.seed), 0x54524B), 0)
        matrix_PJ = np.asarray(project(jax.vmap(unravel)(np.eye(len(flat))), key, dimension))
        phi = {name: rows_NP @ matrix_PJ for name, rows_NP in phi.items()}
    answer = TRAK(dimension=dimension, damping=0.2).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, trak_scores(question, phi, doubt, 0.2), rtol=1e-7)


def test_projections_keep_products():
    """R R^T is 1 on the diagonal and, off it, around 0 with a variance of 1 / J: also across blocks and leaves."""
    rows, J = 16_384, 256  # of a block
    pick_B = np.concatenate([np.arange(146), rows + np.arange(146), 20_000 + np.arange(8)])  # same places in all three
    flat = np.zeros((300, 20_008))
    flat[np.arange(300), pick_B] = 1.0
    tree = {"a": flat[:, :20_000].reshape(300, 40, 500), "b": flat[:, 20_000:]}
    phi = np.asarray(project(tree, jax.random.key(1), J))
    gram = phi @ phi.T
    np.testing.assert_allclose(np.diagonal(gram), 1.0, rtol=1e-12)
    off = gram[np.triu_indices(300, 1)]
    # 44,850 pairs of 256 independent signs: the mean of squares has a relative deviation of sqrt(2 / 44,850).
    assert abs((off**2).mean() * J - 1) < 5 * np.sqrt(2 / len(off)) and abs(off.mean()) < 5 / np.sqrt(J * len(off))
    assert np.abs(off).max() < 6 / np.sqrt(J)


def test_an_ensemble_of_trak_averages_kernels_and_doubts_apart():
    question = asked()
    alone = [TRAK(dimension=0, ensemble=True).answer(dataclasses.replace(question, checkpoints=(one,)))
             for one in question.checkpoints]  # fmt: skip
    last = TRAK(dimension=0).answer(question)
    np.testing.assert_allclose(alone[1].scores_KQ, last.scores_KQ)
    flat = [dense.ravel_pytree(model)[0] for _, model in question.checkpoints]
    both = TRAK(dimension=0, ensemble=True).answer(question)
    for name in question.train:
        doubt_MN = [1 - np.exp(-dense.own_losses(one)[name]) for one in flat]
        kernel_MNQ = [one.examples[name] / doubt[:, None] for one, doubt in zip(alone, doubt_MN, strict=True)]
        expected = np.mean(kernel_MNQ, axis=0) * np.mean(doubt_MN, axis=0)[:, None]
        np.testing.assert_allclose(both.examples[name], expected, rtol=1e-8)
