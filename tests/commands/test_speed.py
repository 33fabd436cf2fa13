"""benchmarks.speed: rows that are there, numbers that fit together, FLOPs by hand, peers that fail, what is refused."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import running
from shards import call

import benchmarks.speed as speed
from benchmarks import timing
from benchmarks.speed import config, models, peak, start, study, ways
from jaxforget import command
from jaxforget.errors import RunError
from jaxforget.training import cost

D, V, T, B, MEMBERS = 16, 64, 16, 4, 3  # width, vocabulary, tokens, rows and members of the smoke preset
FORWARD = 2 * (3 * D * D + D * D + 2 * 4 * D * D) + 2 * V * D + 4 * D * (T + 1) / 2  # of GPT-2, a token: one block
NAMES = {
    "families": ("gpt2", "bert", "t5"),
    "methods": ("plain", "ascent with KL to the reference", "private", "private without noise"),
    "members": ("one run after another", "one program, map", "one program, vmap"),
    "inference": ("generation", "scoring"),
}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """One run of the smoke preset, but for its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        out = tmp_path_factory.mktemp("speed") / "out"
        command.main(speed.run, speed.PRESETS, ["--preset", "smoke", "--parts", *NAMES, "--out", str(out)])
    assert "Targets" in (out / "report.html").read_text()
    return running.results(out)


@pytest.fixture
def rows(document):
    return {row["name"]: row for row in document["results"]}


@pytest.mark.slow
def test_every_part_has_its_rows(document):
    for part, names in NAMES.items():
        assert tuple(row["name"] for row in document["results"] if row["part"] == part) == names
    assert [part["name"] for part in document["parts"]] == list(NAMES)
    assert document["versions"]["jax"] == jax.__version__ and len(document["date"]) == 10
    assert "cores" in document["hardware"] and document["dtype"] == "float32"


@pytest.mark.slow
def test_rates_and_ratios_are_those_of_the_seconds(document, rows):
    top = document["peak"]
    assert top["flops"] == top["measured_flops"] > 0 and "64 x 64" in top["source"]
    for row in rows.values():
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens"])
        if row["flops"]:
            assert row["tflops"] * 1e12 * row["seconds"] == pytest.approx(row["flops"])
            assert row["share_of_peak"] * top["flops"] == pytest.approx(row["tflops"] * 1e12)
        if row["against"]:  # of the one turn
            assert row["times"] == pytest.approx(row["seconds"] / rows[row["against"]]["seconds"])
        if "memory_mb" in row:
            assert 0 < row["memory_mb"] < row["peak_mb"]
    assert [name for name, row in rows.items() if row.get("flops") is None] == ["generation"]


@pytest.mark.slow
def test_tokens_and_flops_by_hand(rows):
    step = B * T * FORWARD
    assert rows["gpt2"]["flops"] == rows["plain"]["flops"] == pytest.approx(3 * step)
    assert rows["ascent with KL to the reference"]["flops"] == pytest.approx(3 * step + step / 2)  # of retained rows
    assert rows["scoring"]["flops"] == pytest.approx(step)
    assert rows["one program, vmap"]["flops"] == rows["one run after another"]["flops"] == pytest.approx(
        3 * MEMBERS * step
    )
    assert {rows[name]["tokens"] for name in ("gpt2", "bert", "plain", "private", "scoring")} == {B * T}
    assert rows["t5"]["tokens"] == 2 * B * T  # a source and a target
    assert rows["one program, map"]["tokens"] == MEMBERS * B * T
    assert rows["generation"]["tokens"] == 2 * T // 2


@pytest.mark.slow
def test_flops_are_those_of_the_cost_model(rows):
    smoke = config.smoke()
    for name, family, method in (("gpt2", "gpt2", "plain"), ("bert", "bert", "plain"), ("t5", "t5", "plain"),
                                 ("private", "gpt2", "dp_bookkeep")):  # fmt: skip
        model, _ = models.model_of(smoke, family, smoke.size)
        work = cost.Work(model=model, method=method, rows=B, length=T)
        assert rows[name]["flops"] == cost.cost(work).flops
        if method == "plain":
            assert rows[name]["flops"] == pytest.approx(3 * B * T * model.flops_per_token(T))


