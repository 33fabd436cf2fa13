"""The same clipped sums, correlated noise and accounting as jax_privacy, where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxforget.models import gpt2
from jaxforget.models.model import build
from jaxforget.privacy.accounting import Mechanism
from jaxforget.privacy.clipping import Clipping, clipped_sum
from jaxforget.privacy.noise import band_coefficients, gaussian_noise
from jaxforget.training.objectives import next_token

jax_privacy = pytest.importorskip("jax_privacy")


@pytest.mark.parametrize("estimator", ["vmap", "ghost", "bookkeep"])
def test_clipped_sums(estimator):
    """The bound is the median norm, so that half of the units are cut."""
    model = build(gpt2.Config(vocab_size=31, n_positions=12, n_embd=8, n_layer=2, n_head=2))
    params, token_BT = model.init(jax.random.key(0)), jax.random.randint(jax.random.key(1), (6, 9), 1, 31)
    ones = jnp.ones(6)
    batch = {"tokens": token_BT[:, :-1], "labels": token_BT[:, 1:], "weight": ones, "factor": ones}
    objective, key = next_token(model), jax.random.key(0)

    def losses(moving, batch, key):
        return objective(moving, batch, key)

    def loss(params, one):
        return jnp.mean(objective({"model": params}, one, key))

    ours = clipped_sum(losses, {"model": params}, batch, key, jnp.float32(1e9), Clipping(estimator))
    bound = jnp.median(ours.norm_GU)
    ours = clipped_sum(losses, {"model": params}, batch, key, bound, Clipping(estimator))
    theirs, more = jax_privacy.clipped_grad(
        loss, l2_clip_norm=float(bound), batch_argnums=1, keep_batch_dim=True, return_grad_norms=True
    )(params, batch)
    np.testing.assert_allclose(ours.norm_GU[0], more.grad_norms, rtol=1e-5)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours.total["model"]), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


def test_correlated_noise():
    from jax_privacy.matrix_factorization import toeplitz

    bands, steps = 4, 12
    theirs = toeplitz.inverse_as_streaming_matrix(jnp.asarray(band_coefficients(bands)))
    zero, independent = jnp.zeros(5), gaussian_noise()
    memory, ours = theirs.init_multiply(zero), gaussian_noise(band_coefficients(bands, steps))
    state, alone = (one.init(zero)._replace(multiplier=jnp.float32(1.0)) for one in (ours, independent))
    for step in range(steps):
        how = {"key": jax.random.fold_in(jax.random.key(0), step), "report": {"sensitivity": 1.0}}
        found, state = ours.update(zero, state, **how)
        z, alone = independent.update(zero, alone, **how)
        expected, memory = theirs.multiply_next(z, memory)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_coefficients_are_the_best():
    """Mean squared error of prefix sums, against coefficients from another search: at most 0.1 % more."""
    from jax_privacy.matrix_factorization import toeplitz

    for bands, steps in ((2, 100), (8, 200), (32, 1000)):
        error = lambda c: float(toeplitz.loss(jnp.asarray(c), n=steps))  # noqa: E731, B023
        best = error(toeplitz.optimize_banded_toeplitz(steps, bands))
        assert error(band_coefficients(bands, steps)) < 1.001 * best


def test_the_event_of_correlated_noise():
    from jax_privacy import accounting

    ours = Mechanism(unit="record", sampler="cyclic", population=1000, batch=50, steps=10, sigma=2.0, clip=1.0,
                     delta=1e-5, bands=4)  # fmt: skip
    assert ours.event() == accounting.amplified_bandmf_event(
        noise_multiplier=2.0, iterations=10, num_bands=4, sampling_prob=0.2
    )
