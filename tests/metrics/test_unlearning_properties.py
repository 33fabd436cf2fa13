"""Identities of unlearning metrics: limits, bounds, symmetries, and independence of padding and batches."""

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, make_examples

from jaxforget.data import fictional
from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.metrics import attacks, benchmark, composite, memorisation, tofu
from jaxforget.metrics.bias.measures import preference
from jaxforget.metrics.evidence import Reader, Request, gather
from jaxforget.metrics.language import TokenScores
from jaxforget.metrics.membership import auc, auc_ci95, min_k_scores, privleak


def random_scores(seed=0, count=200, width=9):
    rng = np.random.default_rng(seed)
    length_N = rng.integers(1, width, count)
    scored_NT = np.arange(width)[None] < length_N[:, None]
    return TokenScores(-rng.exponential(size=(count, width)), rng.random((count, width)) < 0.8, scored_NT)


def moved(scores: TokenScores, order=None, pad=0) -> TokenScores:
    order = np.arange(len(scores.scored_NT)) if order is None else order
    fill = [(0, 0), (0, pad)]
    return TokenScores(np.pad(scores.logp_NT[order], fill, constant_values=-7.0),
                       np.pad(scores.correct_NT[order], fill, constant_values=True),
                       np.pad(scores.scored_NT[order], fill))  # fmt: skip


# ------------------------------------------------------------------------------------------------ memorisation
def test_es_is_at_most_em_and_both_are_1_together():
    scores = random_scores()
    em, es = memorisation.exact_memorisation(scores), memorisation.extraction_strength(scores)
    assert (es <= em).all() and ((em == 1) == (es == 1)).all() and (em == 1).any() and (es == 0).any()
    last_N = scores.scored_NT.sum(axis=1) - 1
    assert ((es == 0) == ~scores.correct_NT[np.arange(len(last_N)), last_N]).all()


def test_an_empty_answer_is_missing_and_left_out():
    scores = random_scores(count=4)
    empty = scores._replace(scored_NT=scores.scored_NT & (np.arange(4) != 2)[:, None])
    for metric in (memorisation.exact_memorisation, memorisation.extraction_strength):
        assert np.isnan(metric(empty)[2])
        found, kept = composite.estimate("x", metric(empty), 100.0), 100 * metric(scores)[[0, 1, 3]]
        assert found["x"] == pytest.approx(kept.mean())
        assert found["x_ci95"] == pytest.approx(1.96 * np.sqrt(((kept - kept.mean()) ** 2).sum() / 2 / 3))
    assert composite.estimate("x", [None, np.nan]) == {"x": None, "x_ci95": None}


def test_without_last_drops_one_token_a_row():
    scores = random_scores()
    fewer = memorisation.without_last(scores).scored_NT
    length_N = scores.scored_NT.sum(axis=1)
    np.testing.assert_array_equal(fewer, np.arange(fewer.shape[1])[None] < length_N[:, None] - 1)


@pytest.mark.parametrize("metric", [
    memorisation.exact_memorisation, memorisation.extraction_strength, lambda scores: min_k_scores(scores, 40),
])  # fmt: skip
def test_padding_and_order_change_nothing(metric):
    scores, order = random_scores(), np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(metric(moved(scores, order, pad=5)), metric(scores)[order])


# -------------------------------------------------------------------------------------------------------- TOFU
def losses(seed=0, count=300):
    rng = np.random.default_rng(seed)
    return rng.exponential(size=count), [rng.exponential(size=rng.integers(1, 6)) for _ in range(count)]


def test_t1_is_at_least_t2_and_they_agree_on_equal_wrong_answers():
    right, wrong = losses()
    log_t1, log_t2 = tofu.log_truth_ratio(right, wrong)
    assert (log_t1 >= log_t2 - 1e-12).all()
    equal = tofu.log_truth_ratio(right, [np.full(3, w[0]) for w in wrong])
    np.testing.assert_allclose(*equal, atol=1e-12)
    np.testing.assert_allclose(tofu.truth_share(log_t2), 1 / (1 + np.exp(log_t2)), rtol=1e-12)


def test_truth_ratios_do_not_overflow():
    log_t1, log_t2 = tofu.log_truth_ratio(np.array([2000.0, 0.0]), [np.array([0.0]), np.array([2000.0])])
    assert log_t1.tolist() == log_t2.tolist() == [2000, -2000]
    assert tofu.truth_share(log_t2).tolist() == [0, 1]
    assert tofu.forget_truth(log_t2).tolist() == [0, 0] and tofu.utility_truth(log_t2).tolist() == [0, 1]
    assert tofu.choice_probability([2000.0, 0.0], [np.array([0.0]), np.array([2000.0])]).tolist() == [0, 1]


def test_the_forget_truth_ratio_is_blind_to_the_direction():
    log_t = tofu.log_truth_ratio(*losses())[1]
    np.testing.assert_array_equal(tofu.forget_truth(log_t), tofu.forget_truth(-log_t))
    assert tofu.forget_truth(np.zeros(1))[0] == 1 and tofu.utility_truth(np.array([0.0, 1.0])).tolist() == [0, 0]


