"""The linear program against golden tables, on random joints, at its limits, and against fairlearn."""

import numpy as np
import pytest
from golden import BINARY, ENSEMBLE, G1, G2, G4, MEMBERS, NAMES, ROUNDED, collapsed, error, gap, joint, rates

from jaxforget.errors import UserError
from jaxforget.fairness.odds import OBJECTIVES, equalized_odds, program, score_thresholds
from jaxforget.fairness.statistics import STATISTICS, votes_of_vector

COUNTS = {"G1": G1, "G2": G2}


def by_statistic(name, joint_AYT, members):
    rule = STATISTICS[name]
    return collapsed(joint_AYT, np.asarray(rule.code(votes_of_vector(members))), rule.cells(members))


def fractional(p_AT):
    return int(np.sum((p_AT > 1e-9) & (p_AT < 1 - 1e-9)))


@pytest.mark.parametrize("case", BINARY, ids=str)
def test_golden_tables_of_one_predictor(case):
    name, epsilon, objective, constraint = case
    table_AT, (accuracy, fpr_A, tpr_A, eo_max, *_) = BINARY[case]
    p_AT = equalized_odds(COUNTS[name], epsilon, objective=objective, constraint=constraint)
    np.testing.assert_allclose(p_AT, table_AT, atol=ROUNDED)
    np.testing.assert_allclose(rates(COUNTS[name], p_AT), np.transpose([fpr_A, tpr_A]), atol=ROUNDED)
    assert error(COUNTS[name], p_AT) == pytest.approx(1 - accuracy, abs=ROUNDED)
    assert gap(COUNTS[name], p_AT).max() == pytest.approx(eo_max, abs=ROUNDED)


@pytest.mark.parametrize("case", [case for case in ENSEMBLE if case[0] != "each"], ids=str)
def test_golden_tables_of_an_ensemble(case):
    statistic, epsilon = case
    count_AYT = by_statistic(statistic, G4, 3)
    p_AT = equalized_odds(count_AYT, epsilon)
    np.testing.assert_allclose(p_AT, ENSEMBLE[case][0], atol=ROUNDED)
    assert error(count_AYT, p_AT) == pytest.approx(1 - ENSEMBLE[case][1][0], abs=ROUNDED)


@pytest.mark.parametrize("k", range(3))
def test_golden_tables_of_members(k):
    count_AYT = collapsed(G4, votes_of_vector(3)[:, k], 2)
    raw, table_AT, (accuracy, *_) = MEMBERS[k]
    p_AT = equalized_odds(count_AYT)
    np.testing.assert_allclose(p_AT, table_AT, atol=ROUNDED)
    assert error(count_AYT, p_AT) == pytest.approx(1 - accuracy, abs=ROUNDED)
    assert error(count_AYT, np.array([[0, 1], [0, 1]])) == pytest.approx(1 - raw[0], abs=ROUNDED)


def test_random_joints():
    """What looks at more of the votes errs no more; rates are equal or within epsilon; solutions are vertices."""
    rng, strict = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(300):
        K, A = int(rng.integers(2, 6)), int(rng.integers(2, 4))
        joint_AYT = joint(rng, K, A)
        errors = []
        for name in ("vector", "count", "majority"):
            count_AYT = by_statistic(name, joint_AYT, K)
            p_AT = equalized_odds(count_AYT)
            assert p_AT.min() >= 0 and p_AT.max() <= 1
            assert gap(count_AYT, p_AT).max() < 1e-9
            assert fractional(p_AT) <= 2 * (A - 1)
            errors.append(error(count_AYT, p_AT))
        assert errors[0] <= errors[1] + 1e-9 and errors[1] <= errors[2] + 1e-9
        strict += np.diff(errors) > 1e-6
        before, epsilon = errors[0], 0.0
        for epsilon in np.sort(rng.uniform(0.005, 0.2, 2)):
            p_AT = equalized_odds(joint_AYT, epsilon)
            assert gap(joint_AYT, p_AT).max() < epsilon + 1e-9
            assert error(joint_AYT, p_AT) <= before + 1e-9
            before = error(joint_AYT, p_AT)
    assert strict.min() > 150  # it is not that all of them always agree


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_constraint_leaves_the_best_decision_of_every_cell(objective):
    cost_AT, _ = program(G4, objective, 1.0, 1.0)
    assert np.array_equal(equalized_odds(G4, 1.0, objective=objective), cost_AT < 0)
    same = np.stack([G4[0], G4[0]])  # groups that do not differ: equal rates cost nothing
    cost_AT, _ = program(same, objective, 1.0, 1.0)
    # A dearest vertex among equals is a matter of rounding: compare what it costs.
    found = np.sum(cost_AT * equalized_odds(same, objective=objective))
    assert found == pytest.approx(np.minimum(cost_AT, 0).sum(), abs=1e-12)


