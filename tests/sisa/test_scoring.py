"""Scores of members and votes against NumPy, from every member's full distribution.

Shapes: K members, N examples, T tokens, V vocabulary, C classes.
"""

import jax
import numpy as np
import pytest
from conftest import Toy, make_examples
from ensembles import LABELS, TOYS, delete, grid, make, record

from jaxforget.data.tokens import Examples
from jaxforget.metrics.language import token_scores
from jaxforget.sisa.aggregation import AGGREGATIONS
from jaxforget.sisa.scoring import ensemble_token_scores, score

TOY = Toy()
K, N = 4, 37  # more examples than one batch of 32
EXAMPLES = make_examples(N, seed=5)
PARAMS = [jax.tree.map(np.asarray, TOY.init(jax.random.key(k))) for k in range(K)]
WEIGHTS = {"equal": np.ones(K), "size": np.array([3.0, 1.0, 4.0, 2.0]) / 10, "not divided": np.array([3.0, 1, 0, 2])}
rules = pytest.mark.parametrize("rule", AGGREGATIONS)


def log_softmax(logits_xC):
    shifted_xC = logits_xC - logits_xC.max(axis=-1, keepdims=True)
    return shifted_xC - np.log(np.exp(shifted_xC).sum(axis=-1, keepdims=True))


def speak(params, tokens_NT):
    """Toy's logits once more, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x_NTD = params["embed"]["embedding"][tokens_NT]
    mean_NTD = np.cumsum(x_NTD, axis=1) / np.arange(1, x_NTD.shape[1] + 1)[:, None]
    hidden_NTD = np.tanh(mean_NTD @ params["mix"]["kernel"] + params["mix"]["bias"]) + x_NTD
    return hidden_NTD @ params["head"]["kernel"]


def combine(rule, logp_KxC, weight_K):
    """Return the ensemble's probabilities."""
    weight_K = np.asarray(weight_K, np.float64) / np.sum(weight_K)
    if rule == "majority":
        terms_KxC = np.eye(logp_KxC.shape[-1])[logp_KxC.argmax(axis=-1)]
    else:
        terms_KxC = np.exp(logp_KxC) if rule == "mean_probability" else logp_KxC
    mean_xC = np.tensordot(weight_K, terms_KxC, 1)
    return np.exp(log_softmax(mean_xC)) if rule == "mean_logits" else mean_xC


def log(probability):
    with np.errstate(divide="ignore"):  # a share of votes may be 0
        return np.log(probability)


def at(logp_NTV, labels_NT):
    return np.take_along_axis(logp_NTV, np.maximum(labels_NT, 0)[..., None], axis=-1)[..., 0]


@rules
@pytest.mark.parametrize("weights", WEIGHTS)
def test_token_scores_of_an_ensemble(rule, weights):
    labels_NT = EXAMPLES.columns["labels"]
    logp_KNTV = np.stack([log_softmax(speak(params, EXAMPLES.columns["tokens"])) for params in PARAMS])
    probability_NTV = combine(rule, logp_KNTV, WEIGHTS[weights])
    got = ensemble_token_scores(TOY, PARAMS, EXAMPLES, rule, WEIGHTS[weights])
    scored = EXAMPLES.scored
    np.testing.assert_array_equal(got.scored_NT, scored)
    # float32 sums of a few dozen terms
    np.testing.assert_allclose(got.logp_NT[scored], at(log(probability_NTV), labels_NT)[scored], rtol=2e-5, atol=2e-5)
    top_NTV = np.sort(probability_NTV, axis=-1)
    clear = scored & (np.abs(top_NTV[..., -1] - top_NTV[..., -2]) > 1e-6)
    best_NT = probability_NTV.argmax(axis=-1)
    np.testing.assert_array_equal(got.correct_NT[clear], (best_NT == labels_NT)[clear])
    assert 0 < got.correct_NT[clear].mean() < 1
    if rule == "majority":
        # In a tie the smallest class wins, whoever voted for it; equal weights make these sums exact.
        tied = scored & ~clear
        assert tied.any() or weights != "equal"
        if weights == "equal":
            np.testing.assert_array_equal(got.correct_NT[tied], (best_NT == labels_NT)[tied])


@rules
def test_one_member_is_its_own_ensemble(rule):
    got = ensemble_token_scores(TOY, PARAMS[:1], EXAMPLES, rule, np.array([0.3]))
    alone = token_scores(TOY, PARAMS[0], EXAMPLES)
    np.testing.assert_array_equal(got.scored_NT, alone.scored_NT)
    scored = alone.scored_NT
    np.testing.assert_array_equal(got.correct_NT[scored], alone.correct_NT[scored])
    if rule == "majority":
        np.testing.assert_array_equal(got.logp_NT[scored], np.where(alone.correct_NT, 0.0, -np.inf)[scored])
    else:  # exp and log in between, in float32
        np.testing.assert_allclose(got.logp_NT[scored], alone.logp_NT[scored], rtol=1e-5, atol=1e-5)