def test_wrong_answers_of_tofu_and_of_the_generated_corpus():
    records = fictional.generate(fictional.FictionalConfig(people=12, general_records=40, general_test_records=20))
    first, *_ = tofu.wrong_answers(records["forget"])
    assert [r.id for r in first] == [r.id for r in records["forget"]] and first[0].text != records["forget"][0].text
    uneven = [Record("a", "x", "?", {"perturbed_answer": ["1", "2"]}), Record("b", "y", "?")]
    assert [[(r.id, r.text) for r in part] for part in tofu.wrong_answers(uneven)] == [[("a", "1")], [("a", "2")]]


def test_ks_of_a_sample_with_itself_and_under_monotone_maps():
    one, other = tofu.log_truth_ratio(*losses())[1], tofu.log_truth_ratio(*losses(1))[1]
    same = tofu.forget_quality(one, one)
    assert (same["forget_quality"], same["forget_quality_d"]) == (1, 0)
    found = tofu.forget_quality(one, other + 0.3)
    assert 0 < found["forget_quality_d"] < 1 and found["forget_quality_n"] == 300
    assert tofu.forget_quality(np.exp(one), np.exp(other + 0.3)) == found
    assert tofu.forget_quality(-one, -other - 0.3) == pytest.approx(found)  # T -> 1 / T
    assert tofu.forget_quality([*one, None], other + 0.3) == found
    with pytest.raises(UserError, match="one of them has none"):
        tofu.forget_quality(one, [None])


# -------------------------------------------------------------------------------------------------- composites
def test_harmonic_mean_is_between_the_least_and_n_times_it():
    for x in np.random.default_rng(0).random((50, 4)) + 0.01:
        assert x.min() <= composite.harmonic_mean(x) <= 4 * x.min() + 1e-9
    assert composite.harmonic_mean([0.3] * 3) == pytest.approx(0.3)
    assert composite.harmonic_mean([0.3, None]) is None


def test_relearn_and_quantise_limits():
    assert composite.relearn(0, 0) == composite.quantise(0, 0) == 1
    assert composite.relearn(0.2, 0) == 0 and composite.relearn(0, 0.2, one_sided=True) == 1
    assert composite.relearn(-0.6, 0.2) == composite.relearn(0.2, 0.6) == pytest.approx(0.5)
    assert composite.faithfulness([0.9, 0.8], [0.1, 0.2]) == 1 and composite.faithfulness([1, 2], [1, 2]) == 0.5


def test_overall_is_relative_to_the_original_model():
    row = {"memorisation": 0.5, "privacy": 0.8, "utility": 0.3, "note": "first"}
    found = benchmark.overall(row, {"utility": 0.6})
    assert found == {"utility_rel": 0.5, "overall": pytest.approx(3 / (2 + 1.25 + 2)), "note": "first"}
    assert benchmark.overall(row, {"utility": 0.1})["utility_rel"] == 1
    assert benchmark.overall(row, None) == {} == benchmark.overall(row | {"privacy": None}, {"utility": 0.6})
    found = benchmark.overall(row, {"utility": 3e-12})  # a part of it is 0
    assert found["utility_rel"] is found["overall"] is None and found["note"].startswith("first; the utility of the")


# -------------------------------------------------------------------------------------------------- membership
def test_swapping_members_and_non_members_mirrors_the_auc():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, 40).astype(float), rng.integers(2, 11, 30).astype(float)  # with ties
    assert auc(one, other) + auc(other, one) == pytest.approx(1)
    assert auc_ci95(one, other) == pytest.approx(auc_ci95(other, one)) and auc_ci95(one, other) > 0


def test_auc_interval_covers():
    """Of 400 draws about 95 % hold the true value; the normal approximation is a little short at 40 texts."""
    rng, hits = np.random.default_rng(0), 0
    truth = 0.7602499389065233  # Phi(1 / sqrt 2)
    for _ in range(400):
        one, other = rng.normal(size=40), rng.normal(1.0, 1.0, 40)
        hits += abs(auc(one, other) - truth) <= auc_ci95(one, other)
    assert 0.91 <= hits / 400 <= 0.98


def test_privleak_of_the_retrained_model_is_0_and_its_division_is_guarded():
    assert privleak(0.6, 0.6) == 0 and privleak(1.0, 0.5) == -100 and privleak(0.0, 0.5) == 100
    assert privleak(0.7, 0.6) < 0 < privleak(0.5, 0.6)
    with pytest.raises(UserError, match="whose AUC is 1"):
        privleak(0.5, 1.0)
    with pytest.raises(UserError, match="sMIA divides"):
        composite.smia(0.5, 0.0)