def test_one_group_has_nothing_to_equalize():
    p_AT = equalized_odds(G4[:1])
    assert np.array_equal(p_AT, G4[:1, 1] > G4[:1, 0])


def test_objectives_are_what_they_are_named_after():
    rng = np.random.default_rng(1)
    p_AT = rng.random((2, 8))
    (fpr_A, tpr_A), n_AY = rates(G4, p_AT).T, G4.sum(axis=-1)
    by_group_A = (n_AY[:, 0] * fpr_A + n_AY[:, 1] * (1 - tpr_A)) / n_AY.sum(axis=1)
    expected = {
        "error": error(G4, p_AT) - n_AY[:, 1].sum() / n_AY.sum(),
        "aif360": np.sum(fpr_A - tpr_A),
        "pleiss": np.sum(by_group_A - n_AY[:, 1] / n_AY.sum(axis=1)),
    }
    for name, value in expected.items():
        assert np.sum(program(G4, name, 1.0, 1.0)[0] * p_AT) == pytest.approx(value)


def test_opportunity_leaves_false_positives_alone():
    rng = np.random.default_rng(2)
    for _ in range(20):
        joint_AYT = joint(rng, 3, 3)
        p_AT = equalized_odds(joint_AYT, constraint="opportunity")
        assert gap(joint_AYT, p_AT)[1] < 1e-9
        assert error(joint_AYT, p_AT) <= error(joint_AYT, equalized_odds(joint_AYT)) + 1e-9
        assert fractional(p_AT) <= 2


def test_costs():
    assert equalized_odds(G4, cost_fn=0.0).sum() == 0 and equalized_odds(G4, cost_fp=0.0).mean() == 1
    np.testing.assert_allclose(equalized_odds(G4, cost_fp=3.0, cost_fn=3.0), ENSEMBLE["vector", 0.0][0], atol=ROUNDED)
    rate = [rates(G4, equalized_odds(G4, cost_fn=cost))[0] for cost in (0.2, 0.5, 1.0, 2.0, 5.0)]
    assert np.all(np.diff(rate, axis=0) >= -1e-9) and rate[-1][0] > 0.4 > 0.1 > rate[0][0]  # dear misses: more 1s


def test_scale_and_order_of_groups_do_not_matter():
    p_AT = equalized_odds(G4, 0.02)
    np.testing.assert_allclose(equalized_odds(G4 / 7, 0.02), p_AT, atol=1e-9)
    np.testing.assert_allclose(equalized_odds(G4[::-1], 0.02)[::-1], p_AT, atol=1e-9)


def test_cells_without_data():
    with_gaps = np.insert(G4, [0, 3, 8], 0, axis=2)
    default_AT = np.broadcast_to(np.arange(11) % 3 / 2, (2, 11))
    p_AT = equalized_odds(with_gaps, empty_AT=default_AT)
    filled = with_gaps.sum(axis=(0, 1)) > 0
    np.testing.assert_allclose(p_AT[:, filled], ENSEMBLE["vector", 0.0][0], atol=ROUNDED)
    assert np.array_equal(p_AT[:, ~filled], default_AT[:, ~filled])
    assert np.all(equalized_odds(with_gaps, empty_AT=1.0)[:, ~filled] == 1)
    # Empty in one group alone: that group's entry is the default, the other's is fitted.
    one = G4.copy()
    one[0, :, 6] = 0
    assert equalized_odds(one, empty_AT=0.25)[0, 6] == 0.25


