"""Inverse Hessians and Fisher matrices against whole matrices in NumPy."""

import dataclasses

import dense
import jax
import numpy as np
import pytest

from jaxforget.data.sampling import order
from jaxforget.data.tokens import concatenate
from jaxforget.errors import UserError
from jaxforget.influence.curvature import Arnoldi, LiSSA
from jaxforget.influence.ekfac import EKFAC
from jaxforget.influence.fisher import DampedFisher


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def test_the_hessian_is_what_the_tests_need():
    """Eigenvalues for which LiSSA converges with a scale of 10 and a damping of 0.1, and not with a scale of 0.01."""
    value_P = np.linalg.eigvalsh(dense.hessian())
    assert 1.0 < value_P[-1] < 1.8 * 10 and value_P[0] > -0.05 * 10


def test_lissa_solves_with_the_damped_hessian():
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    damped = dense.hessian() + 0.1 * 10.0 * np.eye(query_QP.shape[1])
    expected = train_KP @ np.linalg.solve(damped, query_QP.T)
    answer = LiSSA(iterations=400, damping=0.1, scale=10.0, hessian_examples=0).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, expected, rtol=1e-7)
    assert answer.notes == () and answer.curves["change"].shape == (400, 2)
    short = LiSSA(iterations=4, damping=0.1, scale=10.0, hessian_examples=0).answer(question)
    u_PQ = query_QP.T
    for _ in range(4):
        u_PQ = query_QP.T + 0.9 * u_PQ - dense.hessian() @ u_PQ / 10.0
    np.testing.assert_allclose(short.scores_KQ, train_KP @ u_PQ / 10.0, rtol=1e-8)
    assert "not converged" in short.notes[0]


def test_lissa_draws_anew_at_every_iteration():
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    together, u_PQ = concatenate(list(question.train.values())), query_QP.T
    for i in range(2):
        chosen = together.take(order(together.columns["key"], question.seed, i)[:7])
        u_PQ = query_QP.T + 0.9 * u_PQ - dense.hessian_of(chosen) @ u_PQ / 10.0
    answer = LiSSA(iterations=2, damping=0.1, scale=10.0, hessian_examples=7).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, train_KP @ u_PQ / 10.0, rtol=1e-8)


def test_lissa_finds_its_scale():
    """10 products with H are enough for two digits of its largest eigenvalue."""
    question = dense.question()
    found = LiSSA(damping=0.1, hessian_examples=0).answer(question)
    (scale,) = found.curves["scale"]
    np.testing.assert_allclose(scale, np.linalg.eigvalsh(dense.hessian())[-1], rtol=1e-2)
    same = LiSSA(damping=0.1, scale=float(scale), hessian_examples=0).answer(question)
    np.testing.assert_allclose(found.scores_KQ, same.scores_KQ, rtol=1e-9)


def test_lissa_says_that_it_diverged():
    answer = LiSSA(iterations=30, scale=0.01, hessian_examples=0).answer(dense.question())
    assert "diverged for twin, other" in answer.notes[0]


def test_arnoldi_of_all_dimensions_solves_with_the_damped_hessian():
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    size = query_QP.shape[1]
    expected = train_KP @ np.linalg.solve(dense.hessian() + 0.2 * np.eye(size), query_QP.T)
    answer = Arnoldi(iterations=size, eigenvectors=size, damping=0.2, hessian_examples=0).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, expected, rtol=1e-5)
    value_E = np.linalg.eigvalsh(dense.hessian())
    kept_E = answer.curves["eigenvalues"]
    np.testing.assert_allclose(kept_E, value_E[np.argsort(-np.abs(value_E))][: len(kept_E)], atol=1e-7)


def test_arnoldi_keeps_the_largest_eigenvalues():
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    value_P, vector_PP = np.linalg.eigh(dense.hessian())
    top = np.argsort(-np.abs(value_P))[:5]
    expected = (train_KP @ vector_PP[:, top] / value_P[top]) @ (query_QP @ vector_PP[:, top]).T
    answer = Arnoldi(iterations=len(value_P), eigenvectors=5, hessian_examples=0).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, expected, rtol=1e-5)


