"""Mixed batches: every row as if it were alone with its modules, nothing recompiled, nothing dropped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifiers import classifier, examples
from test_modules import MODEL, PARAMS, module_of

from jaxforget.debiasing import serving
from jaxforget.debiasing.composition import merged
from jaxforget.debiasing.serving import Modular, buckets
from jaxforget.errors import UserError

MODULES = {"age": module_of(1), "gender": module_of(2, 0.3), "dialect": module_of(3)}
SETS = [(), ("age",), ("gender",), ("gender", "age"), ("dialect", "age", "gender")]
BATCH = {name: column for name, column in examples(40).columns.items() if name in ("tokens", "length")}


def server(**settings):
    return Modular(MODEL, PARAMS, MODULES, **settings)


def test_off_is_exact_after_any_sequence_of_on_and_off():
    modular, rng = server(slots=2), np.random.default_rng(0)
    plain = jax.jit(MODEL.batch_logits)(PARAMS, BATCH)
    for _ in range(8):
        names = SETS[rng.integers(len(SETS))]
        expected = merged(PARAMS, {name: MODULES[name] for name in names})
        chex.assert_trees_all_equal(modular.params(names), jax.tree.map(jnp.asarray, expected))
        chex.assert_trees_all_equal(modular.params(()), jax.tree.map(jnp.asarray, PARAMS))
    np.testing.assert_allclose(modular.logits(BATCH), plain, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 8, 64])
def test_every_row_of_a_mixed_batch_is_as_it_would_be_alone(rows):
    modular, rng = server(rows=rows), np.random.default_rng(rows)
    for mix in (rng.integers(0, 5, 40), np.zeros(40, int), np.asarray([4] * 39 + [1]), np.arange(40) % 5):
        found = modular.mixed(BATCH, [SETS[i] for i in mix])
        for i in set(mix.tolist()):
            alone = modular.logits(BATCH, SETS[i])
            np.testing.assert_allclose(found[mix == i], alone[mix == i], atol=1e-6)


def test_a_set_is_merged_when_it_is_first_asked_for():
    modular, plain = server(slots=1), jax.jit(MODEL.batch_logits)
    for names in SETS[1:]:
        on = merged(PARAMS, {name: MODULES[name] for name in names})
        np.testing.assert_allclose(modular.logits(BATCH, names), plain(on, BATCH), atol=1e-6)


def test_every_mix_is_the_same_program():
    counting = chex.assert_max_traces(lambda *args: MODEL.batch_logits(*args), n=2)  # its shape, then the program

    class Counted:
        batch_logits = staticmethod(counting)

    modular = server(rows=8, slots=4)
    modular.model = Counted()
    for mix in (np.zeros(40, int), np.arange(40) % 5, np.arange(40) % 2, np.full(40, 3)):
        modular.mixed(BATCH, [SETS[i] for i in mix])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_buckets_hold_every_row_once_and_waste_less_than_a_bucket_a_set(rows):
    rng = np.random.default_rng(0)
    for _ in range(20):
        slot_B = rng.integers(0, 4, 50)
        slot_G, row_GR, used, place_B = buckets(slot_B, rows, 4)
        assert used <= len(slot_G) and used * rows < 50 + 4 * rows
        assert len(set(place_B.tolist())) == 50 and (place_B < used * rows).all()
        np.testing.assert_array_equal(row_GR.reshape(-1)[place_B], np.arange(50))
        np.testing.assert_array_equal(np.repeat(slot_G, rows)[place_B], slot_B)


def test_unknown_names_and_too_many_sets_are_errors():
    modular = server(slots=2)
    with pytest.raises(UserError, match="unknown module 'religion'; loaded are age, dialect, gender"):
        modular.mixed(BATCH, [("age",)] * 39 + [("religion",)])
    with pytest.raises(UserError, match="unknown module 'religion'"):
        modular.params(["religion"])
    with pytest.raises(UserError, match="the batch has 3 sets of modules and the server 2 slots"):
        modular.mixed(BATCH, [SETS[1 + i % 3] for i in range(40)])
    with pytest.raises(UserError, match="the batch has 40 rows and 3 sets of modules"):
        modular.mixed(BATCH, SETS[:3])
    with pytest.raises(UserError, match="module age was made for the base"):
        Modular(MODEL, classifier(seed=2)[1], MODULES)


def test_sets_of_a_batch_do_not_replace_each_other():
    """Two slots, both needed: the older set must not give way to the newer of the same batch."""
    modular = server(slots=2)
    modular.params(("dialect",))
    found = modular.mixed(BATCH, [SETS[1 + i % 2] for i in range(40)])
    np.testing.assert_allclose(found[::2], modular.logits(BATCH, ("age",))[::2], atol=1e-6)
    np.testing.assert_allclose(found[1::2], modular.logits(BATCH, ("gender",))[1::2], atol=1e-6)


def test_a_merged_set_is_kept(monkeypatch):
    merges = []
    monkeypatch.setattr(serving, "merged", lambda *args: merges.append(1) or merged(*args))
    modular = server(slots=2)
    for names in (("age",), ("gender",), ("age",), ("gender", "age"), ("age",), ("age", "gender")):
        modular.params(names)
    assert len(merges) == 3  # age, gender, both in place of gender


def test_overlap_is_told_once():
    said = []
    modular = server(tell=said.append)
    for _ in range(2):
        modular.params(("age", "gender"))
    assert len(said) == 1 and said[0].startswith("modules age and gender overlap at ")


def test_what_a_module_requires_comes_with_it():
    """An attribute taken out of a task that is a module itself."""
    modules = {"task": module_of(4), "age": module_of(1, requires=["task"])}
    modular = Modular(MODEL, PARAMS, modules)
    chex.assert_trees_all_equal(modular.params(["age"]), jax.tree.map(jnp.asarray, merged(PARAMS, modules)))
    with pytest.raises(UserError, match="unknown module 'task'; loaded are age"):
        Modular(MODEL, PARAMS, {"age": modules["age"]}).params(["age"])
