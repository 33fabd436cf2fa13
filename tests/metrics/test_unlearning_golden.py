"""Unlearning metrics against published logs and released code: every case of the golden files, and a few kept here."""

import json
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_examples

from jaxforget.data.text import TextConfig
from jaxforget.metrics import attacks, composite, memorisation, tofu
from jaxforget.metrics.evidence import Reader, Request, gather
from jaxforget.metrics.language import TokenScores, language_metrics
from jaxforget.metrics.membership import auc, min_k_scores, privleak
from jaxforget.metrics.rouge import rouge_l

LOGGED = 1e-6  # relative: the logs are float32


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "papers" / "golden_unlearning.json").read_text())


def rows(*log_probs, correct=None):
    """Token scores of the given log p; what stands in padding must not count."""
    width = max(map(len, log_probs)) + 1
    logp_NT, correct_NT = np.full((len(log_probs), width), -99.0), np.ones((len(log_probs), width), bool)
    scored_NT = np.zeros((len(log_probs), width), bool)
    for n, row in enumerate(log_probs):
        logp_NT[n, : len(row)], scored_NT[n, : len(row)] = row, True
        correct_NT[n, : len(row)] = False if correct is None else correct[n]
    return TokenScores(logp_NT, correct_NT, scored_NT)


# ------------------------------------------------------------------------------------- kept here, without the files
def test_truth_ratios_of_a_published_item():
    right, wrong = np.array([2.2287230491638184]), [np.array([3.355818271636963, 3.690197229385376, 3.719407558441162,
                                                              4.432241916656494, 2.973668098449707])]  # fmt: skip
    log_t1, log_t2 = tofu.log_truth_ratio(right, wrong)
    assert np.exp(log_t1[0]) == pytest.approx(0.2732519794766903, rel=1e-10)
    assert np.exp(log_t2[0]) == pytest.approx(0.24523371956679554, rel=1e-10)
    assert tofu.truth_share(log_t2)[0] == pytest.approx(0.8030620953212624, rel=1e-10)
    assert tofu.utility_truth(log_t1)[0] == pytest.approx(0.7267480205233097, rel=1e-10)


def test_model_utility_of_the_published_full_model():
    parts = (0.9895272273969067, 0.9856545937933034, 0.4538671193188384, 0.45548207783762884, 0.9329999999999999,
             0.505160107384876, 0.41856180755948974, 0.8824786324786325, 0.4230547536740809)  # fmt: skip
    assert composite.harmonic_mean(parts) == pytest.approx(0.585886035092722, rel=1e-10)


@pytest.mark.parametrize("argmax, em, es", [
    ([5, 6, 7, 8], 1, 1), ([1, 6, 7, 8], 0.75, 0.75), ([5, 6, 7, 9], 0.75, 0), ([5, 9, 7, 8], 0.75, 0.5),
    ([1, 2, 3, 8], 0.25, 0.25),
])  # fmt: skip
def test_memorisation_of_small_answers(argmax, em, es):
    scores = rows([0.0] * 4, correct=[np.array(argmax) == [5, 6, 7, 8]])
    assert (memorisation.exact_memorisation(scores)[0], memorisation.extraction_strength(scores)[0]) == (em, es)


def test_rouge_of_stems():
    pair = ["A writer writes a novel"], ["the writers were writing novels"]
    assert rouge_l(*pair, stem=True)["recall"][0] == pytest.approx(0.6)
    assert rouge_l(*pair, stem=False)["f1"][0] == 0
    assert rouge_l(["Paris"], [""], stem=True)["recall"][0] == 0


@pytest.mark.parametrize("retrained, unlearned, value", [
    (0.4772, 0.0, -100.0), (0.4772, 0.4772, 0.0), (0.4772, 1.0, 109.55574182732609), (0.5393, 1.0, 85.42555164101616),
])  # fmt: skip
def test_privleak_in_the_orientation_of_muse(retrained, unlearned, value):
    assert privleak(1 - unlearned, 1 - retrained) == pytest.approx(value, abs=1e-9)


# ------------------------------------------------------------------------------------------------ all golden cases
def test_probabilities(golden):
    for case in golden["metrics"]["answer_probability"]:
        assert np.exp(-case["sum_nll"] / case["num_answer_tokens"]) == pytest.approx(case["prob"], rel=LOGGED)
        even = rows([-case["sum_nll"] / case["num_answer_tokens"]] * case["num_answer_tokens"])
        assert min_k_scores(even, 100)[0] == pytest.approx(case["avg_loss"], rel=LOGGED)
    for case in golden["metrics"]["probability_with_options"]:
        found = tofu.choice_probability([case["avg_gt_loss"]], [np.array(case["avg_perturbed_losses"])])
        assert found[0] == pytest.approx(case["value"], rel=1e-10)


