"""Batches are a pure function of (seed, ids, step)."""

import numpy as np
import pytest
from conftest import make_examples

from jaxforget.errors import UserError
from jaxforget.training.batches import Batches, Stream


def visits(batches):
    """The keys of real rows, step by step."""
    steps = batches.take(0, batches.steps, batches.steps)
    return [k[w > 0].tolist() for k, w in zip(steps["key"], steps["weight"], strict=True)]


def test_every_epoch_visits_every_example_once():
    examples = make_examples(10)
    batches = Batches((Stream(examples, 4),), 3, 0)
    keys = sorted(examples.columns["key"].astype(np.uint32).tolist())
    per_epoch = visits(batches)
    assert [len(rows) for rows in per_epoch] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(sum(per_epoch[3 * epoch : 3 * epoch + 3], [])) == keys
    assert per_epoch[:3] != per_epoch[3:6]  # each epoch has its own order


def test_order_ignores_how_the_examples_came():
    examples = make_examples(10)
    shuffled = examples.take(np.random.default_rng(1).permutation(10))
    assert visits(Batches((Stream(examples, 4),), 2, 5)) == visits(Batches((Stream(shuffled, 4),), 2, 5))
    assert visits(Batches((Stream(examples, 4),), 2, 5)) != visits(Batches((Stream(examples, 4),), 2, 6))


def test_deleting_an_example_leaves_the_order_of_the_rest():
    examples = make_examples(10)
    gone = int(examples.columns["key"].astype(np.uint32)[4])
    kept = examples.take(np.arange(10) != 4)
    everyone = sum(visits(Batches((Stream(examples, 1),), 1, 0)), [])
    assert sum(visits(Batches((Stream(kept, 1),), 1, 0)), []) == [key for key in everyone if key != gone]


def test_the_second_stream_goes_round_without_repeats_within_a_turn():
    forget, retain = make_examples(6), make_examples(4, prefix="r")
    batches = Batches((Stream(forget, 2, -1.0), Stream(retain, 2, 1.0)), 2, 0)
    steps = batches.take(0, batches.steps, batches.steps)
    retained = steps["key"][steps["stream"] == 1].reshape(-1, 4)  # 6 steps of 2 rows: three turns of 4
    for turn in retained:
        assert sorted(turn.tolist()) == sorted(retain.columns["key"].astype(np.uint32).tolist())


def test_tokens_are_counted_without_padding():
    forget, retain = make_examples(5, seed=1), make_examples(7, seed=2, width=6, prefix="r")
    batches = Batches((Stream(forget, 2), Stream(retain, 3)), 2, 0)
    steps = batches.take(0, batches.steps, batches.steps)
    counted = (steps["length"] * (steps["weight"] > 0)).sum(axis=1).cumsum()
    assert [batches.tokens_until(step) for step in range(1, batches.steps + 1)] == counted.tolist()
    assert batches.tokens == batches.tokens_until(batches.steps, 0) + batches.tokens_until(batches.steps, 1)


def test_streams_of_different_width_are_padded_with_unscored_tokens():
    forget, retain = make_examples(2, width=5), make_examples(2, width=9, prefix="r")
    batch = Batches((Stream(forget, 2), Stream(retain, 2)), 1, 0).take(0, 1, 1)
    assert batch["tokens"].shape == (1, 4, 9)
    assert (batch["labels"][0, :2, 4:] == -100).all()


@pytest.mark.parametrize("count, epochs, rows", [(0, 1, 2), (3, 0, 2), (3, 1, 0)])
def test_settings_that_cannot_train_are_refused(count, epochs, rows):
    with pytest.raises(UserError):
        Batches((Stream(make_examples(3).take(range(count)), rows),), epochs, 0)