BAD = [
    (dict(epsilon=-0.1), "epsilon is -0.1; it must be between 0 and 1"),
    (dict(epsilon=1.5), "epsilon is 1.5"),
    (dict(epsilon=np.nan), "epsilon is nan"),
    (dict(objective="accuracy"), "'accuracy'; valid names are error, aif360, pleiss"),
    (dict(constraint="parity"), "'parity'; valid names are odds, opportunity"),
    (dict(cost_fp=-1.0), "cost_fp is -1.0"),
    (dict(cost_fn=np.inf), "cost_fn is inf"),
]


@pytest.mark.parametrize("settings, said", BAD)
def test_bad_settings(settings, said):
    with pytest.raises(UserError, match=said):
        equalized_odds(G1, **settings)


def test_a_group_without_a_class_is_named():
    lacking = G1.copy()
    lacking[1, 0] = 0
    with pytest.raises(UserError, match="group 1 has no example of label 0.*pool"):
        equalized_odds(lacking)
    lacking[0, 1] = 0
    with pytest.raises(UserError, match="group 'first' has no example of label 1; group 'second' has no .* label 0"):
        equalized_odds(lacking, groups=NAMES)


@pytest.mark.parametrize("wrong", [G1[0], G1[:, :1], -G1, G1 * np.nan])
def test_what_are_no_counts(wrong):
    with pytest.raises(ValueError, match="count_AYT"):
        equalized_odds(wrong)


# soft scores


def soft(seed, examples=600, groups=2):
    """Scores that tell more of the label in one group than in the next."""
    rng = np.random.default_rng(seed)
    group_N = rng.integers(0, groups, examples)
    label_N = (rng.random(examples) < 0.35 + 0.2 * group_N).astype(int)
    score_N = rng.normal(size=examples) + (0.6 + 0.5 * group_N) * (2 * label_N - 1) + 0.3 * group_N
    return np.round(score_N, 2).astype(np.float32), label_N, group_N  # rounded: some are equal


def applied(found, score_N, group_N):
    base_A, thresholds, weights = found
    return np.array([base_A[a] + weights[a][score >= thresholds[a]].sum() for score, a in zip(score_N, group_N)])


def turns_right(a, b, c):
    return (b[0] - a[0]) * (c[1] - a[1]) < (b[1] - a[1]) * (c[0] - a[0])


def test_thresholds_of_a_binary_score_are_the_golden_table():
    group_N, label_N, score_N = (np.repeat(v, G1.astype(int).reshape(-1)) for v in np.indices(G1.shape).reshape(3, -1))
    base_A, thresholds, weights = score_thresholds(score_N, label_N, group_N)
    np.testing.assert_allclose(base_A, [0.346667, 0], atol=ROUNDED)
    assert [list(t) for t in thresholds] == [[1], [1]]
    np.testing.assert_allclose(np.concatenate(weights), [0.88 - 0.346667, 1], atol=2 * ROUNDED)


@pytest.mark.parametrize("groups", [2, 3])
def test_thresholds_have_equal_rates_and_are_few(groups):
    for seed in range(5):
        score_N, label_N, group_N = soft(seed, groups=groups)
        before = 1.0
        for epsilon in (0.0, 0.03, 0.1):
            found = score_thresholds(score_N, label_N, group_N, epsilon)
            p_N = applied(found, score_N, group_N)
            rate_AY = [[p_N[(group_N == a) & (label_N == y)].mean() for y in (0, 1)] for a in range(groups)]
            assert np.ptp(rate_AY, axis=0).max() < epsilon + 1e-9
            wrong = np.mean(np.where(label_N == 1, 1 - p_N, p_N))
            assert wrong <= before + 1e-9
            before = wrong
            base_A, thresholds, weights = found
            never_A = 1 - base_A - [w.sum() for w in weights]
            used = sum(map(len, thresholds)) + np.sum(base_A > 1e-9) + np.sum(never_A > 1e-9)
            assert min(map(min, weights)) > 0 and never_A.min() > -1e-9
            if epsilon == 0:
                assert used <= groups + 2 * (groups - 1)


