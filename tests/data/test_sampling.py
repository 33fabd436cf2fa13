"""Order depends on who is in the set, never on where or with whom."""

import hashlib

import numpy as np
import pytest

from jaxforget.data.sampling import hash64, hash_int, id_keys, order

IDS = [f"example-{n}" for n in range(500)]


def test_hash_is_splitmix64():
    # First outputs of the published generator for seeds 0 and 1234567.
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(1234567)) == 6457827717110365317


def test_hash_of_integers_and_arrays_agree():
    values = [0, 1, -1, 2**63, 2**64 - 1, 12345678901234567890]
    array = np.asarray([value % 2**64 for value in values], np.uint64)
    hashed = hash64(3, array, 9)
    assert hashed.dtype == np.uint64 and hashed.shape == (6,)
    assert [int(value) for value in hashed] == [hash_int(3, value, 9) for value in values]
    assert hash_int(1, 2) != hash_int(2, 1) and hash_int(0) != hash_int(0, 0)


def test_hash_bits_are_balanced():
    hashed = hash64(5, np.arange(20000))
    bits = (hashed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    # Standard deviation of a mean of 20000 fair bits is 0.0035; 64 bits stay within 5 of them.
    assert np.abs(bits.mean(0) - 0.5).max() < 0.018


def test_keys_are_stable_and_distinct():
    keys = id_keys(IDS)
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == len(IDS)
    assert id_keys([]).shape == (0,)
    assert int(keys[0]) == int.from_bytes(hashlib.blake2b(b"example-0", digest_size=8).digest(), "little")


def test_order_is_a_permutation_that_changes_with_seed_and_epoch():
    keys = id_keys(IDS)
    orders = [order(keys, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for permutation in orders:
        assert sorted(permutation.tolist()) == list(range(len(IDS)))
    assert len({tuple(permutation.tolist()) for permutation in orders}) == 4
    assert np.array_equal(orders[0], order(keys, 0, 0))


@pytest.mark.parametrize("seed", [0, 7])
def test_deleting_leaves_the_order_of_the_rest(seed):
    ids = np.asarray(IDS)
    kept = np.random.default_rng(seed).random(len(ids)) < 0.7
    for epoch in range(3):
        before = ids[order(id_keys(ids), seed, epoch)]
        after = ids[kept][order(id_keys(ids[kept]), seed, epoch)]
        assert [i for i in before if i in set(ids[kept])] == after.tolist()


def test_shuffling_the_input_leaves_the_sequence():
    ids = np.asarray(IDS)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(ids[order(id_keys(ids), 1, 2)], shuffled[order(id_keys(shuffled), 1, 2)])
