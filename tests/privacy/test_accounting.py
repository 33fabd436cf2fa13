"""Accounting against independent numbers, calibration, and what is refused."""

import dataclasses
import json
import math

import pytest
from scipy.stats import norm

from jaxforget.errors import UserError
from jaxforget.privacy import accounting
from jaxforget.privacy.accounting import Mechanism, PrivacyConfig, mechanism


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxforget" / "calibration"


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "papers" / "golden_dp.json").read_text())["accounting"]


def known(**changes):
    base = {"unit": "record", "sampler": "poisson", "population": 10_000, "batch": 100, "steps": 1000}
    return Mechanism(**{**base, "sigma": 1.0, "clip": 0.1, "delta": 1e-5, **changes})


@pytest.mark.shared
def test_epsilons_of_the_oracle(golden):
    for row in golden["epsilon"]:
        batch = round(row["q"] * 1000)
        run = known(population=1000, batch=batch, **{name: row[name] for name in ("steps", "sigma", "delta")})
        assert run.epsilon("pld") == pytest.approx(row["pld"], abs=1e-3)
        if row["rdp"] is not None:
            assert run.epsilon("rdp") == pytest.approx(row["rdp"], abs=1e-3)


@pytest.mark.shared
def test_truncated_and_without_replacement(golden):
    for row in golden["truncated_poisson_pld"]:
        run = known(sampler="truncated", cap=row["cap"])
        assert run.epsilon() == pytest.approx(row["epsilon"], abs=1e-3)
        assert run.epsilon("rdp") is None
    fixed = known(sampler="fixed")
    assert fixed.epsilon() == pytest.approx(golden["without_replacement_rdp_replace_one"][0]["epsilon"], abs=1e-3)
    assert fixed.row()["accountant"] == "rdp" and fixed.epsilon("pld") is None


@pytest.mark.shared
@pytest.mark.parametrize("row", [0, 3, *(pytest.param(row, marks=pytest.mark.slow) for row in (1, 2))])
def test_calibration_of_the_oracle_inverts(golden, row):
    goal = golden["calibration"][row]
    population, batch = (goal["N"], goal["batch"]) if "N" in goal else (1000, 100)
    delta = 1 / (2 * population) if "N" in goal else goal["delta"]
    config = PrivacyConfig(epsilon=goal["epsilon"], delta=delta)
    run = mechanism(config, population=population, batch=batch, steps=goal["steps"], unit="record")
    assert run.sigma == pytest.approx(goal["sigma_pld"], abs=1e-3)
    # Never above the target; below it by what rounding sigma up to 1e-5 costs where epsilon is steepest.
    assert 0 <= goal["epsilon"] - run.epsilon() < 3e-3


def test_one_full_batch_is_the_gaussian_mechanism():
    """Independent of dp_accounting: delta(epsilon) of a Gaussian in closed form, arXiv 1805.06530 Theorem 8."""
    for sigma, steps in [(1.0, 1), (2.0, 4), (5.0, 3)]:
        run = known(batch=10_000, sigma=sigma, steps=steps)
        epsilon, mu = run.epsilon(), math.sqrt(steps) / sigma
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-5, rel=2e-3)  # the grid of 1e-4, where delta falls by a factor e per 1/10


def test_epsilon_grows_with_steps_and_batch_and_falls_with_noise():
    epsilon = known().epsilon()
    assert known(steps=2000).epsilon() > epsilon
    assert known(batch=200).epsilon() > epsilon
    assert known(sigma=1.2).epsilon() < epsilon
    assert known(sigma=0.0).epsilon() == math.inf


def test_shuffling_gets_no_amplification():
    shuffled = known(sampler="shuffle", steps=250)  # 3 epochs begun
    assert shuffled.epsilon() == pytest.approx(known(batch=10_000, steps=3).epsilon(), abs=1e-6)
    assert shuffled.epsilon() > 4 * known(steps=250).epsilon()
    assert shuffled.relation == "zero out one"


def test_correlated_noise_costs_what_fewer_steps_with_larger_batches_do():
    """arXiv 2306.08153: T / b steps with probability b q; with a step left over, that many more."""
    banded = known(sampler="cyclic", bands=4)
    assert banded.epsilon() == known(batch=400, steps=250).epsilon() > known().epsilon()
    assert known(sampler="cyclic", bands=4, steps=1001).epsilon() == known(batch=400, steps=251).epsilon()


def test_noise_doubles_where_a_unit_is_replaced():
    assert known(sigma=1.5).noise_std == pytest.approx(1.5 * 0.1)
    assert known(sampler="fixed", sigma=1.5).noise_std == pytest.approx(1.5 * 2 * 0.1)


