"""Aggregation against loops, member by member; who does not count does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.sisa.aggregation import AGGREGATIONS, aggregate, choose

K, B, T, C = 5, 3, 4, 6
LOGITS = np.random.default_rng(0).normal(size=(K, B, T, C)) * 3
LOGP = LOGITS - np.log(np.exp(LOGITS).sum(axis=-1, keepdims=True))
WEIGHT = np.array([3.0, 0.0, 1.0, 2.0, 5.0])
names = pytest.mark.parametrize("name", AGGREGATIONS)


def reference(name, logp_KxC, weight_K):
    """Aggregate in float64, one prediction and one member at a time."""
    result = np.zeros(logp_KxC.shape[1:])
    for place in np.ndindex(*logp_KxC.shape[1:-1]):
        if name == "mean_logits":
            result[place] = 1.0
        for k, weight in enumerate(weight_K / weight_K.sum()):
            logp_C = logp_KxC[(k, *place)]
            if name == "majority":
                result[place][max(range(len(logp_C)), key=lambda c: (logp_C[c], -c))] += weight
            elif name == "mean_probability":
                result[place] += weight * np.exp(logp_C)
            else:  # a weighted geometric mean
                result[place] *= np.exp(logp_C) ** weight
        result[place] /= result[place].sum()
    return result


@names
@pytest.mark.parametrize("weight_K", [None, WEIGHT])
@pytest.mark.parametrize("shape", [(K, B, T, C), (K, B, C), (K, C)])
def test_against_a_loop(name, weight_K, shape):
    logp_KxC = LOGP.reshape(K, -1, C)[:, : int(np.prod(shape[1:-1]))].reshape(shape)
    expected = reference(name, logp_KxC, np.ones(K) if weight_K is None else weight_K)
    result = aggregate(name, jnp.asarray(logp_KxC, jnp.float32), weight_K)
    assert result.dtype == jnp.float32 and result.shape == shape[1:]
    # float32, log p down to -20: relative error 20 * 6e-8 in the exponent.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


@names
def test_a_running_sum_is_the_same(name):
    rule, logp = choose(name), jnp.asarray(LOGP, jnp.float32)
    total = jnp.zeros((B, T, C))
    for k in range(K):
        total = total + WEIGHT[k] * rule.each(logp[k])
    # Only the order of five float32 additions differs.
    np.testing.assert_allclose(rule.finish(total / WEIGHT.sum()), aggregate(name, logp, WEIGHT), rtol=2e-6, atol=1e-7)


@names
def test_members_of_weight_0_count_for_nothing(name):
    logp = jnp.asarray(LOGP, jnp.float32)
    kept = aggregate(name, logp[jnp.array([0, 2, 3, 4])], WEIGHT[[0, 2, 3, 4]])
    for value in (jnp.nan, jnp.inf, -jnp.inf, 0.0):
        assert np.array_equal(aggregate(name, logp.at[1].set(value), WEIGHT), kept)
    assert np.array_equal(aggregate(name, logp, WEIGHT), kept)


@names
def test_jit_changes_nothing(name):
    logp = jnp.asarray(LOGP, jnp.float32)
    # Fused code may round differently in the last bits.
    compiled = jax.jit(lambda logp: aggregate(name, logp, WEIGHT))(logp)
    np.testing.assert_allclose(compiled, aggregate(name, logp, WEIGHT), rtol=2e-6, atol=1e-7)


@names
def test_the_order_and_the_scale_of_members_do_not_matter(name):
    logp, turned = jnp.asarray(LOGP, jnp.float32), np.array([3, 0, 4, 1, 2])
    result = aggregate(name, logp, WEIGHT)
    for other in (aggregate(name, logp[turned], WEIGHT[turned]), aggregate(name, logp, 7 * WEIGHT)):
        np.testing.assert_allclose(other, result, rtol=2e-6, atol=1e-7)
    # A member twice is a member of weight 2.
    twice = aggregate(name, jnp.concatenate([logp, logp[:1]]))
    np.testing.assert_allclose(twice, aggregate(name, logp, [2, 1, 1, 1, 1]), rtol=2e-6, atol=1e-7)


def test_one_member():
    logp = jnp.asarray(LOGP[:1], jnp.float32)
    probability = np.exp(LOGP[0])
    assert np.array_equal(aggregate("mean_probability", logp), jnp.exp(logp[0]))
    np.testing.assert_allclose(aggregate("mean_logits", logp), probability, rtol=1e-5)
    assert np.array_equal(aggregate("majority", logp), np.eye(C)[probability.argmax(-1)])


def test_logits_and_log_probabilities_give_the_same():
    from_logits = aggregate("mean_logits", jnp.asarray(LOGITS, jnp.float32), WEIGHT)
    from_logp = aggregate("mean_logits", jnp.asarray(LOGP, jnp.float32), WEIGHT)
    np.testing.assert_allclose(from_logits, from_logp, rtol=1e-5)


def test_ties_go_to_the_smallest_class():
    # Classes 1 and 2 are equally likely to a member: it votes for 1.
    one = jnp.log(jnp.array([[0.2, 0.4, 0.4]]))
    assert aggregate("majority", one).tolist() == [0.0, 1.0, 0.0]
    # Six members, three votes for each of two classes, in every order: equal shares, so argmax is the smaller class.
    rng = np.random.default_rng(0)
    for votes in [rng.permutation([1, 1, 1, 2, 2, 2]) for _ in range(10)]:
        share = aggregate("majority", jnp.asarray(np.eye(3)[votes] - 1, jnp.float32))
        assert share.tolist() == [0.0, 0.5, 0.5] and int(share.argmax()) == 1
    # Whole weights: 2 + 4 + 1 against 7, though 2/14 + 4/14 + 1/14 is not a half in float32.
    share = aggregate("majority", jnp.asarray(np.eye(3)[[2, 2, 2, 1]] - 1, jnp.float32), [2, 4, 1, 7])
    assert share.tolist() == [0.0, 0.5, 0.5]


def test_an_outvoted_confident_member():
    # Votes 2 to 1 for class 0; mean probability .4, .6; geometric mean (.6 .6 .001)^(1/3) against (.4 .4 .999)^(1/3).
    logp = jnp.log(jnp.array([[0.6, 0.4], [0.6, 0.4], [0.001, 0.999]]))
    assert aggregate("majority", logp)[0] == pytest.approx(2 / 3)
    assert aggregate("mean_probability", logp)[0] == pytest.approx((0.6 + 0.6 + 0.001) / 3)
    a, b = (0.6 * 0.6 * 0.001) ** (1 / 3), (0.4 * 0.4 * 0.999) ** (1 / 3)
    assert aggregate("mean_logits", logp)[0] == pytest.approx(a / (a + b), rel=1e-5)


def test_half_precision_is_averaged_in_single():
    logp = jnp.asarray(LOGP, jnp.bfloat16)
    for name in AGGREGATIONS:
        result = aggregate(name, logp)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, aggregate(name, logp.astype(jnp.float32)), rtol=0, atol=0)


@pytest.mark.parametrize("weight_K", [[1, 1, -1, 1, 1], [0] * 5, [1, 1, np.nan, 1, 1], [1, 1], np.ones((5, 1))])
def test_wrong_weights(weight_K):
    with pytest.raises(ValueError, match="weight_K"):
        aggregate("majority", jnp.asarray(LOGP, jnp.float32), weight_K)


def test_misspelt_name():
    with pytest.raises(UserError, match="'mean'.*majority, mean_probability, mean_logits"):
        aggregate("mean", jnp.asarray(LOGP, jnp.float32))