def test_thresholds_are_the_best_point_below_all_roc_hulls():
    score_N, label_N, group_N = soft(7)
    fpr = np.linspace(0, 1, 20001)
    tpr = np.ones_like(fpr)
    for a in range(2):
        mine, truth = score_N[group_N == a], label_N[group_N == a]
        roc = [(np.mean(mine[truth == 0] >= s), np.mean(mine[truth == 1] >= s)) for s in np.unique(mine)]
        hull = []
        for point in [(0.0, 0.0), *sorted(roc)]:
            while len(hull) > 1 and not turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        tpr = np.minimum(tpr, np.interp(fpr, *np.transpose(hull)))
    share = label_N.mean()
    best = np.min((1 - share) * fpr + share * (1 - tpr))
    p_N = applied(score_thresholds(score_N, label_N, group_N), score_N, group_N)
    wrong = np.mean(np.where(label_N == 1, 1 - p_N, p_N))
    assert best - 1e-4 < wrong <= best + 1e-9  # the grid misses the best point by a step at most


def test_bad_scores():
    score_N, label_N, group_N = soft(0, 50)
    with pytest.raises(UserError, match="score of example 3 is not finite"):
        score_thresholds(np.where(np.arange(50) == 3, np.nan, score_N), label_N, group_N)
    with pytest.raises(UserError, match="group 'second' has no example of label 1"):
        score_thresholds(score_N, np.where(group_N == 1, 0, label_N), group_N, groups=NAMES)


# fairlearn


def optimizer(score_N, label_N, group_N, flip, method="predict"):
    """The expected output of fairlearn's ThresholdOptimizer."""
    pytest.importorskip("fairlearn")
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            self.classes_, self.fitted_ = np.array([0, 1]), True
            return self

        def predict(self, X):
            return X[:, 0]

    fitted = Given().fit(None, None)
    tuned = ThresholdOptimizer(estimator=fitted, constraints="equalized_odds", objective="accuracy_score", prefit=True,
                               predict_method=method, grid_size=20001, flip=flip)  # fmt: skip
    column_N1 = np.asarray(score_N, float)[:, None]
    tuned.fit(column_N1, label_N, sensitive_features=group_N)
    return tuned._pmf_predict(column_N1, sensitive_features=group_N)[:, 1]


@pytest.mark.parity
@pytest.mark.parametrize("name", COUNTS)
def test_a_binary_predictor_agrees_with_fairlearn(name):
    count_AYT = COUNTS[name]
    group_N, label_N, vote_N = (
        np.repeat(v, count_AYT.astype(int).reshape(-1)) for v in np.indices(count_AYT.shape).reshape(3, -1)
    )
    theirs_N = optimizer(vote_N, label_N, group_N, flip=True)
    # Theirs is the best of a grid of false positive rates, 5e-5 apart.
    np.testing.assert_allclose(equalized_odds(count_AYT)[group_N, vote_N], theirs_N, atol=2e-4)


@pytest.mark.parity
def test_soft_scores_agree_with_fairlearn():
    for seed in range(3):
        score_N, label_N, group_N = soft(seed)
        theirs_N = optimizer(score_N, label_N, group_N, flip=False)
        ours_N = applied(score_thresholds(score_N, label_N, group_N), score_N, group_N)
        theirs, ours = (np.mean(np.where(label_N == 1, 1 - p_N, p_N)) for p_N in (theirs_N, ours_N))
        assert theirs - 2e-4 < ours < theirs + 1e-9