@rules
def test_equal_members_and_order_do_not_matter(rule):
    one = ensemble_token_scores(TOY, PARAMS[:1], EXAMPLES, rule, np.ones(1))
    thrice = ensemble_token_scores(TOY, PARAMS[:1] * 3, EXAMPLES, rule, np.array([1.0, 5.0, 2.0]))
    np.testing.assert_allclose(thrice.logp_NT, one.logp_NT, rtol=1e-5, atol=1e-5)
    there = ensemble_token_scores(TOY, PARAMS, EXAMPLES, rule, WEIGHTS["size"])
    back = ensemble_token_scores(TOY, PARAMS[::-1], EXAMPLES, rule, WEIGHTS["size"][::-1])
    np.testing.assert_allclose(back.logp_NT, there.logp_NT, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ rows of a table

SIZES = [[2, 1], [5, 3], [1, 1], [2, 2]]


@pytest.fixture(scope="module", params=["classification", "causal"])
def scored(request, tmp_path_factory):
    """A trained ensemble, one shard of which has been emptied, and examples to score."""
    task = request.param
    places = grid(SIZES, task)
    train = dict(batch_size=4, microbatch=0, learning_rate=0.2)
    with make(tmp_path_factory.mktemp("scoring") / "ensemble", places, task=task, train=train) as ensemble:
        ensemble.train()
        delete(ensemble, [one.id for one, shard, _ in places if shard == 2])
        records = [record(f"other-{n}", task, 1 + n % 5) for n in range(41)]
        yield ensemble, ensemble.encode(records)


def classify(params, columns):
    """Return logits of the toy classifier in float64."""
    total_ND = np.zeros((len(columns["tokens"]), TOYS["classification"].width))
    for n, (tokens_T, length) in enumerate(zip(columns["tokens"], columns["length"])):
        total_ND[n] = np.asarray(params["embed"]["embedding"], np.float64)[tokens_T[:length]].mean(axis=0)
    score = jax.tree.map(lambda x: np.asarray(x, np.float64), params["score"])
    return np.tanh(total_ND) @ score["kernel"] + score["bias"]


def of_classes(logp_NC, label_N):
    """Return the metrics of a classifier by counting; `nll` in nats."""
    predicted_N = logp_NC.argmax(axis=1)
    f1 = []
    for c in sorted({*predicted_N, *label_N}):
        right = np.sum((predicted_N == c) & (label_N == c))
        f1.append(2 * right / (np.sum(predicted_N == c) + np.sum(label_N == c)))
    return {
        "nll": -np.mean([row[c] for row, c in zip(logp_NC, label_N)]),
        "accuracy": 100 * np.mean(predicted_N == label_N), "macro_f1": 100 * np.mean(f1),
        "majority": 100 * max(np.mean(label_N == c) for c in range(len(LABELS))),
    }  # fmt: skip


def of_tokens(logp_NTV, labels_NT):
    """Return the metrics of a language model by loops over sequences."""
    loss, right = [], []
    for logp_TV, labels_T in zip(logp_NTV, labels_NT):
        places = np.flatnonzero(labels_T >= 0)
        loss.append([-logp_TV[t, labels_T[t]] for t in places])
        right.append(np.mean([logp_TV[t].argmax() == labels_T[t] for t in places]))
    nll = np.sum([sum(one) for one in loss]) / sum(map(len, loss))
    return {
        "nll": nll, "perplexity": np.exp(np.mean([np.mean(one) for one in loss])), "token_perplexity": np.exp(nll),
        "accuracy": 100 * np.mean(right),
    }  # fmt: skip


@pytest.mark.parametrize("weights", ["equal", "size"])
def test_rows_against_numpy(scored, weights):
    ensemble, examples = scored
    assert ensemble.final_keys().keys() == {0, 1, 3}
    parts = [ensemble.params(shard) for shard in (0, 1, 3)]
    if ensemble.recipe.task == "classification":
        logp_KxC = np.stack([log_softmax(classify(params, examples.columns)) for params in parts])
        label, summarise = examples.columns["label"], of_classes
    else:
        logp_KxC = np.stack([log_softmax(speak(params, examples.columns["tokens"])) for params in parts])
        label, summarise = examples.columns["labels"], of_tokens
    weight_K = {"equal": [1, 1, 1], "size": [3, 8, 4]}[weights]

    rows = score(ensemble, "others", examples, weights)
    assert {row.pop("set") for row in rows} == {"others"}
    got = {row.pop("name").removesuffix(": others"): row for row in rows}
    each = [summarise(logp_xC, label) for logp_xC in logp_KxC]
    expected = {f"member {shard}": row for shard, row in zip((0, 1, 3), each)}
    expected["mean of members"] = {name: np.mean([row[name] for row in each]) for name in each[0]}
    for rule in ("majority", "mean_probability", "mean_logits"):
        expected[f"ensemble, {rule}"] = summarise(log(combine(rule, logp_KxC, weight_K)), label)
    no_loss = {"nll", "perplexity", "token_perplexity"}  # a share of votes is no probability of the truth
    assert [*got] == [*expected]
    for name, row in expected.items():
        assert set(got[name]) == set(row)
        for field, value in row.items():
            if name == "ensemble, majority" and field in no_loss:
                assert got[name][field] is None
            else:
                assert got[name][field] == pytest.approx(value, rel=1e-4), (name, field)
    assert len({row["accuracy"] for row in expected.values()}) > 2  # members differ, or this would say little


def test_weights_by_size_are_those_of_what_is_left(scored):
    ensemble, _ = scored
    np.testing.assert_allclose(ensemble.weights("size"), np.array([3, 8, 4]) / 15, rtol=1e-6)
    np.testing.assert_array_equal(ensemble.weights("equal"), np.ones(3))


def test_weights_change_the_vote():
    """By size, one large member outvotes two small ones."""
    chosen = Examples(EXAMPLES.ids, EXAMPLES.columns).take(np.arange(8))
    large = ensemble_token_scores(TOY, PARAMS[:3], chosen, "majority", np.array([3.0, 1.0, 1.0]))
    alone = token_scores(TOY, PARAMS[0], chosen)
    np.testing.assert_array_equal(large.correct_NT[chosen.scored], alone.correct_NT[chosen.scored])
    equal = ensemble_token_scores(TOY, PARAMS[:3], chosen, "majority", np.ones(3))
    assert (equal.correct_NT != large.correct_NT)[chosen.scored].any()
