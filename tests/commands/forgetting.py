"""Fixtures of the tests of train.forget: a trained ensemble, some of its records, and it without them."""

import shutil
from types import SimpleNamespace

import pytest
import shards

import train.forget
import train.sisa


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    return (*shards.TRAINING, "--data", shards.write_data(tmp_path_factory.mktemp("data") / "data.jsonl"))


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    shards.done(train.sisa, *flags, "--out", out)
    return out


@pytest.fixture(scope="session")
def ids(trained):
    """A record of the first slice of shard 0, and one of the last slice of shard 2."""
    where = shards.places(trained)
    return tuple(next(one for one in shards.IDS if where[one] == place) for place in [(0, 0), (2, 1)])


@pytest.fixture(scope="session")
def undisturbed(trained, ids, tmp_path_factory):
    """The ensemble without these records, and the report of their deletion."""
    home = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(trained, home / "out")
    outcome = shards.done(train.forget, "--ensemble", home / "out", "--id", *ids, "--out", home / "report")
    return SimpleNamespace(out=home / "out", report=home / "report", outcome=outcome)


@pytest.fixture(scope="session")
def late(trained, ids, tmp_path_factory):
    """The ensemble without a record of a last slice, whose deletion starts from the slice before."""
    home = tmp_path_factory.mktemp("late")
    shutil.copytree(trained, home / "out")
    shards.done(train.forget, "--ensemble", home / "out", "--id", ids[1], "--out", home / "report")
    return home / "out"


@pytest.fixture
def ensemble(trained, tmp_path):
    """A copy of the trained ensemble."""
    shutil.copytree(trained, tmp_path / "ensemble")
    return tmp_path / "ensemble"


@pytest.fixture
def forget(ensemble, tmp_path):
    """Run train.forget on it in this process, with a new report each time; returns code, words and report."""
    number = 0

    def run(*flags):
        nonlocal number
        number += 1
        report = tmp_path / f"report{number}"
        outcome = shards.call(train.forget, "--ensemble", ensemble, *flags, "--out", report)
        outcome.report = report
        return outcome

    return run
