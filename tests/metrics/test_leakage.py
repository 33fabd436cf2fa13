"""Attackers find what is there and nothing else; LEACE takes out all that is linear and no more; floors by hand."""

import csv
import gzip
import json

import numpy as np
import pytest

from jaxforget.errors import UserError
from jaxforget.metrics.leakage import AttackConfig, Split, attack, balanced_accuracy, label_floor, votes
from jaxforget.metrics.leakage_erasure import fit_eraser

QUICK = AttackConfig(epochs=6, learning_rate=3e-3)


def normal(count, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)).astype(np.float32), rng.integers(0, 2, count)


def splits(make, sizes=(600, 200, 400)):
    return [Split(*make(count, seed)) for seed, count in enumerate(sizes)]


def planted(count, seed):
    x, y = normal(count, seed=seed)
    x[:, 0] += 6.0 * y
    return 5.0 + 100.0 * x, y  # whatever its scale


def test_an_attribute_in_plain_sight_is_found_and_noise_is_not():
    config = AttackConfig(epochs=12, learning_rate=1e-2)
    assert attack(*splits(planted), 2, config, 0)["balanced_accuracy"] > 98
    chance = attack(*splits(lambda n, s: normal(n, seed=s)), 2, QUICK, 0)["balanced_accuracy"]
    assert abs(chance - 50) < 4 * 100 * 0.5 / np.sqrt(400)  # four standard errors


def test_a_one_hot_attribute_is_told_exactly_and_what_is_not_linear_is_found():
    def hot(count, seed):
        y = np.random.default_rng(seed).integers(0, 3, count)
        return np.eye(8, dtype=np.float32)[y], y

    assert attack(*splits(hot), 3, QUICK, 0)["balanced_accuracy"] == 100

    def either(count, seed):
        x, _ = normal(count, seed=seed)
        return x, (x[:, 0] * x[:, 1] > 0).astype(int)

    config = AttackConfig(epochs=30, learning_rate=1e-2)
    assert attack(*splits(either, (2000, 400, 400)), 2, config, 0)["balanced_accuracy"] > 85


def test_rare_classes_count_as_much_and_unknown_rows_do_not():
    def rare(count, seed):
        x, _ = normal(count, seed=seed)
        y = (np.random.default_rng(seed + 9).random(count) < 0.1).astype(int)
        x[:, 0] += 1.5 * y  # the best attacker by accuracy would almost always say 0
        y[:50] = -1
        x[:50] = 1e6
        return x, y

    found = attack(*splits(rare, (3000, 600, 2000)), 2, QUICK, 0)
    assert found["balanced_accuracy"] > 72  # the best threshold gives 77, always 0 gives 50


def test_the_same_seed_gives_the_same_numbers():
    one, two = (attack(*splits(planted, (200, 80, 80)), 2, AttackConfig(epochs=2), 3) for _ in range(2))
    assert one == two


def test_one_value_is_refused():
    with pytest.raises(UserError, match="one value"):
        attack(*[Split(np.zeros((9, 4)), np.zeros(9, int))] * 3, 2, QUICK, 0)


def test_balanced_accuracy_and_votes_by_hand():
    true = np.asarray([0, 0, 0, 0, 1, 1])
    assert balanced_accuracy(np.asarray([0, 0, 0, 1, 1, 0]), true, 2) == pytest.approx(62.5)
    assert balanced_accuracy(np.zeros(6, int), true, 3) == pytest.approx(50.0)  # class 2 does not occur
    told = np.asarray([[0, 1, 2, 1], [0, 1, 0, 2], [1, 1, 2, 0]])
    assert votes(told, 3).tolist() == [0, 1, 2, 0]  # the last is a tie of all three


# -------------------------------------------------------------------------------------------------- floors


