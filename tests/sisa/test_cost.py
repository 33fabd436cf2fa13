"""Closed forms against golden numbers and enumeration; exact counts against a loop over stages and records."""

import itertools
import math

import numpy as np
import pytest

from jaxforget.sisa.cost import (
    batched,
    batched_with_slices,
    deletion_visits,
    one_request,
    sequential,
    simulate,
    training_visits,
)
from jaxforget.sisa.plan import by_deletion_probability, epoch_schedule, uniform

# Golden: function, arguments, formula, the mean of a simulation that was made apart from this code.
CASES = [
    (sequential, (1000, 5, 20), 3942.0, 3942.0),
    (sequential, (1000, 10, 100), 9405.0, 9405.9),
    (sequential, (1000, 1, 10), 9945.0, 9945.0),
    (batched, (1000, 5, 3), 485.0, 487.8),
    (batched, (1000, 20, 20), 621.5141, 626.4),
    (batched, (10000, 20, 8), 3357.7957, 3356.6),
    (one_request, (600, 6, 12), 5200.0, 5194.5),
    (one_request, (1000, 20, 10), 6833.3333, 6799.4),
    (batched_with_slices, (600, 1, 6, 12, 4), 6816.6667, 6812.3),
    (batched_with_slices, (1000, 5, 4, 10, 3), 3794.25, 3794.7),
    (batched_with_slices, (1000, 10, 8, 9, 15), 5769.4501, 5768.9),
]


@pytest.mark.parametrize("formula, arguments, expected, simulated", CASES)
def test_golden(formula, arguments, expected, simulated):
    assert formula(*arguments) == pytest.approx(expected, abs=6e-5)  # given to four decimals
    # The simulations draw without replacement, which for 20 of 1000 records makes 0.6 % by itself, and are noisy.
    assert formula(*arguments) == pytest.approx(simulated, rel=0.01)


@pytest.mark.parametrize("records, shards, requests", [(1000, 5, 20), (1000, 10, 100), (1000, 1, 10), (60, 4, 7)])
def test_sequential_is_the_sum_over_earlier_requests(records, shards, requests):
    # Request i finds its shard with j of the i-1 earlier requests gone, j binomial, and is itself gone.
    p = 1 / shards
    total = sum(
        math.comb(i - 1, j) * p**j * (1 - p) ** (i - 1 - j) * (records / shards - 1 - j)
        for i in range(1, requests + 1)
        for j in range(i)
    )
    assert sequential(records, shards, requests) == pytest.approx(total, rel=1e-12)


def test_sequential_without_shards():
    assert sequential(1000, 1, 10) == sum(1000 - i for i in range(1, 11)) == 1000 * 10 - 10 * 11 / 2


@pytest.mark.parametrize("records, shards, slices, epochs, requests", [(600, 1, 6, 12, 4), (1000, 5, 4, 10, 3)])
def test_batched_with_slices_is_the_mean_over_all_outcomes(records, shards, slices, epochs, requests):
    e, part = 2 * epochs / (slices + 1), records / (shards * slices)
    from_slice_R = [sum(e * i * part for i in range(r, slices + 1)) for r in range(1, slices + 1)]
    cells = list(itertools.product(range(shards), range(slices)))
    total = 0.0
    for outcome in itertools.product(cells, repeat=requests):
        first = {}
        for s, r in outcome:
            first[s] = min(r, first.get(s, r))
        total += sum(from_slice_R[r] for r in first.values())
    mean = total / len(cells) ** requests
    assert batched_with_slices(records, shards, slices, epochs, requests) == pytest.approx(mean, rel=1e-9)


def test_formulas_agree_where_they_meet():
    for R in (1, 2, 6, 20):
        assert one_request(600, R, 12) == pytest.approx(batched_with_slices(600, 1, R, 12, 1), rel=1e-12)
        assert 12 * 600 / one_request(600, R, 12) == pytest.approx(3 * R / (2 * R + 1), rel=1e-12)  # at most 1.5
    for K in (1, 3, 50):
        # Without slices: batched, where deleted records are not counted.
        assert batched_with_slices(1000, 5, 1, 10, K) == pytest.approx(10 * (batched(1000, 5, K) + K), rel=1e-12)
    assert sequential(1000, 5, 1) == pytest.approx(batched(1000, 5, 1)) == pytest.approx(199)
    assert batched(1000, 5, 10000) + 10000 == pytest.approx(1000)  # many requests: all shards


def loop(shard_N, slice_N, deleted_N, epochs_R):
    """Count visits one stage and one record at a time."""
    visits = 0
    for s in set(shard_N.tolist()):
        gone = [r for t, r, d in zip(shard_N, slice_N, deleted_N) if t == s and d]
        for j, epochs in enumerate(epochs_R):
            if gone and j >= min(gone):
                visits += epochs * sum(1 for t, r, d in zip(shard_N, slice_N, deleted_N) if t == s and r <= j and not d)
    return visits


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shards, slices", [(1, 1), (1, 5), (7, 1), (4, 6)])
def test_deletion_visits_count_stage_by_stage(shards, slices, rate):
    ids = [str(n) for n in range(101)]
    rng = np.random.default_rng(shards * 100 + slices)
    shard_N, slice_N = uniform(ids, shards, slices, seed=0)
    epochs_R = epoch_schedule(7, slices)
    for _ in range(5):
        deleted_N = rng.random(101) < rate
        assert deletion_visits(shard_N, slice_N, deleted_N, epochs_R) == loop(shard_N, slice_N, deleted_N, epochs_R)