@pytest.mark.parametrize("method", [LiSSA(), Arnoldi(damping=0.1)], ids=["lissa", "arnoldi"])
def test_normalised_datasets(method):
    question = dense.question()
    plain = method.answer(question)
    found = dataclasses.replace(method, normalise=True, examples=True).answer(question)
    length_K1 = np.linalg.norm(dense.gradients()[0], axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores_KQ, plain.scores_KQ / length_K1, rtol=1e-8)
    assert found.forward_tokens > plain.forward_tokens


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damped_fisher_is_its_formula(damping):
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    rows_NP = dense.train_rows()
    N, P = rows_NP.shape
    fisher = rows_NP.T @ rows_NP / N
    expected = train_KP @ np.linalg.solve(fisher + damping * np.trace(fisher) / min(N, P) * np.eye(P), query_QP.T)
    answer = DampedFisher(damping=damping, fisher_examples=0).answer(question)
    np.testing.assert_allclose(answer.scores_KQ, expected, rtol=1e-8)


def test_samples_depend_on_the_seed_and_ids_alone():
    """Datasets in another order give the same sample, and another seed another."""
    question = dense.question()
    turned = dataclasses.replace(question, train=dict(reversed(question.train.items())))
    lissa, arnoldi = LiSSA(hessian_examples=7), Arnoldi(hessian_examples=7, damping=0.1)
    for method in (DampedFisher(fisher_examples=7), lissa, arnoldi):
        scores, same = (method.answer(one).scores_KQ for one in (question, turned))
        np.testing.assert_allclose(same[::-1], scores, rtol=1e-6)
        assert not np.allclose(method.answer(dataclasses.replace(question, seed=8)).scores_KQ, scores, rtol=1e-3)


def test_gradients_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="take fewer fisher_examples"):
        DampedFisher(gigabytes=1e-6).answer(dense.question())


def test_ekfac_is_its_formula():
    """Kernels by their Kronecker factors, one for every layer of a stack; the bias by its diagonal."""
    question = dense.question()
    train_KP, query_QP = dense.gradients()
    unravel = dense.flat_model()[1]
    rows_N = jax.vmap(unravel)(dense.train_rows())
    train_K, query_Q = jax.vmap(unravel)(train_KP), jax.vmap(unravel)(query_QP)
    factor = dense.factors()

    def part(pick, bases):
        rows, train, query = (np.asarray(pick(one)).reshape(len(pick(one)), -1) for one in (rows_N, train_K, query_Q))
        turn = np.kron(*(np.linalg.eigh(one)[1] for one in bases)) if bases else np.eye(rows.shape[1])
        eigenvalue = ((rows @ turn) ** 2).mean(axis=0)
        whole = turn @ np.diag(eigenvalue + 0.1 * eigenvalue.mean()) @ turn.T
        return train @ np.linalg.solve(whole, query.T)

    expected = part(lambda t: t["in"]["bias"], None) + part(lambda t: t["in"]["kernel"], factor["in"])
    expected += part(lambda t: t["out"]["kernel"], factor["out"])
    for layer in range(dense.LAYERS):
        expected += part(lambda t, i=layer: t["blocks"]["kernel"][:, i], factor["blocks"][layer])
    np.testing.assert_allclose(EKFAC(fisher_examples=0).answer(question).scores_KQ, expected, rtol=1e-7)

    silent = dataclasses.replace(question, drawn=lambda parts, batch, key: 0.0 * question.objective(parts, batch, key))
    assert not EKFAC(fisher_examples=0).answer(silent).scores_KQ.any()  # F is of the drawn labels where there are some
    diagonal = sum(part(pick, None) for pick in (
        lambda t: t["in"]["bias"], lambda t: t["in"]["kernel"], lambda t: t["out"]["kernel"],
        *(lambda t, i=i: t["blocks"]["kernel"][:, i] for i in range(dense.LAYERS)),
    ))  # fmt: skip
    np.testing.assert_allclose(EKFAC(fisher_examples=0, widest=2).answer(question).scores_KQ, diagonal, rtol=1e-7)