def test_truth_ratios(golden):
    for case in golden["metrics"]["truth_ratio"]:
        right, wrong = np.array([case["avg_paraphrase_loss"]]), [np.array(case["avg_perturbed_losses"])]
        log_t1, log_t2 = tofu.log_truth_ratio(right, wrong)
        assert np.exp(log_t1[0]) == pytest.approx(case["T1"], rel=1e-10)
        assert np.exp(log_t2[0]) == pytest.approx(case["T2"], rel=1e-10)
        assert np.exp(log_t2[0]) == pytest.approx(case["T2_logged"], rel=LOGGED)
        assert tofu.truth_share(log_t2)[0] == pytest.approx(case["T3"], rel=1e-10)
        assert tofu.forget_truth(log_t2)[0] == pytest.approx(case["forget_aggregate_T2"], rel=1e-10)
        assert tofu.utility_truth(log_t1)[0] == pytest.approx(case["utility_aggregate_T1"], rel=1e-10)
        assert tofu.utility_truth(log_t2)[0] == pytest.approx(case["utility_aggregate_T2"], rel=1e-10)


def test_rouge(golden):
    for case in golden["metrics"]["rouge"]:
        pair = [case["reference"]], [case["generation"]]
        stem, plain = rouge_l(*pair, stem=True), rouge_l(*pair, stem=False)
        assert stem["recall"][0] == pytest.approx(case["rougeL_recall"], abs=1e-12)
        assert stem["f1"][0] == pytest.approx(case["rougeL_f1_stem"], abs=1e-12)
        assert plain["recall"][0] == pytest.approx(case["rougeL_recall_nostem"], abs=1e-12)
        assert plain["f1"][0] == pytest.approx(case["rougeL_f1_nostem"], abs=1e-12)


def test_forget_quality(golden):
    ks = golden["metrics"]["forget_quality_ks"]
    full, retrained = np.array(ks["llama2_7b_full"]), np.array(ks["llama2_7b_retain90"])
    pairs = (full, retrained), (full[:40], retrained[:40]), (full, full)
    for case, (one, other) in zip(ks["cases"], pairs, strict=True):
        found = tofu.forget_quality(one, other)
        assert found["forget_quality_d"] == pytest.approx(case["D"], abs=1e-12)
        assert found["forget_quality"] == pytest.approx(case["p"], rel=1e-6)
    for case in ks["floor_D1"]:
        found = tofu.forget_quality(np.arange(case["n"]), np.arange(case["n"]) + 1e3)
        assert found == {"forget_quality": pytest.approx(case["p"], rel=1e-6), "forget_quality_d": 1.0,
                         "forget_quality_n": case["n"]}  # fmt: skip


def test_aggregates(golden):
    data = golden["metrics"]["harmonic_mean_aggregates"]["rows"]
    for row in data:
        part = {key.removeprefix("one_minus_"): 1 - value for key, value in row["memorisation_components"].items()}
        found = composite.memorisation(part["es"], part["em"], part["paraprob"], part["truth"])
        assert found == pytest.approx(row["memorisation"], rel=1e-9)
        assert composite.harmonic_mean(row["smia"].values()) == pytest.approx(row["privacy"], rel=1e-9)
        utility = composite.harmonic_mean(row["utility_components"].values())
        assert utility == pytest.approx(row["model_utility"], rel=1e-9)
        assert composite.harmonic_mean((utility, row["fluency"])) == pytest.approx(row["utility"], rel=1e-9)
        parts = row["memorisation"], row["privacy"], row["utility_rel"]
        assert composite.harmonic_mean(parts) == pytest.approx(row["overall_hm3"], rel=1e-9)
        # Methods are compared with the full model of as many epochs.
        full = [composite.relative_utility(row["utility"], value) for value in (0.712369592133051, 0.7117632523209635)]
        assert min(abs(value - row["utility_rel"]) for value in full) < 1e-9


def test_tofu_aggregates(shared):
    golden = json.loads((shared / "papers" / "golden_tofu.json").read_text())
    for model in ("llama2-7b", "phi"):
        for name, row in golden[model].items():
            if isinstance(row, dict) and "MU" in row:
                parts = [value for key, value in row.items() if key != "MU" and not key.startswith("Forget")]
                assert len(parts) == 9
                assert composite.harmonic_mean(parts) == pytest.approx(row["MU"], rel=1e-9), (model, name)


def test_exact_memorisation_and_extraction_strength(golden):
    for case in golden["metrics"]["exact_memorisation_and_extraction_strength"]["cases"]:
        correct = np.equal(case["argmax_predictions"], case["labels"])
        scores = rows([0.0] * len(correct), correct=[correct])
        assert memorisation.exact_memorisation(scores)[0] == case["exact_memorisation"]
        assert memorisation.extraction_strength(scores)[0] == case["extraction_strength"]


