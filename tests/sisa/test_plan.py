"""Plans cover every record, whatever the remainders, and depend on who is there, never on the order of the input."""

import numpy as np
import pytest

from jaxforget.data.sampling import id_keys, order
from jaxforget.errors import UserError
from jaxforget.sisa.plan import by_column, by_deletion_probability, epoch_schedule, uniform

IDS = [f"example-{n}" for n in range(103)]
PROBABILITY = np.random.default_rng(0).beta(0.5, 4, 103)
VALUES = ["novel", "code", 7, "code", "novel", "novel"] * 17 + ["code"]  # 51, 35 and 17 records

# 20 epochs: the official schedule, its number of epochs, and the visits of a shard relative to training without slices.
SCHEDULES = [
    (1, (20,), 20, 1.0),
    (2, (13, 13), 26, 0.975),
    (5, (6, 7, 7, 6, 7), 33, 1.0),
    (10, (3, 4, 3, 4, 4, 3, 4, 4, 3, 4), 36, 1.005),
    (16, (2, 2, 3, 2, 2, 3, 2, 2, 3, 2, 2, 3, 2, 2, 3, 2), 37, 0.9906),
]


def counts(shard_N, slice_N, slices):
    count_SR = np.zeros((int(shard_N.max()) + 1, slices), int)
    np.add.at(count_SR, (shard_N, slice_N), 1)
    return count_SR


def spread(sizes):
    return int(np.max(sizes) - np.min(sizes))


@pytest.mark.parametrize("slices, expected, total, cost", SCHEDULES)
def test_schedule_table(slices, expected, total, cost):
    schedule = epoch_schedule(20, slices)
    assert schedule == expected and sum(schedule) == total
    visits = sum(e * i for i, e in enumerate(schedule, 1)) / (slices * 20)
    assert round(visits, 4) == cost


def test_schedule_trains_every_stage_or_says_what_would():
    for slices in range(1, 30):
        fewest = next(e for e in range(1, 100) if 2 * e >= slices + 1)
        for epochs in range(fewest, 40):
            schedule = epoch_schedule(epochs, slices)
            assert min(schedule) >= 1 and spread(schedule) <= 1
            assert sum(schedule) == 2 * epochs * slices // (slices + 1)  # the floors telescope
        if fewest > 1:
            with pytest.raises(UserError, match=f"--epochs {fewest - 1} with --slices .* at least {fewest} epo"):
                epoch_schedule(fewest - 1, slices)


def test_schedule_is_exact_for_large_numbers():
    # a is 2/3 of 10^17 here, and a float carries 16 digits: the sum would be off.
    schedule = epoch_schedule(10**17, 2)
    assert schedule == (66666666666666666, 66666666666666667)


@pytest.mark.parametrize("epochs, slices, flag", [(0, 1, "--epochs"), (5, 0, "--slices")])
def test_schedule_refuses_nothing(epochs, slices, flag):
    with pytest.raises(UserError, match=f"{flag} is 0; it must be at least 1"):
        epoch_schedule(epochs, slices)


@pytest.mark.parametrize("shards, slices", [(1, 1), (1, 103), (5, 1), (5, 4), (7, 14), (10, 3), (103, 1)])
def test_uniform_covers_every_record_evenly(shards, slices):
    shard_N, slice_N = uniform(IDS, shards, slices, seed=0)
    assert shard_N.dtype == slice_N.dtype == np.int32
    count_SR = counts(shard_N, slice_N, slices)
    assert count_SR.shape == (shards, slices) and count_SR.sum() == 103
    assert spread(count_SR.sum(axis=1)) <= 1
    assert all(spread(count_R) <= 1 for count_R in count_SR) and count_SR.min() >= 1


PLANS = {
    "uniform": lambda at, seed: uniform([IDS[i] for i in at], 5, 4, seed),
    "probability": lambda at, seed: by_deletion_probability([IDS[i] for i in at], PROBABILITY[at], 5, 4, seed),
    # Half of the records share a probability, so that ties matter.
    "ties": lambda at, seed: by_deletion_probability([IDS[i] for i in at], PROBABILITY.round(1)[at], 5, 4, seed),
    "column": lambda at, seed: by_column([IDS[i] for i in at], [VALUES[i] for i in at], 4, seed)[:2],
}


@pytest.mark.parametrize("name", PLANS)
def test_the_order_of_the_input_changes_nothing(name):
    straight, shuffled = np.arange(103), np.random.default_rng(1).permutation(103)
    for before_N, after_N in zip(PLANS[name](straight, 0), PLANS[name](shuffled, 0)):
        assert np.array_equal(before_N[shuffled], after_N)


@pytest.mark.parametrize("name", ["uniform", "ties", "column"])
def test_the_seed_changes_the_plan(name):
    at = np.arange(103)
    assert not np.array_equal(PLANS[name](at, 0), PLANS[name](at, 1))


def test_uniform_is_unrelated_to_the_order_of_the_ids_and_of_training():
    ids = [f"example-{n}" for n in range(20000)]
    shard_N, slice_N = uniform(ids, 4, 5, seed=3)
    place_N = np.empty(20000)
    place_N[order(id_keys(ids), 3, 0)] = np.arange(20000)
    for other_N in (np.arange(20000), place_N):
        for part_N in (shard_N, slice_N, shard_N * 5 + slice_N):
            # A correlation of 20000 unrelated pairs has standard deviation 0.0071.
            assert abs(np.corrcoef(part_N, other_N)[0, 1]) < 0.03
    # Independent of each other: the sizes of the 20 cells are equal, as 20 divides 20000.
    assert spread(counts(shard_N, slice_N, 5)) == 0