def test_the_floor_by_hand():
    """Label 0 is named a = 1 and label 1 a = 0, whatever the sizes of the classes."""
    label = [0] * 5 + [1] * 15
    attribute = [1, 1, 1, 1, 0] + [0] * 9 + [1] * 6
    assert label_floor(label, attribute, label, attribute, 2) == pytest.approx(100 * (9 / 10 + 4 / 10) / 2)
    assert label_floor([0, 1, 0], [0, 1, -1], [0, 1, 1], [0, 1, -1], 2) == 100.0


def test_floors_of_the_development_data(shared):
    golden = json.loads((shared / "papers/golden_dp.json").read_text())
    with gzip.open(shared / "data/davidson_dialect/davidson_dialect.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    label = np.asarray([["hate", "offensive", "neither"].index(row["label"]) for row in rows])
    dialect = np.asarray([row["dialect"] == "white" for row in rows]).astype(int)
    assert label_floor(label, dialect, label, dialect, 2) == pytest.approx(
        100 * golden["davidson_dialect"]["label_only_floor"], abs=0.05
    )
    rows = []
    for name in ("valid", "test"):
        with open(shared / f"data/hate_author_attributes/English_{name}.tsv") as file:
            rows += list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    label = np.asarray([int(row["label"]) for row in rows])
    for attribute, floor in golden["hate_author_attributes"]["label_only_floor"].items():
        known = np.asarray([-1 if row[attribute] == "x" else int(row[attribute]) for row in rows])
        assert label_floor(label, known, label, known, 2) == pytest.approx(100 * floor, abs=0.05), attribute


# --------------------------------------------------------------------------------------------------- LEACE


def correlated(count=500, width=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, width)) @ rng.normal(size=(width, width))
    return x + rng.normal(size=(3, width))[y] * 2.0, y


def test_after_erasure_all_classes_have_the_same_mean():
    x, y = correlated()
    gone = fit_eraser(x, y)(x)
    means = np.stack([gone[y == c].mean(axis=0) for c in range(3)])
    np.testing.assert_allclose(means - means.mean(axis=0), 0, atol=1e-5)
    assert np.abs(np.stack([x[y == c].mean(axis=0) for c in range(3)]).std(axis=0)).max() > 0.5
    np.testing.assert_allclose(gone.mean(axis=0), x.mean(axis=0), atol=1e-5)


def test_erasure_is_a_projection_and_least_squares():
    """Erased again nothing changes; and of all x + B(x - mean) with equal class means none is nearer to x."""
    x, y = correlated()
    eraser = fit_eraser(x, y)
    gone = eraser(x)
    np.testing.assert_allclose(eraser(gone), gone, atol=1e-4)
    # Constrained least squares by its normal equations, in place of the closed form.
    centred, z = x - x.mean(axis=0), np.eye(3)[y] - np.eye(3)[y].mean(axis=0)
    cov, cross = centred.T @ centred / len(x), centred.T @ z[:, :2] / len(x)
    change = cross @ np.linalg.inv(cross.T @ np.linalg.inv(cov) @ cross) @ cross.T @ np.linalg.inv(cov)
    np.testing.assert_allclose(gone, x - centred @ change.T, atol=1e-4)


def test_two_attributes_at_once_and_unknown_rows():
    x, y = correlated()
    other = (np.random.default_rng(1).random(500) < 0.5).astype(int)
    x[:, 3] += 2.0 * other
    other[:40] = -1
    gone = fit_eraser(x, np.stack([y, other], axis=1))(x)
    for attribute, classes in ((y, 3), (other, 2)):
        means = np.stack([gone[attribute == c].mean(axis=0) for c in range(classes)])
        np.testing.assert_allclose(means - means[:1], 0, atol=1e-4)


def test_a_direction_without_variance_stays():
    x, y = correlated()
    x[:, 2] = 7.0
    gone = fit_eraser(x, y)(x)
    np.testing.assert_allclose(gone[:, 2], 7.0, atol=1e-5)
    assert np.isfinite(gone).all()