def test_without_a_usable_yardstick_the_row_says_why():
    scores = {f"{name}_{side}": list(range(k, k + 4)) for name in attacks.ATTACKS
              for side, k in (("forget", 0), ("approximate", 2))}  # fmt: skip
    apart = scores | {f"{name}_approximate": [9, 9, 9] for name in attacks.ATTACKS}
    assert "privleak" not in attacks.summarise(scores, None)
    row = attacks.summarise(scores, scores)
    assert row["privleak"] == 0 and row["privacy"] == pytest.approx(1) and row["smia_loss"] == 1
    row = attacks.summarise(scores, apart)
    assert row["privleak"] is None and "whose AUC is 1" in row["note"]


# ------------------------------------------------------------------------------------------------------ evidence
READER = Reader(Toy(), None, TextConfig())


@pytest.fixture(scope="module")
def params():
    return Toy().init(jax.random.key(0))


def long_examples(count, seed, width):
    examples = make_examples(count, seed=seed, width=width)
    return Examples(examples.ids, examples.columns | {"key": id_keys(examples.ids)})


def test_scores_depend_on_neither_the_other_sets_nor_the_batch(params):
    sets = {"a": long_examples(5, 0, 40), "b": long_examples(7, 1, 12)}  # of two widths
    together = gather(READER, params, Request(scored=sets), batch=4).scored
    for name, examples in sets.items():
        alone = gather(READER, params, Request(scored={name: examples}), batch=32).scored[name]
        assert together[name].scores.logp_NT.shape == examples.columns["tokens"].shape
        for one, other in ((alone.scores.logp_NT, together[name].scores.logp_NT), (alone.z_NT, together[name].z_NT)):
            np.testing.assert_allclose(np.where(examples.scored, one, 0), np.where(examples.scored, other, 0),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
        order = np.random.default_rng(0).permutation(len(examples))
        turned = gather(READER, params, Request(scored={name: examples.take(order)}), batch=3).scored[name]
        np.testing.assert_allclose(turned.scores.logp_NT, np.asarray(alone.scores.logp_NT)[order], atol=1e-5)


def test_scores_are_those_of_float64(params):
    examples = make_examples(6)
    found = gather(READER, params, Request(scored={"a": examples})).scored["a"]
    logits = np.asarray(Toy().logits(params, examples.columns["tokens"]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    mean = (np.exp(logp) * logp).sum(axis=-1)
    deviation = np.sqrt((np.exp(logp) * logp**2).sum(axis=-1) - mean**2)
    own = np.take_along_axis(logp, np.maximum(examples.columns["labels"], 0)[..., None], axis=-1)[..., 0]
    mask = examples.scored
    np.testing.assert_allclose(found.scores.logp_NT[mask], own[mask], rtol=1e-4)
    np.testing.assert_allclose(found.z_NT[mask], ((own - mean) / deviation)[mask], rtol=1e-3, atol=1e-4)
    right = logits.argmax(-1) == examples.columns["labels"]
    np.testing.assert_array_equal(found.scores.correct_NT[mask], right[mask])
    loss = attacks.loss(found, READER, False)
    np.testing.assert_allclose(loss, min_k_scores(found.scores, 100))
    np.testing.assert_allclose(loss, [-own[n][mask[n]].mean() for n in range(6)], rtol=1e-4)


def test_gradient_norms_are_means_over_the_tensors_of_the_file():
    model, params = formula.model("gpt2")
    examples = make_examples(3, vocab=31)
    reader = Reader(model, None, TextConfig())
    found = gather(reader, params, Request(gradients={"a": examples}), batch=2).gradients["a"]

    def loss(params, n):
        logp = jax.nn.log_softmax(model.logits(params, examples.columns["tokens"][n : n + 1]))[0]
        own = jnp.take_along_axis(logp, jnp.maximum(examples.columns["labels"][n], 0)[:, None], axis=1)[:, 0]
        return -jnp.mean(own, where=examples.scored[n])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for n in range(3):
        norms = []
        for name, part in grad(params, n).items():
            for leaf in map(np.asarray, jax.tree.leaves(part)):
                norms += [np.linalg.norm(tensor) for tensor in (leaf if name == "blocks" else [leaf])]
        assert found[n] == pytest.approx(np.mean(norms), rel=1e-4)


def test_a_destroyed_model_has_not_forgotten():
    """What compares an argmax or two scores would else take losses that are no numbers for knowing nothing."""
    whole = TokenScores(np.zeros((2, 3)), np.ones((2, 3), bool), np.ones((2, 3), bool))
    broken = whole._replace(logp_NT=np.array([[0.0, np.nan, 0.0], [0.0, 0.0, 0.0]]), correct_NT=np.zeros((2, 3), bool))
    unscored = whole._replace(logp_NT=broken.logp_NT, scored_NT=~np.isnan(broken.logp_NT))
    for measure in (memorisation.exact_memorisation, memorisation.extraction_strength):
        np.testing.assert_array_equal(measure(whole), [1, 1])
        np.testing.assert_array_equal(measure(broken), [np.nan, 0])
        np.testing.assert_array_equal(measure(unscored), [1, 1])
    np.testing.assert_array_equal(preference(np.array([1.0, np.nan]), np.array([0.0, 0.0])), [[1, 1], [np.nan] * 2])
