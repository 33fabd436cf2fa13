"""Noise that is correlated over steps, and one draw for all devices."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import toeplitz

from jaxforget.privacy.noise import band_coefficients, gaussian_noise

BANDS, STEPS = 4, 24


def noises(bands, steps=STEPS, size=50):
    """What is added to a gradient of zeros at every step, (T, 2 size), with multiplier 3 and sensitivity 0.5."""
    transform, grads = gaussian_noise(band_coefficients(bands, steps)), {"a": jnp.zeros(size), "b": jnp.zeros(size)}
    state = transform.init(grads)._replace(multiplier=jnp.float32(3.0))
    update, report, rows = jax.jit(transform.update), {"sensitivity": 0.5}, []
    for step in range(steps):
        found, state = update(grads, state, key=jax.random.fold_in(jax.random.key(0), step), report=report)
        rows.append(np.concatenate([found["a"], found["b"]]))
    return np.stack(rows)


def matrix(bands, steps=STEPS):
    """C (T, T), column by column what one unit of z at that step is made from."""
    return toeplitz(np.pad(band_coefficients(bands, steps), (0, steps - bands)), np.zeros(steps))


def test_correlated_noise_solves_its_matrix():
    """C y = z, z the noise without correlation from the same keys."""
    np.testing.assert_allclose(matrix(BANDS) @ noises(BANDS), noises(1), atol=1e-5)


def test_the_sum_of_correlated_noise_is_smaller():
    """What moves the model is the sum over steps. 200 sums: their standard deviation is known within a tenth."""
    together, alone = (noises(bands, steps=48, size=200).sum(axis=0).std() for bands in (8, 1))
    assert alone == pytest.approx(1.5 * 48**0.5, rel=0.1)
    inverse = np.linalg.inv(matrix(8, 48))
    assert together == pytest.approx(1.5 * np.linalg.norm(inverse.sum(axis=0)), rel=0.1) and together < 0.5 * alone


@pytest.mark.parametrize("bands, steps, error", [(2, 100, 26.848), (8, 200, 16.835), (32, 1000, 24.115)])
def test_coefficients_are_the_best(bands, steps, error):
    """Mean squared error of prefix sums: the least that optimize_banded_toeplitz of jax_privacy 2.0 finds."""
    sums = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix(bands, steps))
    assert np.sum(sums**2) / steps == pytest.approx(error, rel=1e-3)
    assert np.linalg.norm(matrix(bands, steps), axis=0).max() == pytest.approx(1.0)


def test_a_unit_that_keeps_apart_is_hidden_as_by_one_release_a_visit():
    """|C g| <= sqrt(visits) for any g whose rows have norm 1 and stand `bands` apart: the releases do not meet."""
    rng = np.random.default_rng(0)
    for start in range(BANDS):
        change = np.zeros((STEPS, 7))
        rows = rng.standard_normal((len(range(start, STEPS, BANDS)), 7))
        change[start::BANDS] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.linalg.norm(matrix(BANDS) @ change) <= len(rows) ** 0.5 * (1 + 1e-12)
    close = np.zeros((STEPS, 1))
    close[:2] = 1
    assert np.linalg.norm(matrix(BANDS) @ close) > 2**0.5  # which is why the sampler keeps visits apart