def test_a_row_states_everything():
    row = known().row()
    stated = {name: row[name] for name in ("unit", "relation", "sampler", "accountant", "delta", "sigma", "q")}
    assert stated == {
        "unit": "record",
        "relation": "add/remove one",
        "sampler": "poisson",
        "accountant": "pld",
        "delta": 1e-5,
        "sigma": 1.0,
        "q": 0.01,
    }
    assert (row["steps"], row["clip"], row["population"], row["batch"]) == (1000, 0.1, 10_000, 100)
    assert row["epsilon"] == pytest.approx(1.82824, abs=1e-3)
    assert row["epsilon_rdp"] == pytest.approx(2.10137, abs=1e-3)


# the cache

SMALL = {"population": 1000, "batch": 1000, "steps": 1, "unit": "record"}


def test_a_calibration_is_done_once(own_cache, monkeypatch):
    config = PrivacyConfig(epsilon=2.0, delta=1e-5)
    first = mechanism(config, **SMALL)
    (path,) = own_cache.iterdir()
    monkeypatch.setattr(accounting, "_calibrate", lambda *_: pytest.fail("calibrated again"))
    assert mechanism(config, **SMALL) == first
    assert mechanism(dataclasses.replace(config, clip=1.0), **SMALL).sigma == first.sigma  # sigma is relative to C
    monkeypatch.setattr(accounting, "_calibrate", lambda *_: 7.0)
    assert mechanism(config, **{**SMALL, "steps": 2}).sigma == 7.0  # another run, another file
    saved = json.loads(path.read_text())
    damages = ["", "{", "[]", "3", json.dumps({**saved, "sigma": "no"}), json.dumps({**saved, "steps": 9})]
    for damage in damages:
        path.write_text(damage)
        assert mechanism(config, **SMALL).sigma == 7.0
        assert json.loads(path.read_text())["sigma"] == 7.0


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(accounting, "_calibrate", lambda *_: 7.0)
    assert mechanism(PrivacyConfig(epsilon=2.0), **SMALL).sigma == 7.0


# bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epsilon": 1.0, "noise": 1.0}, "both given"),
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be above 0"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": 0.01}, "noise is 0.01; it must be 0 or between 0.125 and 1024"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0 and finite"),
        ({"clip": math.inf}, "clip is inf"),
        ({"sampler": "truncated"}, "truncated needs a cap of at least 1"),
        ({"cap": 5}, "others take none"),
        ({"noise": 1.0, "bands": 2}, "bands is 2 with sampler poisson; cyclic needs bands of at least 2"),
        ({"noise": 1.0, "sampler": "cyclic"}, "bands is 1 with sampler cyclic"),
        ({"noise": 1.0, "sampler": "cyclic", "bands": 2, "quantile": 0.5}, "give one of them"),
        ({"sampler": "truncated", "cap": 0}, "cap is 0 with sampler truncated"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        PrivacyConfig(**settings)


def test_delta_must_be_below_one_over_n():
    for delta in (1e-3, 0.5):
        with pytest.raises(UserError, match=r"with N = 1000 records it must be below 1/N = 0\.001"):
            mechanism(PrivacyConfig(noise=1.0, delta=delta), **SMALL)
    assert mechanism(PrivacyConfig(noise=1.0), **SMALL).delta == pytest.approx(1000**-1.1)


def test_a_batch_larger_than_the_data():
    with pytest.raises(UserError, match="batch of 1001 pairs is larger than the data, which has 1000"):
        mechanism(PrivacyConfig(noise=1.0), **{**SMALL, "batch": 1001, "unit": "pair"})


def test_bands_must_leave_a_batch_to_every_part():
    with pytest.raises(UserError, match="bands is 11 with batches of 100 of 1000 records; .* at most 10"):
        banded = PrivacyConfig(noise=1.0, sampler="cyclic", bands=11)
        mechanism(banded, population=1000, batch=100, steps=9, unit="record")


@pytest.mark.slow
def test_an_unreachable_epsilon_names_the_nearest():
    with pytest.raises(UserError, match=r"epsilon 0.001 cannot be reached in 1 steps .* the nearest is 0\.0018") as low:
        mechanism(PrivacyConfig(epsilon=0.001, delta=1e-5), **SMALL)
    assert "at noise 1024" in str(low.value)
    with pytest.raises(UserError, match=r"the nearest is \d+\.\d+, at noise 0\.125"):
        mechanism(PrivacyConfig(epsilon=99.0, delta=1e-5), **SMALL)


def test_privacy_is_off_by_default():
    assert not PrivacyConfig().private
    assert PrivacyConfig(noise=0.0).private and PrivacyConfig(epsilon=3.0).private
