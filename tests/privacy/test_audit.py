"""The audit stays below epsilon where training is private, and exceeds it where a defect is planted.

Canary gradients are coordinate axes of length C or more: no two share a direction, which gives one run its power.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

from jaxforget.data.tokens import Examples
from jaxforget.models.layers import embed
from jaxforget.privacy.accounting import Mechanism
from jaxforget.privacy.audit import canary_scores, epsilon_bound, p_value, sensitivity
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import gaussian_noise, private_gradient, set_privacy
from jaxforget.privacy.sampling import PoissonBatches
from jaxforget.training.step import make_run, make_step
from jaxforget.training.trainable import everything

CANARIES = 100_000
CLIP = 0.5


def with_keys(key_N):
    length_N = np.ones(len(key_N), np.int32)
    return Examples(("",) * len(key_N), {"tokens": length_N[:, None], "length": length_N, "key": key_N})


# one run, many canaries


@functools.cache
def mechanism():
    return Mechanism(
        unit="pair",
        sampler="poisson",
        population=CANARIES,
        batch=CANARIES // 4,
        steps=64,
        sigma=3.0,
        clip=CLIP,
        delta=1e-6,
    )


@functools.cache
def bound_of_one_run(seed=0, noise=1.0, unit=2):
    """Train on pairs whose halves have the same gradient, of length 3 C along the canary's own axis, and audit.

    Sampler, clipping, noise and step are those of every private run. noise: share of what the mechanism asks for. unit:
    the rows that are clipped as one.
    """
    rng, how = np.random.default_rng(seed), mechanism()
    key_M = np.sort(rng.integers(0, 2**64, CANARIES, dtype=np.uint64))
    included_M = rng.random(CANARIES) < 0.5
    pair_R = np.repeat(np.flatnonzero(included_M), 2)
    columns = {"tokens": pair_R[:, None].astype(np.int32), "length": np.ones(len(pair_R), np.int32)}
    columns |= {"key": key_M[pair_R] ^ (np.arange(len(pair_R)) % 2).astype(np.uint64), "unit": key_M[pair_R]}
    batches = PoissonBatches(Examples(("",) * len(pair_R), columns), how, seed)

    def objective(parts, batch, key):
        return -3 * CLIP * embed(parts["model"]["table"], batch["tokens"], dtype=jnp.float32)[:, 0, 0]

    gradient = private_gradient(Clipping(rows=unit), float(how.batch))
    step = make_step(objective, everything(), gradient, optax.chain(gaussian_noise(), optax.sgd(float(how.batch))))
    state, frozen = step.init(jax.random.key(1000 + seed), {"model": {"table": jnp.zeros((CANARIES, 1))}})
    state = set_privacy(state, bound=how.clip, multiplier=noise * how.noise_std / how.clip)
    state, report = make_run(step)(state, frozen, batches.take(0, how.steps, how.steps), how.steps)
    np.testing.assert_array_equal(report["units"] * unit, 2 * np.array([len(drawn) for drawn in batches.draws]))
    # What all steps released together: a score that sums over steps needs no more.
    scores_M = canary_scores(state.trainable["model"]["table"].T, scipy.sparse.identity(CANARIES))
    return epsilon_bound(scores_M, included_M, guesses=1000, delta=how.delta)


@pytest.mark.parametrize("seed", range(3))
def test_a_correct_run_stays_below_its_epsilon(seed):
    assert 1.0 < bound_of_one_run(seed) <= mechanism().epsilon()  # of 3.40: far from idle


def test_half_the_noise_is_detected():
    assert bound_of_one_run(noise=0.5) > mechanism().epsilon()


def test_pairs_clipped_by_halves_are_detected():
    assert bound_of_one_run(unit=1) > mechanism().epsilon()


# one canary a run, many small runs

RUNS, EPOCHS, UNITS = 1000, 16, 10


def small(sampler):
    """Batches of one unit, ten units: q = 0.1."""
    return Mechanism(
        unit="record",
        sampler=sampler,
        population=UNITS,
        batch=1,
        steps=UNITS * EPOCHS,
        sigma=3.0,
        clip=CLIP,
        delta=1e-6,
    )


def bound_of_small_runs(how, blank=False):
    """Audit runs of ten units with equal gradients, of which the first is the canary.

    Excluded canaries are missing, and the attack looks at the last step of every epoch: shuffling leaves that batch
    empty. Or they are `blank`, which keeps their slot, and the attack knows the order and looks into that slot.
    """
    rng = np.random.default_rng(2)
    included_R = rng.random(RUNS) < 0.5
    scores_R = np.zeros(RUNS)
    for run, included in enumerate(included_R):
        key_N = rng.integers(0, 2**64, UNITS, dtype=np.uint64)
        batches = PoissonBatches(with_keys(key_N if included or blank else key_N[1:]), how, run)
        size_T = np.array([len(chosen) for chosen in batches.draws])
        watched_T = np.arange(how.steps) % UNITS == UNITS - 1
        if blank:
            canary = np.searchsorted(np.sort(key_N), key_N[0])
            watched_T = np.array([canary in chosen for chosen in batches.draws])
            size_T = size_T - watched_T * (not included)
        released_TD = (size_T * CLIP + how.noise_std * rng.normal(size=how.steps))[:, None]
        scores_R[run] = canary_scores(released_TD[watched_T], np.ones((1, 1)))[0]
    return epsilon_bound(scores_R, included_R, guesses=200, delta=how.delta)


def test_shuffling_counted_as_poisson_is_detected():
    claimed = small("poisson").epsilon()
    assert bound_of_small_runs(small("poisson")) <= claimed
    assert bound_of_small_runs(small("shuffle")) > claimed  # 2.48 against 2.03


def test_shuffling_keeps_the_epsilon_and_the_relation_it_states():
    assert 1.5 < bound_of_small_runs(small("shuffle"), blank=True) <= small("shuffle").epsilon()


# the bound itself


def test_the_bound_holds_for_the_mechanism_it_is_about():
    """Randomised response is (epsilon, 0)-DP with equality: the bound exceeds epsilon in at most 5 % of runs."""
    epsilon, above, closest = 1.0, 0, 0.0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        included_M = rng.random(2000) < 0.5
        truthful_M = rng.random(2000) < 1 / (1 + np.exp(-epsilon))
        scores_M = np.where(truthful_M, included_M, ~included_M) + 0.1 * rng.random(2000)
        bound = epsilon_bound(scores_M, included_M, guesses=1000, delta=0.0)
        above, closest = above + (bound > epsilon), max(closest, bound)
    assert above <= 6  # 2.5 expected at most; 7 have probability 0.01
    assert closest > 0.9


def test_known_p_values():
    assert p_value(0.0, 10, 10, 10, 0.0) == pytest.approx(2.0**-10)
    assert p_value(np.log(3), 2, 2, 2, 0.0) == pytest.approx(9 / 16)
    # W ~ Binomial(2, 1/2), 2 right: the slope is max(P[W = 1], P[W < 2] / 2) = 1/2, times 2 * 4 * 0.01
    assert p_value(0.0, 2, 2, 4, 0.01) == pytest.approx(0.25 + 0.04)
    assert p_value(0.0, 0, 2, 4, 0.01) == 1.0


def test_guessing_without_knowledge_shows_nothing():
    rng = np.random.default_rng(0)
    assert epsilon_bound(rng.random(1000), rng.random(1000) < 0.5, guesses=100, delta=1e-6) == 0.0
    with pytest.raises(ValueError, match="guesses is 3"):
        epsilon_bound(rng.random(10), rng.random(10) < 0.5, guesses=3, delta=0.0)


# sensitivity


def clip(gradient, bound=CLIP):
    return gradient * jnp.minimum(1.0, bound / jnp.linalg.norm(gradient))


def pair_gradient(halves_kD):
    """A pair is one unit: the mean of its halves, clipped once."""
    return clip(halves_kD.mean(axis=0))


def halves_gradient(halves_kD):
    """The defect: each half clipped by itself."""
    return jax.vmap(clip)(halves_kD).sum(axis=0)


def test_removing_a_unit_moves_a_clipped_sum_by_at_most_c():
    rng = np.random.default_rng(0)
    halves_UkD = jnp.asarray(rng.normal(size=(6, 2, 5)) + 1.0, jnp.float32)

    def summed(gradient):
        return lambda real_U: {"w": (jax.vmap(gradient)(halves_UkD) * real_U[:, None]).sum(axis=0)}

    assert sensitivity(summed(pair_gradient), 6) == pytest.approx(CLIP, rel=1e-5)  # every pair is above the bound
    assert sensitivity(summed(halves_gradient), 6) > 1.5 * CLIP
