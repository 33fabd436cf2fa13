"""Agreement with the truth: published correlations, closed forms, and oracles."""

import numpy as np
import pytest
from scipy import stats
from worlds import GOLDEN

from jaxforget.influence.agreement import agreement, correlation, lds, mean_interval, noise_ceiling

golden = pytest.mark.skipif(GOLDEN is None, reason="the golden file is not beside the checkout")


@golden
def test_published_table_2():
    """Correlations of printed values with the printed truth, for both data sets."""
    table = GOLDEN["published"]["table2"]
    truth = np.array(table["values"]["ground_truth"])
    for name, expected in table["pearson_with_ground_truth"].items():
        values = np.array(table["values"][name])
        for side, half in (("A", slice(0, 4)), ("B", slice(4, 8))):
            assert correlation(values[half], truth[half])["pearson"] == pytest.approx(expected[side], abs=1e-3)


@golden
def test_significance_of_eight_datasets():
    """Draw eight points with an exact correlation; p and interval are the file's."""
    rng = np.random.default_rng(0)
    x, y = np.linalg.qr(np.column_stack([np.ones(8), rng.normal(size=(8, 2))]))[0].T[1:]
    for case in GOLDEN["significance"]["cases"]:
        found = correlation(x, case["r"] * x + np.sqrt(1 - case["r"] ** 2) * y)
        assert found["pearson"] == pytest.approx(case["r"], abs=1e-9)
        assert found["pearson_p"] == pytest.approx(case["p_two_sided"], abs=1e-4)
        assert [found["pearson_low"], found["pearson_high"]] == pytest.approx(case["ci95"], abs=1e-3)


@golden
def test_quadratic_world_correlations():
    world = GOLDEN["quadratic_world"]
    scores = {name: np.array(rows) for name, rows in world["scores[k][q]"].items()}
    truth = scores["ground_truth_leave_dataset_out"]
    for name, expected in world["pearson_with_ground_truth_per_query"].items():
        found = [correlation(scores[name][:, q], truth[:, q])["pearson"] for q in range(2)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert agreement(scores[name], truth)["pearson"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_spearman_interval_covers():
    """Of many samples with a known rank correlation, about 95 % of intervals hold it."""
    rng, rho = np.random.default_rng(1), 0.6
    true = 6 / np.pi * np.arcsin(rho / 2)  # of a normal pair
    hits = 0
    for _ in range(400):
        x = rng.normal(size=40)
        found = correlation(x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=40))
        hits += found["spearman_low"] <= true <= found["spearman_high"]
    assert 0.92 <= hits / 400 <= 0.98


def test_an_additive_oracle_has_lds_one():
    rng = np.random.default_rng(2)
    scores, kept = rng.normal(size=(10, 3)), rng.random((40, 10)) < 0.5
    losses = 5.0 - kept @ scores  # what helps lowers the loss
    np.testing.assert_allclose(lds(scores, kept, losses), 1.0)
    np.testing.assert_allclose(lds(-scores, kept, losses), -1.0)
    expected = stats.spearmanr(kept @ scores[:, 0], -losses[:, 1]).statistic
    assert lds(scores[:, [0]], kept, losses[:, [1]])[0] == pytest.approx(expected)


def test_signs_and_the_best():
    truth = np.array([[3.0, -1.0], [2.0, -2.0], [1.0, -3.0], [-6.0, -6.0]])
    same = agreement(truth, truth, top=2)
    assert same["pearson"] == pytest.approx(1) and same["sign"] == same["sign_centred"] == same["top_recall"] == 100
    shifted = agreement(truth + 10.0, truth, top=2)
    assert shifted["sign"] == pytest.approx(100 * 3 / 8) and shifted["sign_centred"] == 100
    turned = agreement(-truth, truth, top=2)
    assert turned["spearman"] == pytest.approx(-1) and turned["sign"] == 0 and turned["top_recall"] == 0


def test_constant_or_infinite_scores_have_no_correlation():
    truth = np.random.default_rng(3).normal(size=(6, 2))
    assert np.isnan(correlation(np.ones(6), truth[:, 0])["pearson"])
    broken = truth.copy()
    broken[2, 1] = np.inf
    assert all(np.isnan(value) for value in agreement(broken, truth).values())


def test_bootstrap_interval():
    """It holds the estimate, and narrows as 1 / sqrt(K): of one query it is close to Fisher's."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 1))
    y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=(200, 1))
    low, high = mean_interval(x, y, ranks=False)
    fisher = correlation(x[:, 0], y[:, 0])
    assert [low, high] == pytest.approx([fisher["pearson_low"], fisher["pearson_high"]], abs=0.03)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_noise_ceiling_of_known_noise(seeds):
    """Truth = signal + noise of equal variance: reliability is 1/2 for one seed and O / (O + 1) for the mean of O."""
    rng = np.random.default_rng(5)
    signal = rng.normal(size=(4000, 2))
    truth = signal + rng.normal(size=(seeds, 4000, 2))
    found = noise_ceiling(truth)
    expected = seeds / (seeds + 1)
    assert found["reliability"] == pytest.approx(expected, abs=0.02)
    perfect = np.corrcoef(signal[:, 0], truth.mean(axis=0)[:, 0])[0, 1]
    assert found["ceiling"] == pytest.approx(perfect, abs=0.02)
    rest = 1 / np.sqrt(2 * (1 + 1 / (seeds - 1)))
    assert found["one_vs_rest"] == pytest.approx(rest, abs=0.02)
    assert noise_ceiling(truth[:1])["ceiling"] is None
