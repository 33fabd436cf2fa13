"""The sampler draws what the mechanism says, and a unit's draws depend on the unit alone."""

import dataclasses

import numpy as np
import pytest
from conftest import make_examples
from scipy.stats import binom, chisquare

from jaxforget.data.sampling import id_keys
from jaxforget.data.tokens import Examples
from jaxforget.errors import UserError
from jaxforget.privacy.accounting import Mechanism
from jaxforget.privacy.sampling import PoissonBatches, population


def known(units, batch, steps, sampler="poisson", **more):
    return Mechanism(
        unit="record",
        sampler=sampler,
        population=units,
        batch=batch,
        steps=steps,
        sigma=1.0,
        clip=0.1,
        delta=1e-6,
        **more,
    )


def numbered(count):
    """Examples that are nothing but keys and lengths: fast in large numbers."""
    key_N = id_keys(map(str, range(count)))
    length_N = np.arange(1, count + 1, dtype=np.int32)
    return Examples(("",) * count, {"tokens": length_N[:, None], "length": length_N, "key": key_N})


def drawn(batches):
    """The keys that take part, step by step, as sets."""
    return [set(batches._units[0][chosen].tolist()) for chosen in batches.draws]


def test_participation_is_poisson():
    units, batch, steps = 2000, 200, 500
    batches = PoissonBatches(numbered(units), known(units, batch, steps), seed=1)
    took_TN = np.zeros((steps, units), bool)
    for step, chosen in enumerate(batches.draws):
        took_TN[step, chosen] = True
    # Each unit: Binomial(T, q); each step: Binomial(N, q). Chi-square over cells with expectation above 5.
    for count, of in ((took_TN.sum(axis=0), steps), (took_TN.sum(axis=1), units)):
        edges = np.unique(binom(of, 0.1).ppf(np.linspace(0, 1, 16)[1:-1]))
        seen = np.bincount(np.searchsorted(edges, count, side="left"), minlength=len(edges) + 1)
        expected = np.diff([0.0, *binom(of, 0.1).cdf(edges), 1.0]) * len(count)
        assert chisquare(seen, expected).pvalue > 1e-3
    # Steps and units are uncorrelated: 5 standard errors.
    lag = np.corrcoef(took_TN[:-1].ravel(), took_TN[1:].ravel())[0, 1]
    neighbour = np.corrcoef(took_TN[:, :-1].ravel(), took_TN[:, 1:].ravel())[0, 1]
    assert max(abs(lag), abs(neighbour)) < 5 / np.sqrt(took_TN.size)


def test_removing_a_unit_changes_no_other_draw():
    examples, mechanism = make_examples(60), known(60, 12, 40)
    gone = int(examples.columns["key"][17])
    everyone = drawn(PoissonBatches(examples, mechanism, 3))
    without = drawn(PoissonBatches(examples.take(np.arange(60) != 17), mechanism, 3))
    assert any(gone in step for step in everyone)
    assert without == [step - {gone} for step in everyone]


def test_draws_ignore_how_the_examples_came():
    examples, mechanism = make_examples(60), known(60, 12, 10)
    shuffled = examples.take(np.random.default_rng(0).permutation(60))
    one, other = (PoissonBatches(e, mechanism, 3).take(0, 10, 10) for e in (examples, shuffled))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert drawn(PoissonBatches(examples, mechanism, 4)) != drawn(PoissonBatches(examples, mechanism, 3))


def test_any_step_can_be_had_without_those_before():
    batches = PoissonBatches(make_examples(60), known(60, 12, 10), 3, microbatch=4)
    fresh = PoissonBatches(make_examples(60), known(60, 12, 10), 3, microbatch=4)
    whole, part = batches.take(0, 10, 10), fresh.take(6, 8, 4)
    for name in whole:
        np.testing.assert_array_equal(whole[name][[6, 7, 7, 7]], part[name])


