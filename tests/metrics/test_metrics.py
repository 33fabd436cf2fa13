"""Metrics against independent numbers: perplexity, accuracy, Min-K% and AUC in the definitions of Yao et al."""

import json

import jax
import numpy as np
import pytest
from conftest import Toy, make_examples

from jaxforget.metrics.language import TokenScores, language_metrics, token_scores
from jaxforget.metrics.membership import auc, membership_aucs, min_k_scores


def ragged(rows, correct=None):
    width = max(map(len, rows)) + 1
    logp, right = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width), bool)
    scored = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        logp[i, : len(row)], scored[i, : len(row)] = row, True
        right[i, : len(row)] = correct[i] if correct else False
    logp[~scored], right[~scored] = -99.0, True  # whatever stands in padding must not count
    return TokenScores(logp, right, scored)


def test_perplexities_and_accuracy_follow_their_two_definitions():
    scores = ragged([[-0.1, -2.0, -0.4], [-3.0], [-0.5, -0.5, -0.2, -0.8, -1.0]], [[1, 0, 1], [0], [1, 1, 1, 0, 0]])
    result = language_metrics(scores)
    assert result["perplexity"] == pytest.approx(4.383194418154874, rel=1e-6)
    assert result["token_perplexity"] == pytest.approx(2.5713844347880297, rel=1e-6)
    assert result["nll"] == pytest.approx(np.log(2.5713844347880297), rel=1e-6)
    assert result["accuracy"] == pytest.approx(42.22222222222222, rel=1e-9)


def test_perplexities_agree_when_lengths_do():
    result = language_metrics(ragged([[-0.1, -2.0], [-3.0, -1.5]]))
    assert result["perplexity"] == pytest.approx(result["token_perplexity"])


@pytest.mark.parametrize("percent, value", [(5, 4.0), (20, 4.0), (40, 3.25), (100, 1.2514285714285716)])
def test_min_k_golden(percent, value):
    scores = ragged([[-0.05, -1.2, -0.3, -4.0, -0.7, -2.5, -0.01]])
    assert min_k_scores(scores, percent)[0] == pytest.approx(value, rel=1e-6)


def test_min_k_counts_exactly_where_floating_point_would_not():
    # 0.3 * 10 is 2.9999999999999996: three tokens, not two.
    assert min_k_scores(ragged([[-4.0, -3.0, -2.0] + [-1.0] * 7]), 30)[0] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "members, others, value",
    [
        ([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7], 1.0),
        ([0.1, 0.5, 0.3, 0.9], [0.4, 0.5, 0.7], 0.625),
        ([0.9, 0.8], [0.1, 0.2], 0.0),  # over-unlearned: never folded to 1
        ([0.5, 0.5], [0.5, 0.5], 0.5),
    ],
)
def test_auc_golden_and_its_mirror(members, others, value):
    assert auc(np.array(members), np.array(others)) == pytest.approx(value)
    assert auc(np.array(others), np.array(members)) == pytest.approx(1 - value)


def test_loss_attack_is_min_100():
    rng = np.random.default_rng(0)
    member, other = (ragged([-rng.exponential(size=rng.integers(2, 9)) for _ in range(6)]) for _ in range(2))
    result = membership_aucs(member, other)
    assert result["loss_auc"] == result["mink100_auc"]
    mean_loss = [-row[mask].mean() for row, mask in zip(other.logp_NT, other.scored_NT, strict=True)]
    np.testing.assert_allclose(min_k_scores(other, 100), mean_loss, rtol=1e-6)


def test_token_scores_do_not_depend_on_batching_or_padding():
    toy, examples = Toy(), make_examples(7)
    params = toy.init(jax.random.key(0))
    whole = token_scores(toy, params, examples, batch=7)
    pieces = token_scores(toy, params, examples.widen({"tokens": 12, "labels": 12}), batch=3)
    width = whole.logp_NT.shape[1]
    np.testing.assert_allclose(pieces.logp_NT[:, :width], whole.logp_NT, rtol=1e-5, atol=1e-6)
    assert not pieces.scored_NT[:, width:].any()
    assert language_metrics(pieces)["nll"] == pytest.approx(language_metrics(whole)["nll"], rel=1e-6)
    logp = jax.nn.log_softmax(toy.logits(params, examples.columns["tokens"]))
    n, t = 3, 1
    assert whole.logp_NT[n, t] == pytest.approx(float(logp[n, t, examples.columns["labels"][n, t]]), rel=1e-5)


def test_golden_file_agrees_with_the_cases_here(shared):
    cases = json.loads((shared / "papers" / "golden_unlearning.json").read_text())["metrics"]["mia_auc"]["cases"]
    for case in cases:
        members, others = np.array(case["forget_losses"]), np.array(case["holdout_losses"])
        assert auc(members, others) == pytest.approx(case["AUC_mem"])