@pytest.mark.parametrize(
    "shards, slices, says",
    [
        (104, 1, "--shards 104: .* 103"),
        (10, 11, "--slices 11: .* one with 10; give at most 10"),
        (0, 1, "--shards is 0"),
        (1, -1, "--slices is -1"),
    ],
)
def test_too_few_records(shards, slices, says):
    with pytest.raises(UserError, match=says):
        uniform(IDS, shards, slices, seed=0)
    with pytest.raises(UserError, match=says):
        by_deletion_probability(IDS, PROBABILITY, shards, slices, seed=0)


@pytest.mark.parametrize("shards, slices", [(1, 4), (4, 1), (6, 3), (20, 5), (103, 1)])
def test_likely_deletions_sit_in_small_shards_and_last_slices(shards, slices):
    shard_N, slice_N = by_deletion_probability(IDS, PROBABILITY, shards, slices, seed=0)
    assert shard_N.dtype == slice_N.dtype == np.int32
    count_SR = counts(shard_N, slice_N, slices)
    assert count_SR.shape == (shards, slices) and count_SR.sum() == 103 and count_SR.min() >= 1
    assert all(spread(count_R) <= 1 for count_R in count_SR)
    assert np.all(np.diff(count_SR.sum(axis=1)) <= 0)
    # Probabilities never fall from one slice to the next, nor from one shard to the next.
    cell_N = shard_N * slices + slice_N
    ends = [(PROBABILITY[cell_N == c].min(), PROBABILITY[cell_N == c].max()) for c in range(shards * slices)]
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:]))


def test_shards_expect_about_the_same_number_of_requests():
    rng = np.random.default_rng(2)
    ids, probability_N = [str(n) for n in range(5000)], rng.beta(0.5, 20, 5000)
    shard_N, _ = by_deletion_probability(ids, probability_N, 8, 4, seed=0)
    expected_S = np.bincount(shard_N, probability_N)
    # A shard is full with the record that reaches its share, so it is off by at most one record and what others left.
    assert np.abs(expected_S - probability_N.sum() / 8).max() <= probability_N.max()
    assert np.bincount(shard_N)[0] > 5 * np.bincount(shard_N)[-1]


def test_a_shard_is_full_with_the_record_that_reaches_its_share():
    # 0.1 to 0.5, 0.6, 0.9 sum to 3. A third is 1: the first four records make exactly that. Half of the other 2 is 1:
    # 0.5 and 0.6 pass it.
    probability_N = np.array([0.4, 0.9, 0.1, 0.6, 0.2, 0.3, 0.5])
    shard_N, slice_N = by_deletion_probability(list("abcdefg"), probability_N, 3, 1, seed=0)
    assert shard_N.tolist() == [0, 2, 0, 1, 0, 0, 1] and not slice_N.any()
    # 0.3, 0.8 and 1.0: the second shard would need two records for its share of 0.9, but one is kept for the third.
    shard_N, _ = by_deletion_probability(list("abc"), np.array([1.0, 0.8, 0.3]), 3, 1, seed=0)
    assert shard_N.tolist() == [2, 1, 0]


def test_equal_probabilities_give_equal_shards():
    # In floating point fifteen 0.3 add up to less than a quarter of sixty.
    shard_N, slice_N = by_deletion_probability([str(n) for n in range(60)], np.full(60, 0.3), 4, 5, seed=0)
    assert np.array_equal(counts(shard_N, slice_N, 5), np.full((4, 5), 3))


def test_every_shard_has_a_record_for_each_slice():
    probability_N = np.array([1.0] + [0.0] * 19)
    shard_N, slice_N = by_deletion_probability([str(n) for n in range(20)], probability_N, 4, 3, seed=0)
    assert np.array_equal(np.bincount(shard_N), [11, 3, 3, 3])
    assert (shard_N[0], slice_N[0]) == (3, 2)
    rng = np.random.default_rng(4)
    for _ in range(200):
        shards, slices = rng.integers(1, 7, 2)
        records = int(shards * slices + rng.integers(0, 9))
        probability_N = np.append(rng.random(records - 1) ** rng.integers(0, 30), 1.0)
        plan = by_deletion_probability(
            [str(n) for n in range(records)], probability_N, int(shards), int(slices), seed=0
        )
        assert counts(*plan, slices).min() >= 1


@pytest.mark.parametrize("wrong", [-0.01, 1.01, np.nan, np.inf])
def test_wrong_probability_names_the_record(wrong):
    probability_N = PROBABILITY.copy()
    probability_N[41] = wrong
    with pytest.raises(UserError, match=f"record example-41: .*{wrong}; give a number from 0 to 1"):
        by_deletion_probability(IDS, probability_N, 3, 2, seed=0)


def test_nothing_to_tell_records_apart():
    with pytest.raises(UserError, match="every deletion probability is 0.*uniform"):
        by_deletion_probability(IDS, np.zeros(103), 3, 2, seed=0)


def test_every_value_has_its_shard():
    shard_N, slice_N, names = by_column(IDS, VALUES, 4, seed=0)
    assert shard_N.dtype == slice_N.dtype == np.int32
    assert names == ("7", "code", "novel")
    assert [names[s] for s in shard_N] == [str(value) for value in VALUES]
    count_SR = counts(shard_N, slice_N, 4)
    assert count_SR.sum(axis=1).tolist() == [17, 35, 51]
    assert all(spread(count_R) <= 1 for count_R in count_SR)


def test_value_with_too_few_records():
    with pytest.raises(UserError, match="--slices 18: .* '7' has 17 records; give at most 17"):
        by_column(IDS, VALUES, 18, seed=0)
    with pytest.raises(UserError, match="--slices is 0"):
        by_column(IDS, VALUES, 0, seed=0)
