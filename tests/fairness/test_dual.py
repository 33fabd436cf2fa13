"""The dual against golden tables and HiGHS, over random joints, resamples, epsilons and groups, and inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
    BINARY,
    DUAL_ERROR,
    ENSEMBLE,
    G1,
    G2,
    G4,
    MULTIPLIER,
    REDUCED,
    ROUNDED,
    collapsed,
    error,
    finite_sample,
    joint,
    rates,
)

from jaxforget.errors import UserError
from jaxforget.fairness import dual
from jaxforget.fairness.dual import solve, solve_many
from jaxforget.fairness.odds import equalized_odds, program
from jaxforget.fairness.statistics import STATISTICS, cell_counts, resample_counts, votes_of_vector

CELLS = 32  # empty cells change nothing, and counts of one shape share a compiled program
EXACT = 1e-9  # agreement in float64; found are some 1e-15


@pytest.fixture(autouse=True)
def one_size_of_batch(monkeypatch):
    monkeypatch.setattr(dual, "AT_ONCE", dual.FEWEST * 2 * CELLS)


def padded(count_AYT):
    return np.pad(count_AYT, ((0, 0), (0, 0), (0, CELLS - count_AYT.shape[-1])))


def check(count_RAYT, epsilon_R, found, constraint="odds", **settings):
    """Compare solutions with HiGHS in value and check their own certificates and rates."""
    np.testing.assert_allclose(found.value_x, found.bound_x, atol=EXACT)
    np.testing.assert_allclose(found.multiplier_xAY.sum(axis=1), 0, atol=EXACT)
    for r, (count_AYT, epsilon) in enumerate(zip(count_RAYT, epsilon_R)):
        p_AT = found.probability_xAT[r]
        assert p_AT.min() >= 0 and p_AT.max() <= 1
        gap_Y = np.ptp(rates(count_AYT, p_AT), axis=0)
        assert gap_Y[1 if constraint == "opportunity" else slice(None)].max() <= epsilon + EXACT
        settings_ = {"cost_fp": 1.0, "cost_fn": 1.0, "objective": "error", **settings}
        cost_AT, _ = program(count_AYT, **settings_)
        assert found.value_x[r] == pytest.approx(np.sum(cost_AT * p_AT), abs=EXACT)
        highs_AT = equalized_odds(count_AYT, epsilon, constraint=constraint, **settings)
        assert found.value_x[r] == pytest.approx(np.sum(cost_AT * highs_AT), abs=EXACT)


def test_golden_tables():
    cases, tables = [], []
    for (name, epsilon, objective, constraint), (table_AT, _) in BINARY.items():
        if (objective, constraint) == ("error", "odds"):
            cases.append(({"G1": G1, "G2": G2}[name], epsilon))
            tables.append(table_AT)
    for (statistic, epsilon), (table_AT, _) in ENSEMBLE.items():
        if statistic != "each":
            rule = STATISTICS[statistic]
            cases.append((collapsed(G4, np.asarray(rule.code(votes_of_vector(3))), rule.cells(3)), epsilon))
            tables.append(table_AT)
    found = solve_many(np.stack([padded(count_AYT) for count_AYT, _ in cases]), [epsilon for _, epsilon in cases])
    for (count_AYT, _), table_AT, p_AT in zip(cases, tables, found.probability_xAT, strict=True):
        np.testing.assert_allclose(p_AT[:, : count_AYT.shape[-1]], table_AT, atol=ROUNDED)
    check([padded(count_AYT) for count_AYT, _ in cases], [epsilon for _, epsilon in cases], found)


def test_golden_multipliers():
    found = solve_many(padded(G4))
    price_AY = found.multiplier_xAY
    np.testing.assert_allclose(price_AY, MULTIPLIER, atol=ROUNDED)
    assert 0.5 + found.bound_x == pytest.approx(DUAL_ERROR, abs=ROUNDED)
    cost_AT, rate_AYT = program(G4, "error", 1.0, 1.0)
    reduced_AT = cost_AT - np.einsum("ayt,ay->at", rate_AYT, price_AY)
    np.testing.assert_allclose(reduced_AT, REDUCED, atol=ROUNDED)
    # The rule that turns multipliers into decisions.
    p_AT = found.probability_xAT[:, :8]
    assert np.all(p_AT[reduced_AT < -EXACT] == 1) and np.all(p_AT[reduced_AT > EXACT] == 0)
    assert np.sum(np.abs(reduced_AT) <= EXACT) == 2


@pytest.mark.parametrize("groups", [2, 3])
def test_random_joints(groups):
    rng = np.random.default_rng(groups)
    joint_RAYT = np.stack([padded(joint(rng, int(rng.integers(2, 6)), groups)) for _ in range(128)])
    epsilon_R = rng.choice([0, 0, 0.02, 0.1, 0.5], 128)
    check(joint_RAYT, epsilon_R, solve_many(joint_RAYT, epsilon_R))


@pytest.mark.parametrize(
    "settings",
    [
        dict(objective="aif360"),
        pytest.param(dict(objective="pleiss", constraint="opportunity", cost_fp=2.0), id="pleiss, opportunity, costs"),
    ],
    ids=str,
)
def test_other_programs_of_many_groups(settings):
    rng = np.random.default_rng(5)
    count_RAYT = rng.poisson(rng.gamma(0.7, 8.0, (32, 6, 2, 7))).astype(float)  # small numbers, with ties and gaps
    count_RAYT[:, :, :, 0] += 1
    epsilon_R = rng.choice([0, 0.03], 32)
    check(count_RAYT, epsilon_R, solve_many(count_RAYT, epsilon_R, **settings), **settings)


def test_degenerate_programs():
    """Ties everywhere: equal cells, equal groups, useless votes, perfect votes, small whole numbers."""
    rng = np.random.default_rng(0)
    same = np.repeat(G4[:1], 2, axis=0)
    useless = np.broadcast_to(np.array([[10.0], [20.0]])[None], (2, 2, 8)).copy()
    perfect = np.zeros((2, 2, 8))
    perfect[:, 0, 0], perfect[:, 1, 7] = 5, 9
    twins = np.repeat(G4[..., :4], 2, axis=2)
    counts = [same, useless, perfect, twins, np.ones((2, 2, 8)), G4[:, ::-1]]
    while len(counts) < 120:
        count_AYT = rng.integers(0, 3, (2, 2, 8)).astype(float)
        if count_AYT.sum(axis=-1).min() > 0:
            counts.append(count_AYT)
    count_RAYT = np.stack([padded(count_AYT) for count_AYT in counts])
    epsilon_R = rng.choice([0, 0.1, 1], len(counts))
    check(count_RAYT, epsilon_R, solve_many(count_RAYT, epsilon_R))


def test_resamples_are_a_loop_over_highs():
    votes_NK, label_N, group_N = finite_sample(np.random.default_rng(0), 9, 1922)
    count_AYT = np.asarray(cell_counts(STATISTICS["count"].code(votes_NK), label_N, group_N, 10, 2))
    count_RAYT = resample_counts(count_AYT, 120)
    assert np.array_equal(count_RAYT.sum(axis=-1), np.broadcast_to(count_AYT.sum(axis=-1), (120, 2, 2)))
    count_RAYT = np.stack([padded(one) for one in count_RAYT])
    found = solve_many(count_RAYT)
    check(count_RAYT, np.zeros(120), found)
    wrong = [error(one, p_AT) for one, p_AT in zip(count_RAYT, found.probability_xAT)]
    assert 0 < np.std(wrong) < 0.02  # they do differ, by about the sampling error


def test_leading_axes_and_batches():
    counts = np.stack([padded(G4), padded(G4[::-1]), padded(G4[:, ::-1])])
    epsilons = [0.0, 0.02, 0.05, 0.1]
    grid = solve_many(counts[:, None], epsilons)
    assert grid.probability_xAT.shape == (3, 4, 2, CELLS) and grid.multiplier_xAY.shape == (3, 4, 2, 2)
    assert grid.value_x.shape == grid.bound_x.shape == (3, 4)
    assert np.all(np.diff(grid.value_x, axis=1) <= EXACT)  # more is allowed, less is lost
    one = solve_many(counts[0], 0.02)
    assert one.probability_xAT.shape == (2, CELLS) and one.value_x.shape == ()
    np.testing.assert_allclose(one.probability_xAT, grid.probability_xAT[0, 1], atol=1e-12)
    many = solve_many(np.concatenate([counts] * 25), 0.02)  # 2 full batches and one that is filled up
    np.testing.assert_allclose(many.probability_xAT, np.concatenate([grid.probability_xAT[:, 1]] * 25), atol=1e-12)


def test_cells_without_data_and_groups_without_a_class():
    counts = np.stack([padded(G4)] * 5)
    counts[3, 1, 0] = 0
    found = solve_many(counts, empty_AT=np.arange(CELLS)[None] % 2)
    assert np.all(found.probability_xAT[0, :, 8:] == np.arange(8, CELLS)[None] % 2)
    for part in found:
        assert np.isnan(part[3]).all() and not np.isnan(np.delete(part, 3, axis=0)).any()


def test_inside_jit_in_single_precision():
    """Votes to a refitted predictor, resamples and subsets of members side by side, in JAX's default float."""
    votes_NK, label_N, group_N = finite_sample(np.random.default_rng(1), 5, 1000)
    weight_RN = np.random.default_rng(2).multinomial(1000, np.full(1000, 1e-3), 4).astype(np.float32)
    member_SK = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 1, 1, 0]])

    @jax.jit
    def refit(weight_RN, member_SK, epsilon):
        def one(weight_N, member_K):
            code_N = STATISTICS["count"].code(jnp.asarray(votes_NK) * member_K[None])
            count_AYT = cell_counts(code_N, label_N, group_N, 6, 2, weight_N)
            return count_AYT, solve(count_AYT, epsilon)

        return jax.vmap(lambda weight_N: jax.vmap(lambda member_K: one(weight_N, member_K))(member_SK))(weight_RN)

    counts, found = refit(weight_RN, member_SK, 0.02)
    assert found.probability_xAT.dtype == jnp.float32 and found.probability_xAT.shape == (4, 3, 2, 6)
    for r, s in np.ndindex(4, 3):
        code_N = (votes_NK * member_SK[s]).sum(axis=1)
        count_AYT = np.zeros((2, 2, 6))
        np.add.at(count_AYT, (group_N, label_N, code_N), weight_RN[r])
        assert np.array_equal(counts[r, s], count_AYT)
        p_AT = np.asarray(found.probability_xAT[r, s], np.float64)
        # float32 has 7 digits, and the basis of a program costs it one or two.
        assert np.ptp(rates(count_AYT, p_AT), axis=0).max() < 0.02 + 1e-5
        assert error(count_AYT, p_AT) == pytest.approx(error(count_AYT, equalized_odds(count_AYT, 0.02)), abs=3e-6)


def test_bad_settings():
    with pytest.raises(UserError, match=r"epsilon is \[0.0, 2.0\]"):
        solve_many(G4, [0.0, 2.0])
    with pytest.raises(UserError, match="unknown objective 'f1'; valid names are error, aif360, pleiss"):
        solve_many(G4, objective="f1")
    with pytest.raises(ValueError, match="count_xAYT has shape"):
        solve_many(G4[0])