def test_perplexity(golden):
    case = golden["metrics"]["perplexity"]
    found = language_metrics(rows(*case["token_log_probs"], correct=case["acc_case"]["correct"]))
    assert found["perplexity"] == pytest.approx(case["ppl_sequence_mean"])
    assert found["token_perplexity"] == pytest.approx(case["ppl_token_weighted"])
    assert found["accuracy"] == pytest.approx(case["acc_case"]["acc_sequence_mean"])


class Formula:
    """A model whose logits are the closed form of the golden file."""

    vocab_size, max_length = 7, 16

    def batch_logits(self, params, batch):
        b, t, v = (jnp.arange(size, dtype=jnp.float32) for size in (2, batch["tokens"].shape[1], 7))
        b, t, v = b[:, None, None], t[None, :, None], v[None, None]
        return 2 * jnp.sin(0.7 * b + 1.3 * t + 0.9 * v + 0.13 * t * v)


class Words:
    """A tokenizer that says the same of all tokens."""

    def decode(self, ids, skip_special_tokens):
        return " Basil Mahfouz Al-Kuwaiti is male."


def test_membership_scores(golden):
    case = golden["metrics"]["membership_scores"]
    scores = rows(case["token_log_probs"])
    for share, value in case["min_k"].items():
        assert min_k_scores(scores, 100 * float(share))[0] == pytest.approx(value)
    assert min_k_scores(memorisation.without_last(scores), 40)[0] == pytest.approx(
        case["min_k_open_unlearning_0_4_drops_last"]
    )
    inputs = golden["losses"]["inputs"]["batches"]["forget"]
    labels_NT = np.asarray([row[1:] + [-100] for row in inputs["labels"]], np.int32)
    examples = make_examples(2, width=6, vocab=7)
    examples.columns.update(tokens=np.asarray(inputs["input_ids"], np.int32), labels=labels_NT)
    found = gather(Reader(Formula(), Words(), TextConfig()), {}, Request(scored={"a": examples})).scored["a"]
    for n, row in enumerate(case["min_k_pp"]["cases"]):
        mask_T = labels_NT[n] != -100
        np.testing.assert_allclose(found.scores.logp_NT[n][mask_T], row["token_log_probs"], rtol=1e-5)
        np.testing.assert_allclose(found.z_NT[n][mask_T], row["z"], rtol=1e-5, atol=1e-5)
        for name, drop_last in (("min_k_pp_0_4", False), ("min_k_pp_0_4_dropping_last_token", True)):
            value = attacks.min_kpp(found, None, drop_last)[n]
            assert value == pytest.approx(row[name], rel=1e-5, abs=1e-6)

    zlib_case = case["zlib"]
    size = len(zlib.compress(zlib_case["text"].encode()))
    if size != zlib_case["compressed_bytes"]:
        pytest.skip(f"this zlib makes {size} bytes of the text, not {zlib_case['compressed_bytes']}")
    reader = Reader(None, Words(), TextConfig())
    one = found._replace(scores=TokenScores(*(np.repeat(x, 2, axis=0) for x in scores)))
    assert attacks.zlib_ratio(one, reader, False)[0] == pytest.approx(zlib_case["score"])


def test_auc_and_what_is_made_of_it(golden):
    metrics = golden["metrics"]
    for case in metrics["mia_auc"]["cases"]:
        found = auc(np.array(case["forget_losses"]), np.array(case["holdout_losses"]))
        assert found == pytest.approx(case["AUC_mem"]) == pytest.approx(1 - case["AUC_muse"])
    for case in metrics["privleak"]["cases"]:
        found = privleak(1 - case["AUC_muse_unlearned"], 1 - case["AUC_muse_retrain"])
        assert found == pytest.approx(case["privleak"], abs=1e-9)
    for case in metrics["smia"]["cases"]:
        assert composite.smia(case["AUC_unl"], case["AUC_ret"]) == pytest.approx(case["value"], abs=1e-12)


def test_robustness(golden):
    data = golden["metrics"]["robustness"]
    for row in data["aggregate"]["rows"]:
        found = composite.robustness(row["relearning"], row["quantisation"])
        assert found == pytest.approx(row["robustness"], abs=2e-4)  # published with four digits
    for case in data["elementary"]["relearn"]:
        changes = case["delta_unlearned"], case["delta_retain"]
        assert composite.relearn(*changes) == pytest.approx(case["R_symmetric"])
        assert composite.relearn(*changes, one_sided=True) == pytest.approx(case["R_one_sided"])
    for case in data["elementary"]["quantise"]:
        pair = case["before"], case["after"]
        assert composite.quantise(*pair) == pytest.approx(case["Q_symmetric"])
        assert composite.quantise(*pair, one_sided=True) == pytest.approx(case["Q_one_sided"])