def test_padding_comes_last_and_weighs_nothing():
    batches = PoissonBatches(make_examples(60), known(60, 12, 40), 3, microbatch=4)
    steps = batches.take(0, 40, 40)
    size_T = np.array([len(chosen) for chosen in batches.draws])
    assert batches.units == -(-size_T.max() // 4) * 4 and steps["tokens"].shape[:2] == (40, batches.units)
    np.testing.assert_array_equal(steps["weight"], np.arange(batches.units)[None] < size_T[:, None])
    assert steps["weight"].dtype == np.float32 and (steps["length"] > 0).all()  # padding is real rows
    assert len({int(x) for x in steps["draw"][0][steps["weight"][0] > 0]}) == size_T[0]


def test_columns_of_the_examples_stay():
    """An objective that tells streams apart by them would otherwise descend where it should ascend."""
    examples = numbered(20)
    stream_N, factor_N = np.arange(20, dtype=np.int32) % 2, -np.ones(20, np.float32)
    own = dataclasses.replace(examples, columns=examples.columns | {"stream": stream_N, "factor": factor_N})
    batch = PoissonBatches(own, known(20, 8, 3), seed=0).take(0, 3, 3)
    assert (batch["factor"] == -1).all()
    np.testing.assert_array_equal(batch["stream"], (batch["tokens"][..., 0] - 1) % 2)  # numbered: tokens tell the row
    plain = PoissonBatches(examples, known(20, 8, 3), seed=0).take(0, 3, 3)
    assert (plain["factor"] == 1).all() and (plain["stream"] == 0).all()


def test_empty_draws_are_steps_too():
    batches = PoissonBatches(make_examples(20), known(20, 1, 60), 0)
    sizes = [len(chosen) for chosen in batches.draws]
    assert 0 in sizes
    empty = batches.take(sizes.index(0), sizes.index(0) + 1, 1)
    assert empty["weight"].sum() == 0 and (empty["length"] > 0).all()
    nothing = PoissonBatches(
        make_examples(20), dataclasses.replace(known(20, 1, 60), population=10**9), 0, microbatch=3
    )
    assert nothing.units == 3 and nothing.tokens == 0


def test_rows_of_a_unit_stand_together():
    examples = make_examples(9)
    unit_N = np.array([5, 7, 5, 9, 7, 5, 11, 9, 13], np.uint64)  # sizes 3, 2, 2, 1, 1
    examples = dataclasses.replace(examples, columns={**examples.columns, "unit": unit_N})
    assert population(examples) == 5
    batches = PoissonBatches(examples, known(5, 2, 30), 2)
    assert batches.members == 3
    unit_of = dict(zip(examples.columns["key"].astype(np.uint32).tolist(), unit_N.tolist(), strict=True))
    steps = batches.take(0, 30, 30)
    assert "unit" not in steps
    for step, chosen in enumerate(batches.draws):
        key_Uk = steps["key"][step].reshape(-1, 3)
        weight_Uk = steps["weight"][step].reshape(-1, 3)
        for u, index in enumerate(chosen):
            unit = [5, 7, 9, 11, 13][index]
            assert {unit_of[key] for key in key_Uk[u].tolist()} == {unit}
            assert weight_Uk[u].sum() == (unit_N == unit).sum() == len(set(key_Uk[u].tolist()))
        assert (weight_Uk[len(chosen) :] == 0).all()


def test_a_capped_draw_is_a_random_part_of_the_draw():
    units, steps = 400, 300
    free = PoissonBatches(numbered(units), known(units, 40, steps), 5)
    capped = PoissonBatches(numbered(units), known(units, 40, steps, "truncated", cap=42), 5)
    cut = 0
    for whole, part in zip(free.draws, capped.draws, strict=True):
        assert len(part) == min(len(whole), 42) and set(part.tolist()) <= set(whole.tolist())
        cut += len(whole) > 42
    assert cut > 50 and capped.units == 42
    taken_N = np.bincount(np.concatenate(capped.draws), minlength=units)
    assert chisquare(taken_N.reshape(20, 20).sum(axis=1)).pvalue > 1e-3  # the cut prefers nobody


def test_cyclic_draws_keep_every_unit_apart_from_itself():
    """A unit belongs to one part, and the parts take turns: between two steps with it are `bands` - 1 others."""
    units, batch, steps, bands = 4000, 100, 400, 4
    examples, how = numbered(units), known(units, batch, steps, "cyclic", bands=bands)
    draws = drawn(PoissonBatches(examples, how, seed=1))
    turn = {}
    for step, chosen in enumerate(draws):
        for unit in chosen:
            assert turn.setdefault(unit, step % bands) == step % bands
    share = np.bincount(list(turn.values())) / len(turn)
    assert np.all(np.abs(share - 1 / bands) < 5 * np.sqrt(0.25 * 0.75 / units))
    size = np.array([len(chosen) for chosen in draws])
    assert abs(size.mean() - batch) < 5 * np.sqrt(batch / steps)
    fewer = drawn(PoissonBatches(examples.take(np.arange(units) != 7), how, seed=1))
    assert [chosen - {examples.columns["key"][7]} for chosen in draws] == fewer


def test_shuffle_visits_every_unit_once_an_epoch():
    batches = PoissonBatches(numbered(23), known(23, 5, 12, "shuffle"), 0)
    assert batches.steps_per_epoch == 5 and batches.units == 5
    for epoch in (0, 1):
        visited = np.concatenate(batches.draws[5 * epoch : 5 * epoch + 5])
        assert sorted(visited.tolist()) == list(range(23))
    assert np.concatenate(batches.draws[:5]).tolist() != np.concatenate(batches.draws[5:10]).tolist()


def test_fixed_draws_so_many_without_replacement():
    units, steps = 200, 400
    batches = PoissonBatches(numbered(units), known(units, 20, steps, "fixed"), 0)
    assert all(len(set(chosen.tolist())) == 20 for chosen in batches.draws)
    taken_N = np.bincount(np.concatenate(batches.draws), minlength=units)
    assert chisquare(taken_N).pvalue > 1e-3


def test_tokens_are_counted_without_padding():
    batches = PoissonBatches(make_examples(30), known(30, 6, 10), 0)
    steps = batches.take(0, 10, 10)
    counted = (steps["length"] * (steps["weight"] > 0)).sum(axis=1).cumsum()
    assert [batches.tokens_until(step) for step in range(1, 11)] == counted.tolist()
    assert batches.tokens == counted[-1] and batches.count(2, 5) == 3


def test_a_large_set_is_drawn_quickly():
    batches = PoissonBatches(numbered(100_000), known(100_000, 1000, 50), 0)
    assert abs(np.mean([len(chosen) for chosen in batches.draws]) - 1000) < 5 * np.sqrt(1000 / 50)


def test_bad_input():
    with pytest.raises(UserError, match="empty after tokenisation"):
        PoissonBatches(make_examples(5).take([]), known(5, 1, 1), 0)
    with pytest.raises(UserError, match="microbatch is 0"):
        PoissonBatches(make_examples(5), known(5, 1, 1), 0, microbatch=0)