def test_visits_by_hand():
    # Shard 0: slices of 3, 2 records; shard 1: 1, 4. Stages of 2 and 5 epochs.
    shard_N = np.array([0] * 5 + [1] * 5)
    slice_N = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])
    assert training_visits(np.array([[3, 2], [1, 4]]), (2, 5)) == 2 * 3 + 5 * 5 + 2 * 1 + 5 * 5
    deleted_N = np.arange(10) == 4
    assert deletion_visits(shard_N, slice_N, deleted_N, (2, 5)) == 5 * 4  # last stage of shard 0 on 3 + 1
    deleted_N = np.isin(np.arange(10), [4, 5])
    assert deletion_visits(shard_N, slice_N, deleted_N, (2, 5)) == 5 * 4 + (0 + 5 * 4)  # the first slice of 1 is empty
    assert deletion_visits(shard_N, slice_N, np.ones(10, bool), (2, 5)) == 0  # nobody is left to train on


def test_a_record_in_every_first_slice_costs_the_training_of_the_rest():
    ids = [str(n) for n in range(101)]
    shard_N, slice_N = uniform(ids, 4, 5, seed=1)
    first_N = np.array([np.flatnonzero((shard_N == s) & (slice_N == 0))[0] for s in range(4)])
    deleted_N = np.isin(np.arange(101), first_N)
    count_SR = np.bincount((shard_N * 5 + slice_N)[~deleted_N], minlength=20).reshape(4, 5)
    assert deletion_visits(shard_N, slice_N, deleted_N, (3, 3, 4, 3, 3)) == training_visits(count_SR, (3, 3, 4, 3, 3))


def exact_batched(shard_N, slice_N, epochs_R, requests):
    """Expect visits exactly: `requests` different records, all sets alike (hypergeometric)."""
    N, R = len(shard_N), len(epochs_R)
    total = 0.0
    for s in range(int(shard_N.max()) + 1):
        for j in range(R):
            n = int(np.sum((shard_N == s) & (slice_N <= j)))
            redone = 1 - math.comb(N - n, requests) / math.comb(N, requests)
            # A deleted record among these n makes the stage be redone, always, and is not visited in it.
            total += epochs_R[j] * (n * redone - requests * n / N)
    return total


@pytest.mark.parametrize(
    "records, shards, slices, epochs, requests",
    [(1000, 5, 1, 1, 3), (1000, 20, 1, 1, 20), (600, 1, 5, 12, 4), (1000, 5, 4, 10, 3), (1000, 10, 8, 9, 15)],
)
def test_simulated_batches_cost_what_the_formulas_expect(records, shards, slices, epochs, requests):
    shard_N, slice_N = uniform([str(n) for n in range(records)], shards, slices, seed=0)
    epochs_R = epoch_schedule(epochs, slices)
    assert len(set(epochs_R)) == 1  # as the formulas have it
    visits = simulate(shard_N, slice_N, epochs_R, requests, 2000, seed=0)
    exact = exact_batched(shard_N, slice_N, epochs_R, requests)
    # Four standard errors of the mean.
    assert abs(visits.mean() - exact) < 4 * visits.std() / math.sqrt(2000)
    # The formula counts the visits of deleted records too. It draws with replacement, up to 0.6 % cheaper in these
    # cases (0.4 % in the last), and in the last it has slices of 12.5 records, the plan 13 and 12 in turn: 0.6 %.
    formula = batched_with_slices(records, shards, slices, epochs, requests) - requests * epochs
    assert formula == pytest.approx(exact, rel=0.01)
    if slices == 1:
        assert formula == pytest.approx(batched(records, shards, requests))


@pytest.mark.parametrize("records, shards, requests", [(1000, 5, 20), (1000, 10, 100), (1000, 1, 10)])
def test_simulated_sequences_cost_what_the_formula_expects(records, shards, requests):
    shard_N, slice_N = uniform([str(n) for n in range(records)], shards, 1, seed=0)
    visits = simulate(shard_N, slice_N, (1,), requests, 100, seed=0, batch=1)
    # Request i is likelier to fall on a shard that has lost less, by (1-1/S) (i-1)/(N-1) records: a part in 2000 here.
    more = sum((1 - 1 / shards) * (i - 1) / (records - 1) for i in range(1, requests + 1))
    error = visits.std() / math.sqrt(100)
    assert abs(visits.mean() - sequential(records, shards, requests) - more) < 4 * error + 1e-6
    assert more < 0.0006 * sequential(records, shards, requests)


def test_batches_between_one_and_all():
    shard_N, slice_N = uniform([str(n) for n in range(200)], 4, 2, seed=0)
    means = [simulate(shard_N, slice_N, (3, 3), 12, 50, seed=0, batch=batch).mean() for batch in (1, 4, 12)]
    assert means[0] > means[1] > means[2]
    assert means[2] == simulate(shard_N, slice_N, (3, 3), 12, 50, seed=0).mean()


def test_aware_shards_and_slices_are_cheaper_for_the_requests_they_expect():
    ids = [str(n) for n in range(500)]
    probability_N = np.random.default_rng(0).beta(0.3, 10, 500)
    plain = uniform(ids, 5, 4, seed=0)
    aware = by_deletion_probability(ids, probability_N, 5, 4, seed=0)
    visits = [simulate(*plan, (4, 4, 4, 4), 2, 1000, seed=0, probability_N=probability_N) for plan in (plain, aware)]
    saved = visits[0] - visits[1]  # the same records were drawn
    assert saved.mean() > 4 * saved.std() / math.sqrt(1000)


def test_impossible_draw():
    shard_N, slice_N = uniform([str(n) for n in range(20)], 2, 1, seed=0)
    with pytest.raises(ValueError):
        simulate(shard_N, slice_N, (1,), 21, 1, seed=0)
    with pytest.raises(ValueError):
        simulate(shard_N, slice_N, (1,), 2, 1, seed=0, probability_N=np.eye(20)[0])
