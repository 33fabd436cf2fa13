"""Hard-concrete gates: known values, probabilities against draws, and that the penalty alone closes a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad

from jaxforget.debiasing.gates import GateConfig, open_probability, sample, stretched
from jaxforget.errors import UserError

WIDE, NARROW = GateConfig(), GateConfig(low=-0.1, high=1.1)

# bounds, alpha, z without noise, P(z > 0), its slope by alpha: computed with decimals outside of this code.
KNOWN = [
    (WIDE, 5.0, 1.0, 0.993307, 0.00664806),
    (WIDE, 2.0, 1.0, 0.880797, 0.104994),
    (WIDE, 1.0, 0.693176, 0.731059, 0.196612),
    (WIDE, 0.5, 0.367378, 0.622459, 0.235004),
    (WIDE, -1.0, 0.0, 0.268941, 0.196612),
    (NARROW, 2.0, 0.956956, 0.987846, 0.012006),
    (NARROW, 0.0, 0.5, 0.916667, 0.0763889),
    (NARROW, -1.0, 0.22273, 0.80185, 0.158887),
]


@pytest.mark.parametrize("config, alpha, z, probability, slope", KNOWN)
def test_known_values_without_noise(config, alpha, z, probability, slope):
    assert float(stretched(jnp.float32(alpha), config)) == pytest.approx(z, abs=1e-6)
    assert float(open_probability(alpha, config)) == pytest.approx(probability, abs=1e-6)
    assert float(jax.grad(lambda a: open_probability(a, config))(alpha)) == pytest.approx(slope, rel=2e-5)


@pytest.mark.parametrize("alpha, u, z, slope", [
    (0.0, 0.6, 0.3, 0.72), (0.0, 0.9, 1.0, 0.0), (1.0, 0.5, 0.693176, 0.589836), (1.0, 0.2, 0.0, 0.0),
    (-1.0, 0.9, 0.804092, 0.534479), (-1.0, 0.7, 0.0, 0.0), (5.0, 0.01, 0.299579, 0.720084),
])  # fmt: skip
def test_known_values_with_noise(alpha, u, z, slope):
    value, grad = jax.value_and_grad(lambda a: stretched(a, WIDE, jnp.float32(u)))(jnp.float32(alpha))
    assert (float(value), float(grad)) == pytest.approx((z, slope), abs=1e-5)


def test_all_goldens_of_the_development_data(shared):
    import json

    rows = json.loads((shared / "papers/golden_dp.json").read_text())["gate"]
    for config, name in ((WIDE, "rows"), (NARROW, "rows_bounds_-0.1_1.1")):
        for row in rows[name]:
            z, slope = jax.value_and_grad(lambda a, config=config: stretched(a, config))(jnp.float32(row["alpha"]))
            assert float(z) == pytest.approx(row["z_det"], abs=2e-6)
            assert float(open_probability(row["alpha"], config)) == pytest.approx(row["p_nonzero"], abs=2e-6)
            if row["dz_dalpha_det"] is not None:
                assert float(slope) == pytest.approx(row["dz_dalpha_det"], abs=2e-6)


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["wide", "narrow"])
def test_draws_have_the_stated_probabilities_and_mean(config):
    count, alpha_A = 200_000, np.asarray([2.0, 0.5, -1.0], np.float32)
    z_NA = sample(jnp.broadcast_to(alpha_A[None], (count, 3)), config, jax.random.key(0))
    edge = 1 / (1 + np.exp(-(alpha_A - np.log((1 - config.low) / (config.high - 1)))))  # P(z = 1)
    mean = [
        quad(lambda t, a=a: 1 / (1 + np.exp(-(a - np.log((t - config.low) / (config.high - t))))), 0, 1)[0]
        for a in alpha_A
    ]
    # Three standard errors of a share of 200,000 draws, and the draws' noise is cut at 1e-4.
    close = {"atol": 3 * 0.5 / np.sqrt(count) + 1e-4}
    np.testing.assert_allclose((z_NA > 0).mean(axis=0), open_probability(alpha_A, config), **close)
    np.testing.assert_allclose((z_NA == 1).mean(axis=0), edge, **close)
    np.testing.assert_allclose(z_NA.mean(axis=0), mean, **close)


@pytest.mark.parametrize("penalty, epsilon, steps", [(1.25e-7, 1e-12, 42), (1.25e-7, 1e-8, 174), (1e-5, 1e-8, 44)])
def test_steps_until_a_gate_without_task_closes(penalty, epsilon, steps):
    """Adam at rate 0.1: with its usual epsilon the number depends on the penalty's size, with a small one not."""
    adam = optax.adam(0.1, eps=epsilon)

    def body(carry):
        alpha, state, n = carry
        grad = penalty * jax.grad(lambda a: open_probability(a, WIDE))(alpha)
        update, state = adam.update(grad, state)
        return alpha + update, state, n + 1

    alpha = jnp.float32(5.0)
    *_, n = jax.jit(lambda carry: jax.lax.while_loop(lambda c: c[0] > 0, body, carry))((alpha, adam.init(alpha), 0))
    assert int(n) == steps


@pytest.mark.parametrize("bounds", [{"low": 0.0}, {"high": 1.0}])
def test_bounds_that_never_close_or_open_are_refused(bounds):
    with pytest.raises(UserError, match=next(iter(bounds))):
        GateConfig(**bounds)
