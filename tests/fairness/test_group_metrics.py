"""Metrics against golden numbers, fairlearn and enumeration; resamples against what their distribution must be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import BASE, BINARY, ENSEMBLE, G1, G2, G4, MAJORITY, MEMBERS, check_metrics

from jaxforget.fairness import metrics
from jaxforget.fairness.metrics import bootstrap_metrics, group_metrics, interval

SINGLE = 1e-6  # float32 has 7 digits
GAPS = ("eo_max", "eo_avg", "eo_sum", "demographic_parity")
MEANS = ("accuracy", "error", "accuracy_A", "selection_A", "fpr_A", "tpr_A")


def made_up(seed, examples=240, groups=2):
    """(hard_N, label_N, group_N), different in every group."""
    rng = np.random.default_rng(seed)
    group_N = rng.permutation(np.arange(examples) % groups)
    label_N = (rng.random(examples) < 0.3 + 0.15 * group_N).astype(int)
    hard_N = (rng.random(examples) < 0.2 + 0.4 * label_N + 0.1 * group_N).astype(int)
    return hard_N, label_N, group_N


def of_counts(count_AYT, p_AT):
    """Measure a table on its own counts, a weighted row a cell, in float64 since the numbers have all 6 digits."""
    group_N, label_N, code_N = np.indices(count_AYT.shape).reshape(3, -1)
    with jax.enable_x64(True):
        return group_metrics(np.asarray(p_AT)[group_N, code_N], label_N, group_N, 2, count_AYT.reshape(-1))


def test_golden_metrics():
    for name, count_AYT in (("G1", G1), ("G2", G2)):
        check_metrics(of_counts(count_AYT, np.array([[0.0, 1.0], [0.0, 1.0]])), BASE[name])
    size_T = np.array([0, 1, 1, 2, 1, 2, 2, 3])
    check_metrics(of_counts(G4, np.tile(size_T > 1, (2, 1)).astype(float)), MAJORITY)
    for k, (raw, _, _) in enumerate(MEMBERS):
        check_metrics(of_counts(G4, np.tile(np.arange(8) >> (2 - k) & 1, (2, 1)).astype(float)), raw)
    # Tables of 6 digits give metrics of 5.
    for (name, *_), (table_AT, expected) in BINARY.items():
        found = of_counts({"G1": G1, "G2": G2}[name], table_AT)
        np.testing.assert_allclose([found["accuracy"], *found["tpr_A"]], [expected[0], *expected[2]], atol=5e-6)
        np.testing.assert_allclose([found[gap] for gap in GAPS[:3]], expected[3:], atol=5e-6)
    for (method, _), (table_AT, expected) in ENSEMBLE.items():
        code_T = {"majority": size_T // 2, "count": size_T}.get(method, np.arange(8))
        found = of_counts(G4, np.asarray(table_AT)[:, code_T])
        np.testing.assert_allclose([found["accuracy"], *found["fpr_A"]], [expected[0], *expected[1]], atol=5e-6)
        np.testing.assert_allclose([found[gap] for gap in GAPS[:3]], expected[3:], atol=5e-6)


def test_selection_and_accuracy_of_groups_by_hand():
    found = of_counts(G1, np.array([[0.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_allclose(found["selection_A"], [210 / 600, 280 / 400])
    np.testing.assert_allclose(found["accuracy_A"], [530 / 600, 300 / 400])
    assert found["demographic_parity"] == pytest.approx(0.35)


@pytest.mark.parity
@pytest.mark.parametrize("groups, weighted", [(2, True), (3, False)])
def test_hard_decisions_agree_with_fairlearn(groups, weighted):
    pytest.importorskip("fairlearn")
    from fairlearn import metrics as theirs
    from sklearn.metrics import accuracy_score

    rates = {"accuracy_A": accuracy_score, "selection_A": theirs.selection_rate, "fpr_A": theirs.false_positive_rate,
             "tpr_A": theirs.true_positive_rate}  # fmt: skip
    for seed in range(5):
        hard_N, label_N, group_N = made_up(seed, groups=groups)
        weight_N = np.random.default_rng(seed).random(240) if weighted else None
        found = group_metrics(hard_N, label_N, group_N, groups, weight_N)
        given = {"sample_weight": weight_N, "sensitive_features": group_N}
        for name, expected in {
            "eo_max": theirs.equalized_odds_difference(label_N, hard_N, agg="worst_case", **given),
            "eo_avg": theirs.equalized_odds_difference(label_N, hard_N, agg="mean", **given),
            "demographic_parity": theirs.demographic_parity_difference(label_N, hard_N, **given),
            "accuracy": accuracy_score(label_N, hard_N, sample_weight=weight_N),
        }.items():
            assert found[name] == pytest.approx(expected, abs=SINGLE) and 0.01 < expected < 0.99
        frame = theirs.MetricFrame(
            metrics=rates, y_true=label_N, y_pred=hard_N, sensitive_features=group_N,
            sample_params={name: {"sample_weight": weight_N} for name in rates} if weighted else None,
        )  # fmt: skip
        for name in rates:
            np.testing.assert_allclose(found[name], frame.by_group[name], atol=SINGLE)
        assert found["eo_sum"] == pytest.approx(sum(np.ptp(frame.by_group[name]) for name in ("fpr_A", "tpr_A")),
                                                abs=SINGLE)  # fmt: skip


def test_expected_metrics_are_the_average_over_all_outputs():
    rng = np.random.default_rng(0)
    p_N, label_N, group_N = rng.random(9), np.array([0, 0, 0, 1, 1, 0, 0, 1, 1]), np.array([0] * 5 + [1] * 4)
    outs_RN = np.array(list(itertools.product((0, 1), repeat=9)))
    chance_R = np.prod(np.where(outs_RN == 1, p_N, 1 - p_N), axis=1)
    sampled = jax.vmap(lambda out_N: group_metrics(out_N, label_N, group_N, 2))(outs_RN)
    expected = group_metrics(p_N, label_N, group_N, 2)
    for name in MEANS:
        np.testing.assert_allclose(np.tensordot(chance_R, sampled[name], 1), expected[name], atol=SINGLE)
    for name in GAPS:  # a gap is convex: a draw has a larger one on average
        assert chance_R @ np.asarray(sampled[name], float) > expected[name] + 0.01


def test_weights_are_repetition():
    hard_N, label_N, group_N = made_up(1)
    weight_N = np.random.default_rng(0).integers(0, 4, 240)
    found = group_metrics(hard_N, label_N, group_N, 2, weight_N)
    repeated = [np.repeat(value_N, weight_N) for value_N in (hard_N, label_N, group_N)]
    for name, value in group_metrics(*repeated, 2).items():
        np.testing.assert_allclose(found[name], value, atol=SINGLE)
        scaled = group_metrics(hard_N, label_N, group_N, 2, weight_N / 7)
        np.testing.assert_allclose(found[name], scaled[name], atol=SINGLE)
    assert found["accuracy"] != group_metrics(hard_N, label_N, group_N, 2)["accuracy"]


def test_a_rate_without_examples_is_nan():
    hard_N, label_N, group_N = made_up(2, groups=3)
    full = group_metrics(hard_N, label_N, group_N, 3)
    lacking_N = (group_N == 1) & (label_N == 1)
    found = group_metrics(hard_N, label_N, group_N, 3, ~lacking_N)
    assert np.array_equal(np.isnan(found["tpr_A"]), [False, True, False])
    assert np.array_equal(found["fpr_A"], full["fpr_A"]) and found["tpr_A"][2] == full["tpr_A"][2]
    gone = group_metrics(hard_N, label_N, group_N, 4)  # a group that nobody is of
    for part, no_number in ((found, GAPS[:3]), (gone, GAPS)):
        assert {name for name in GAPS if np.isnan(part[name])} == set(no_number)
        assert np.isfinite(part["accuracy"])
    for name in ("accuracy_A", "selection_A", "fpr_A", "tpr_A"):
        assert np.array_equal(np.isnan(gone[name]), [False, False, False, True])
        assert np.array_equal(gone[name][:3], full[name])


def test_what_is_called_group_and_label_is_a_name():
    p_N, (_, label_N, group_N) = np.random.default_rng(3).random(240), made_up(3, groups=3)
    found = group_metrics(p_N, label_N, group_N, 3)
    turned = group_metrics(p_N, label_N, (group_N + 1) % 3, 3)
    opposite = group_metrics(1 - p_N, 1 - label_N, group_N, 3)
    for name in found:
        same = jnp.roll(found[name], 1) if name.endswith("_A") else found[name]
        np.testing.assert_allclose(turned[name], same, atol=SINGLE)
        if name in ("accuracy", "error", "accuracy_A", *GAPS):
            np.testing.assert_allclose(opposite[name], found[name], atol=SINGLE)
    np.testing.assert_allclose(opposite["fpr_A"], 1 - found["tpr_A"], atol=SINGLE)


def test_many_rows_in_single_precision():
    rng = np.random.default_rng(0)
    p_N, label_N, group_N = rng.random(400_000), rng.integers(0, 2, 400_000), rng.integers(0, 2, 400_000)
    found = group_metrics(p_N, label_N, group_N, 2)
    exact = np.mean(np.where(label_N == 1, p_N, 1 - p_N))
    assert found["accuracy"] == pytest.approx(exact, abs=1e-5)
    rate_AY = [[p_N[(group_N == a) & (label_N == y)].mean() for y in (0, 1)] for a in (0, 1)]
    np.testing.assert_allclose(np.stack([found["fpr_A"], found["tpr_A"]], axis=1), rate_AY, atol=1e-5)


def test_jit_and_vmap_change_nothing():
    p_RN = np.random.default_rng(0).random((4, 240)).astype(np.float32)
    weight_RN = np.random.default_rng(1).integers(0, 3, (4, 240))
    _, label_N, group_N = made_up(4)
    measure = jax.jit(group_metrics, static_argnums=3)
    measure_all = jax.jit(jax.vmap(group_metrics, in_axes=(0, None, None, None, 0)), static_argnums=3)
    both = measure_all(p_RN, label_N, group_N, 2, weight_RN)
    for r in range(4):
        outside = group_metrics(p_RN[r], label_N, group_N, 2, weight_RN[r])
        inside = measure(p_RN[r], label_N, group_N, 2, weight_RN[r])
        for name, value in outside.items():
            np.testing.assert_allclose(inside[name], value, atol=SINGLE)
            np.testing.assert_allclose(both[name][r], value, atol=SINGLE)


# resamples

R = 2000


@pytest.fixture(scope="module")
def resampled():
    """Hard and random decisions on one set, with all resamples of their metrics."""
    hard_N, label_N, group_N = made_up(5)
    p_N = np.random.default_rng(5).beta(0.5 + hard_N, 1.5 - hard_N)
    return hard_N, p_N, label_N, group_N, *(bootstrap_metrics(value_N, label_N, group_N, 2, resamples=R)
                                             for value_N in (hard_N, p_N))  # fmt: skip


def test_every_group_and_class_keeps_its_size(resampled):
    hard_N, _, label_N, group_N, draws, _ = resampled
    for y, name in enumerate(("fpr_A", "tpr_A")):
        for a in range(2):
            ones_R = draws[name][:, a] * np.sum((group_N == a) & (label_N == y))
            np.testing.assert_allclose(ones_R, np.round(ones_R), atol=1e-4)  # no other size divides them all
            assert len(np.unique(np.round(ones_R))) > 10
    # Where a group and class has one probability, every resample is the set itself.
    same_N = np.array([[0.1, 0.7], [0.4, 0.6]])[group_N, label_N]
    whole = group_metrics(same_N, label_N, group_N, 2)
    for name, value_R in bootstrap_metrics(same_N, label_N, group_N, 2, resamples=50).items():
        np.testing.assert_allclose(value_R, np.broadcast_to(whole[name], value_R.shape), atol=SINGLE)


def test_means_and_spreads_are_those_of_drawing_with_replacement(resampled):
    _, p_N, label_N, group_N, _, draws = resampled
    variance, mean = 0.0, 0.0
    for a, y in np.ndindex(2, 2):
        value_M = p_N[(group_N == a) & (label_N == y)]
        rate_R = draws[("fpr_A", "tpr_A")[y]][:, a]
        spread = value_M.std() / np.sqrt(len(value_M))
        # 4.5 standard errors of a mean of R draws, and of a standard deviation.
        assert abs(rate_R.mean() - value_M.mean()) < 4.5 * spread / np.sqrt(R)
        assert abs(rate_R.std() / spread - 1) < 4.5 / np.sqrt(2 * R)
        variance += len(value_M) * value_M.var() / 240**2
        mean += np.sum(value_M if y else 1 - value_M) / 240
    # The accuracy adds the cells up: they are drawn independently.
    assert abs(draws["accuracy"].mean() - mean) < 4.5 * np.sqrt(variance / R)
    assert abs(draws["accuracy"].std() / np.sqrt(variance) - 1) < 4.5 / np.sqrt(2 * R)


def test_intervals_agree_with_a_loop(resampled):
    _, p_N, label_N, group_N, _, draws = resampled
    rng, loop_R = np.random.default_rng(9), []
    cells = [[np.flatnonzero((group_N == a) & (label_N == y)) for a in range(2)] for y in range(2)]
    for _ in range(R):
        rate_YA = [[p_N[rng.choice(row_M, len(row_M))].mean() for row_M in row] for row in cells]
        loop_R.append(np.ptp(rate_YA, axis=1).max())
    # An end of the interval of a normal variable is known to .06 standard deviations by R draws; two are compared.
    np.testing.assert_allclose(interval(draws["eo_max"]), interval(loop_R), atol=4.5 * 1.42 * 0.06 * np.std(loop_R))
    assert abs(draws["eo_max"].mean() - np.mean(loop_R)) < 4.5 * 1.42 * np.std(loop_R) / np.sqrt(R)


def test_resamples_are_of_a_seed_and_of_no_batch(resampled, monkeypatch):
    _, p_N, label_N, group_N, _, draws = resampled
    monkeypatch.setattr(metrics, "AT_ONCE", 240 * 4 * 7)  # 7 of 50 at once
    few, again = (bootstrap_metrics(p_N, label_N, group_N, 2, resamples=50, seed=seed) for seed in (0, 1))
    monkeypatch.undo()
    whole = bootstrap_metrics(p_N, label_N, group_N, 2, resamples=50)
    for name in whole:
        np.testing.assert_allclose(few[name], whole[name], atol=SINGLE)
        assert whole[name].shape == ((50, 2) if name.endswith("_A") else (50,))
    assert np.all(np.std(few["fpr_A"] - again["fpr_A"], axis=0) > 0.01)
    repeated = bootstrap_metrics(p_N, label_N, group_N, 2, resamples=R)
    assert all(np.array_equal(repeated[name], draws[name]) for name in draws)


def test_differences_of_two_predictors_are_paired(resampled):
    """Which rows a resample takes does not depend on the predictor: what differs by a constant always does."""
    _, p_N, label_N, group_N, _, draws = resampled
    lower = bootstrap_metrics(0.5 * p_N, label_N, group_N, 2, resamples=R)
    for name in ("fpr_A", "tpr_A", "selection_A", *GAPS):
        np.testing.assert_allclose(lower[name], 0.5 * draws[name], atol=SINGLE)


def test_interval_is_the_middle_95_percent():
    assert interval(np.random.default_rng(0).permutation(1001)) == (25.0, 975.0)
