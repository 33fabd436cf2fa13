"""Commands with --mesh: the results of one device, members of an ensemble in groups, and what is refused."""

import pytest
import running
import shards
from shards import IDS, PLAN, call, done

import train.forget
import train.lm
import train.sisa
import train.unlearn
from jaxforget.sisa.ledger import Ledger

pytestmark = pytest.mark.mesh
TIMES = ("seconds", "per_second", "gb")  # what a result may say besides
SMALL = ("--preset", "smoke", "--size.width", 16, "--size.heads", 2)


def stages(directory):
    with Ledger(directory) as ledger:
        return {key: (stage["digest"], stage["steps"]) for key, stage in ledger.stages().items()}


def test_more_members_than_devices_go_through_in_groups(tmp_path):
    """3 shards, 2 at a time, the last beside an empty place: the same bits, also after a deletion.

    Of unrolled layers XLA makes other fusions where there are several devices, which round in other ways.
    """
    data = shards.write_data(tmp_path / "data.jsonl")
    flags = (*PLAN, "--data", data, "--epochs", 2, "--width", 2, "--layers", "scan")
    found = {}
    for name, mesh in {"one": (), "two": ("--mesh", "member=2")}.items():
        out = tmp_path / name
        done(train.sisa, *flags, *mesh, "--out", out)
        trained = stages(out)
        done(train.forget, "--ensemble", out, "--id", IDS[0], IDS[5], *mesh, "--out", tmp_path / f"report-{name}")
        found[name] = trained, stages(out)
    assert found["one"] == found["two"]
    assert len(found["one"][0]) == 6 and found["one"][0] != found["one"][1]


REFUSED = {
    "a batch": (train.lm, (*SMALL, "--mesh", "data=8", "--batch-size", 12), "12 rows at a time do not divide over the "
                "8 devices of data and fsdp; take 8 or 16 (batch size and microbatch)"),
    "a micro-batch": (train.lm, (*SMALL, "--mesh", "data=2,fsdp=2", "--batch-size", 16, "--microbatch", 2),
                      "2 rows at a time do not divide over the 4 devices of data and fsdp; take 4 "),
    "rows of one kind": (train.unlearn, ("--preset", "smoke", "--mesh", "data=4", "--batch-size", 6),
                         "6 rows at a time do not divide over the 4 devices"),
    "members": (train.sisa, (*PLAN, "--mesh", "member=2"), "3 members do not divide over the 2 devices of the member "
                "axis; train 2 or 4 together"),
    "no mesh": (train.lm, (*SMALL, "--mesh", "rubbish"), "--mesh has 'rubbish'; write axis=devices such as"),
    "an axis": (train.lm, (*SMALL, "--mesh", "model=2"), "--mesh has 'model=2'; write axis=devices such as"),
    "devices": (train.lm, (*SMALL, "--mesh", "data=3"), "--mesh data=3 has 3 devices, but it must divide the 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_divide_is_told_in_one_sentence_before_anything_is_written(name, tmp_path):
    module, flags, message = REFUSED[name]
    data = ("--data", shards.write_data(tmp_path / "data.jsonl")) if module is train.sisa else ()
    outcome = call(module, *flags, *data, "--out", tmp_path / "out")
    lines = outcome.said.splitlines()
    assert outcome.code == 2 and lines[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists() and "Traceback" not in outcome.said


def close(one, other, path=""):
    """Require two results to say the same, up to rounding and time."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if not any(word in key for word in TIMES):
                close(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for n, pair in enumerate(zip(one, other, strict=True)):
            close(*pair, f"{path}/{n}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4), path
    else:
        assert one == other, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, flags",
    [(train.lm, ("--preset", "smoke")), (train.lm, ("--preset", "smoke", "--dp.noise", 1)),
     (train.unlearn, ("--preset", "smoke", "--methods", "ascent_kl_indist", "pdu"))],
    ids=["lm", "private", "unlearn"],
)  # fmt: skip
def test_results_are_those_of_one_device(module, flags, tmp_path):
    done(module, *flags, "--out", tmp_path / "one")
    done(module, *flags, "--mesh", "data=2,fsdp=2,tensor=2", "--out", tmp_path / "eight")
    one, eight = (running.results(tmp_path / name)["results"] for name in ("one", "eight"))
    close(one, eight)
    assert one
