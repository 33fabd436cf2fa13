"""Modules and their files: exact both ways, refused where they do not belong."""

import chex
import jax
import numpy as np
import pytest
from classifiers import classifier
from safetensors.numpy import load_file, save_file

from jaxforget.debiasing.composition import merged
from jaxforget.debiasing.differences import layout_of, sparse
from jaxforget.debiasing.modules import (
    check_base,
    from_places,
    inspect,
    load_module,
    save_module,
    to_places,
)
from jaxforget.errors import UserError
from jaxforget.models import hub
from jaxforget.models.adapters import digest

MODEL, PARAMS = classifier()
LAYOUT = layout_of(MODEL)


def module_of(seed, density=0.1, base=PARAMS, **about):
    rng = np.random.default_rng(seed)
    found = sparse(rng.normal(size=LAYOUT.size).astype(np.float32), density)
    return from_places(LAYOUT, found["place"], found["value"], base, **about)


@pytest.fixture
def saved(tmp_path):
    return save_module(tmp_path / "a.safetensors", module_of(0, attribute="gender", density_wanted=0.1))


def vector(params):
    return np.concatenate([np.ravel(hub.get_leaf(params, path)) for path in LAYOUT.paths])


def test_the_same_module_makes_the_same_file(saved, tmp_path):
    again = save_module(tmp_path / "b.safetensors", module_of(0, attribute="gender", density_wanted=0.1))
    assert again.read_bytes() == saved.read_bytes()


def test_a_file_gives_the_module_back_bit_for_bit(saved):
    before, after = module_of(0), load_module(saved, digest(PARAMS))
    assert before.entries.keys() == after.entries.keys() and after.size == LAYOUT.size
    for path, entry in before.entries.items():
        np.testing.assert_array_equal(entry.place_P, after.entries[path].place_P)
        np.testing.assert_array_equal(entry.value_P, after.entries[path].value_P)
    assert after.about == {"attribute": "gender", "density_wanted": 0.1}
    assert after.nonzeros == round(0.1 * LAYOUT.size) and after.density <= 0.1 + 1 / LAYOUT.size
    chex.assert_trees_all_equal(merged(PARAMS, {"a": before}), merged(PARAMS, {"a": after}))
    value_N = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    chex.assert_trees_all_equal(to_places(after, LAYOUT), sparse(value_N, 0.1))


def test_the_file_is_sorted_indices_and_values_by_tensor(saved):
    tensors = load_file(saved)
    dense = np.zeros(LAYOUT.size, np.float32)
    for path, start, size in zip(LAYOUT.paths, np.cumsum(LAYOUT.sizes) - LAYOUT.sizes, LAYOUT.sizes, strict=True):
        if f"{path}#idx" in tensors:
            place = tensors[f"{path}#idx"]
            assert place.dtype == np.uint32 and (np.diff(place.astype(np.int64)) > 0).all() and place[-1] < size
            dense[start + place.astype(np.int64)] = tensors[f"{path}#val"]
    np.testing.assert_array_equal(vector(merged(PARAMS, {"a": module_of(0)})), vector(PARAMS) + dense)
    assert sum(x.nbytes for x in tensors.values()) == inspect(load_module(saved))["bytes"] < saved.stat().st_size


def test_half_precision_halves_the_values_and_rounds_them(tmp_path):
    exact = module_of(0)
    rounded = load_module(save_module(tmp_path / "half.safetensors", exact, "float16"))
    for path, entry in exact.entries.items():
        expected = entry.value_P.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(rounded.entries[path].value_P, expected)
    with pytest.raises(UserError, match="dtype is 'int8'; supported: float32, float16"):
        save_module(tmp_path / "x.safetensors", exact, "int8")
    assert not (tmp_path / "x.safetensors").exists()


def test_another_base_is_refused(saved):
    other = digest(classifier(seed=2)[1])
    with pytest.raises(UserError, match=f"a.safetensors was made for the base {digest(PARAMS)[:12]}…, not for"):
        load_module(saved, other)
    changed = jax.tree.map(np.copy, PARAMS)
    changed["score"]["bias"][0] += 1e-6
    with pytest.raises(UserError, match="not for this one"):
        check_base(load_module(saved), digest(changed), "gender")


@pytest.mark.parametrize("harm, message", [
    ("order", "not sorted, not unique, or beyond"), ("range", "not sorted, not unique, or beyond"),
    ("finite", "not finite"), ("count", "places and"), ("dtype", "int64 places"), ("missing", "not those"),
    ("metadata", "is no module"), ("version", "version 7; version 1 is supported"),
    ("json", "damaged"), ("cut", "truncated"), ("absent", "does not exist"),
])  # fmt: skip
def test_damage_is_told_in_a_sentence(saved, harm, message):
    from safetensors import safe_open

    with safe_open(saved, "np") as handle:
        metadata = handle.metadata()
    tensors = {name: np.copy(x) for name, x in load_file(saved).items()}
    first = sorted(name for name in tensors if name.endswith("#idx") and len(tensors[name]) > 3)[0]
    value = first.replace("#idx", "#val")
    if harm == "order":
        tensors[first][[0, 1]] = tensors[first][[1, 0]]
    elif harm == "range":
        tensors[first][-1] = 10**6
    elif harm == "finite":
        tensors[value][0] = np.nan
    elif harm == "count":
        tensors[value] = tensors[value][:-1]
    elif harm == "dtype":
        tensors[first] = tensors[first].astype(np.int64)
    elif harm == "missing":
        del tensors[value]
    elif harm == "metadata":
        metadata = {"format": "pt"}
    elif harm == "version":
        metadata = {name: value.replace('"version": 1', '"version": 7') for name, value in metadata.items()}
    elif harm == "json":
        metadata = {name: value[:-5] for name, value in metadata.items()}
    save_file(tensors, saved, metadata)
    if harm == "cut":
        saved.write_bytes(saved.read_bytes()[:-10])
    if harm == "absent":
        saved.unlink()
    with pytest.raises(UserError, match=message) as told:
        load_module(saved)
    assert "\n" not in str(told.value)