@pytest.mark.slow
def test_ways_that_are_compared_train_alike(rows):
    """The first loss of all is that of the same weights on the same rows, near that of chance."""
    assert rows["gpt2"]["loss"] == pytest.approx(math.log(V), rel=0.05)
    assert rows["plain"]["loss"] == rows["gpt2"]["loss"]
    for name in ("private", "private without noise"):
        assert rows[name]["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-5)
    alone = rows["one run after another"]["loss"]
    assert rows["one program, map"]["loss"] == pytest.approx(alone, rel=1e-6)
    assert rows["one program, vmap"]["loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first():
    cold, warm = start.rows(config.smoke())
    assert (cold["name"], warm["name"]) == start.NAMES
    assert cold["compile_seconds"] > warm["compile_seconds"] > 0
    assert warm["times"] == pytest.approx(warm["seconds"] / cold["seconds"])


def test_a_process_that_fails_is_a_note(monkeypatch):
    monkeypatch.setattr(start.sys, "executable", "false")
    assert start.rows(config.smoke()) == [
        {"name": name, "note": "a process ended with 1: no word"} for name in start.NAMES
    ]


@pytest.mark.slow
def test_targets_are_judged_where_the_machine_can_tell(document, rows):
    eager, private, members, share = document["targets"]
    assert private["found"] == rows["private"]["times"] and private["met"] == (private["found"] <= 1.15)
    assert [eager["met"], members["met"], share["met"]] == [None] * 3  # no peers, no accelerator
    found = [{"name": "one program, map", "times": 0.5}, {"name": "one program, vmap", "times": 0.2}]
    assert study.targets(found, "gpu", config.smoke())[2] | {"name": ""} == {
        "name": "", "at_least": 4, "at_most": math.inf, "found": 5.0, "met": True
    }  # fmt: skip


def test_a_stated_peak_is_for_its_device_and_precision(monkeypatch):
    monkeypatch.setattr(peak.jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")])
    assert peak.peak(config.smoke(), "bfloat16")["flops"] == 790e12
    found = peak.peak(config.smoke(), "float32")
    assert found["flops"] == found["measured_flops"] < 1e13


def test_peers_that_fail_are_left_out_and_others_must_compute_the_same():
    def turn(loss):
        return lambda: np.full(2, loss)

    def broken():
        raise MemoryError("out of memory\nand more")

    mine = ways.Way(turn(2.0), 2, 10)
    found = study.measure(config.smoke(), {
        "ours": mine, "same": mine._replace(turn=turn(2.0001), against="ours", peer=True),
        "broken": mine._replace(turn=broken, against="ours", peer=True),
    }, 1.0, "float32")  # fmt: skip
    assert [row["name"] for row in found] == ["ours", "same", "broken"]
    assert found[1]["times"] > 0 and found[2] == {"name": "broken", "note": "failed: MemoryError: out of memory"}
    with pytest.raises(RunError, match="other: the first loss is 2.1 there and 2 here"):
        other = mine._replace(turn=turn(2.1), against="ours", peer=True)
        study.measure(config.smoke(), {"ours": mine, "other": other}, 1.0, "bfloat16")


def test_turns_alternate_after_one_that_warms_up(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def way(name, *takes):
        left = list(takes)

        def one():
            calls.append(name)
            clock[0] += left.pop(0)
            return len(calls)

        return one

    seconds, first = timing.turns({"a": way("a", 100, 1, 2, 9), "b": way("b", 100, 2, 8, 9)}, 3)
    assert seconds == {"a": [1, 2, 9], "b": [2, 8, 9]} and first == {"a": 1, "b": 2}
    assert "".join(calls) == "abababab"
    found = timing.spread("times", timing.ratios(seconds["b"], seconds["a"]))
    assert found == {"times": 2, "times_low": 1, "times_high": 4}
    assert set(timing.spread("times", []).values()) == {None}


def test_the_large_preset_is_gpt2_small():
    large = config.h200()
    config.check(large)
    model, task = models.model_of(large, "gpt2", large.size)
    assert cost.parameters(model) == 124_439_808 and task == "causal" and model.dtype == "bfloat16"


@pytest.mark.parametrize("flags, said", [
    (("--train.batch-size", 3), "--train.batch-size is 3"),
    (("--private-microbatch", 3), "--private-microbatch 3 does not divide the batch of 4"),
    (("--size.family", "llama"), "--size.family is not for this command"),
    (("--shard.context", 2), "--shard.context is 2; it must be at least 4"),
    (("--train.warmup", 0.5), "--train.warmup 0"),
    (("--repeats", 0), "--repeats is 0"),
])  # fmt: skip
def test_settings_that_cannot_be_measured_are_refused(tmp_path, flags, said):
    outcome = call(speed, "--preset", "smoke", *flags, "--out", tmp_path / "out")
    assert outcome.code == 2 and said in outcome.said and not (tmp_path / "out").exists()


@pytest.mark.parity
@pytest.mark.slow
def test_peers_compute_the_same(in_process):
    pytest.importorskip("torch")
    out = in_process(speed, "out", "--preset", "smoke", "--peers", "--parts", "families", "methods").out
    rows = {row["name"]: row for row in running.results(out)["results"]}
    assert rows["torch eager"]["loss"] == pytest.approx(rows["gpt2"]["loss"], rel=1e-4)
    assert rows["torch eager"]["flops"] == rows["gpt2"]["flops"] and rows["torch eager"]["times"] > 0
