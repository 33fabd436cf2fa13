"""Exactness: after a deletion every stage has the bits that training without those records gives it.

The comparison is a plain loop that trains one member at a time and knows nothing of ensembles, and besides a fresh
ensemble with the same places. Stages are named (shard, slice).
"""

import dataclasses
import hashlib
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from ensembles import (
    TOYS,
    alone,
    base,
    bits,
    create,
    delete,
    files,
    grid,
    make,
    opened,
    recipe_of,
    record,
    stored,
    tokens,
)

from jaxforget.data.sources import Record, content_id
from jaxforget.data.text import TextConfig
from jaxforget.errors import UserError
from jaxforget.sisa.deletion import ask, serve, verify
from jaxforget.sisa.ensemble import Ensemble, base_digest
from jaxforget.sisa.ledger import id_hash, normalised
from jaxforget.sisa.plan import uniform
from jaxforget.sisa.recipe import Recipe, stage_keys
from jaxforget.training.ensemble import members
from jaxforget.training.lora import LoraConfig
from jaxforget.training.optimizer import TrainConfig
from jaxforget.training.start import ComputeConfig
from jaxforget.training.step import make_run

SIZES = [[2, 2, 3], [3, 1, 2], [1, 2, 2]]  # records by shard and slice; the remainder of shard 0 is in its last slice
PLACES = grid(SIZES)
HOW = [{"members": "map"}, {"members": "vmap", "width": 2}]  # under vmap shard 2 has a program to itself


def without(places, gone):
    return [place for place in places if place[0].id not in gone]


def in_slice(shard, cut):
    return tuple(one.id for one, *place in PLACES if place == [shard, cut])


def in_shard(shard):
    return tuple(one.id for one, where, _ in PLACES if where == shard)


def assert_exact(ensemble: Ensemble, places, scratch_directory, *, solo=True) -> list[list]:
    """Compare every stage with training from scratch on the records in these places.

    solo: under map, also with programs of one member. They round as map does for what is compared so.
    """
    recipe = ensemble.recipe
    got = [[bits(stage) for stage in row] for row in stored(ensemble)]

    def same(expected):
        return got == [[bits(stage) for stage in row] for row in expected]

    assert same([alone(ensemble, places, shard) for shard in range(recipe.shards)])
    if recipe.members == "vmap" or not solo:
        real = ensemble.model not in TOYS.values()
        with create(scratch_directory, places, recipe, ensemble.directory / "base", real=real) as fresh:
            fresh.train()
            assert same(stored(fresh))
    else:
        assert same([alone(ensemble, places, shard, solo=True) for shard in range(recipe.shards)])
    checks = verify(ensemble)
    assert {(check.shard, check.stage) for check in checks} == {
        (shard, stage) for shard, row in enumerate(got) for stage, one in enumerate(row) if one is not None
    }
    assert all(check.same for check in checks)
    return got


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Ensembles of toys that are trained once; gives a copy, with the bits of its stages."""
    root, done = tmp_path_factory.mktemp("trained"), {}

    def copy(directory, how):
        name = how["members"]
        if name not in done:
            with make(root / name, PLACES, **how) as ensemble:
                ensemble.train()
                done[name] = [[bits(stage) for stage in row] for row in stored(ensemble)]
        shutil.copytree(root / name, directory)
        ensemble = opened(directory)
        ensemble.bits = done[name]
        return ensemble

    return copy


# Batches of requests, each of ids; then the stages that change and those that vanish.
CASES = {
    "first slice": ([[["record-s1r0n1"]]], {(1, 0), (1, 1), (1, 2)}, set()),
    "middle slice": ([[["record-s0r1n0"]]], {(0, 1), (0, 2)}, set()),
    "last slice": ([[["record-s2r2n0"]]], {(2, 2)}, set()),
    "remainder of the last slice": ([[["record-s0r2n2"]]], {(0, 2)}, set()),
    "two of one slice": ([[["record-s0r1n0", "record-s0r1n1"]]], {(0, 1), (0, 2)}, set()),
    "two slices of a shard, in two requests": (
        [[["record-s1r2n0"], ["record-s1r1n0"]]], {(1, 1), (1, 2)}, set()),
    "two shards": ([[["record-s0r2n0", "record-s2r1n0"]]], {(0, 2), (2, 1), (2, 2)}, set()),
    "twice in a row, earlier": ([[["record-s0r2n0"]], [["record-s0r0n0"]]], {(0, 0), (0, 1), (0, 2)}, set()),
    "twice in a row, later": ([[["record-s0r0n0"]], [["record-s0r2n0"]]], {(0, 0), (0, 1), (0, 2)}, set()),
    "an id twice in a request": ([[["record-s2r2n0", "record-s2r2n0"]]], {(2, 2)}, set()),
    "an id in two requests": ([[["record-s2r2n0"], ["record-s2r1n1", "record-s2r2n0"]]], {(2, 1), (2, 2)}, set()),
    "an id again later": ([[["record-s2r2n0"]], [["record-s2r1n0", "record-s2r2n0"]]], {(2, 1), (2, 2)}, set()),
    "a middle slice": ([[in_slice(0, 1)]], {(0, 1), (0, 2)}, set()),
    "a first slice": ([[in_slice(2, 0)]], {(2, 0), (2, 1), (2, 2)}, {(2, 0)}),
    "a last slice": ([[in_slice(1, 2)]], {(1, 2)}, set()),
    "a shard": ([[in_shard(1)]], {(1, 0), (1, 1), (1, 2)}, {(1, 0), (1, 1), (1, 2)}),
    "a shard in two steps": (
        [[in_shard(0)[:4]], [in_shard(0)[4:]]], {(0, 0), (0, 1), (0, 2)}, {(0, 0), (0, 1), (0, 2)}),
    "all but one": (
        [[tuple(one.id for one, *_ in PLACES if one.id != "record-s1r1n0")]],
        {(k, r) for k in range(3) for r in range(3)}, {(k, r) for k in range(3) for r in range(3)} - {(1, 1), (1, 2)}),
}  # fmt: skip
VMAPPED = ("first slice", "twice in a row, later", "a shard", "all but one")


@pytest.mark.parametrize(
    "name, how",
    [(name, HOW[0]) for name in CASES]
    + [pytest.param(name, HOW[1], marks=[] if name in VMAPPED else pytest.mark.slow) for name in CASES],
    ids=lambda x: x if isinstance(x, str) else x["members"],
)
def test_deletion_equals_training_without(name, how, trained, tmp_path):
    batches, changed, vanished = CASES[name]
    gone = {identity for requests in batches for ids in requests for identity in ids}
    with trained(tmp_path / "ensemble", how) as ensemble:
        keys_before, kept_before = ensemble.needed(), files(tmp_path / "ensemble" / "stages")
        for requests in batches:
            receipts = delete(ensemble, *requests)
        assert {identity for row in ensemble.ledger.ids(3, 3) for cut in row for identity in cut} == {
            one.id for one, *_ in without(PLACES, gone)
        }
        after = assert_exact(ensemble, without(PLACES, gone), tmp_path / "fresh")

        every = {(shard, stage) for shard in range(3) for stage in range(3)}
        keys = ensemble.needed()
        assert {(k, r) for k, r in every if keys[k][r] != keys_before[k][r]} == changed
        assert {(k, r) for k, r in every if keys[k][r] is None} == vanished
        # Training without a record gives other bits, so the comparison above can tell.
        assert {(k, r) for k, r in every if after[k][r] != ensemble.bits[k][r]} == changed
        assert {(change["shard"], change["slice"]) for receipt in receipts for change in receipt["stages"]} <= changed

        # What did not change was not written again, and what is not needed is gone.
        kept = files(tmp_path / "ensemble" / "stages")
        unchanged = {keys[k][r][:32] for k, r in every - changed}
        assert all(kept[path] == about for path, about in kept_before.items() if path.split("/")[0] in unchanged)
        assert {path.split("/")[0] for path in kept} == {key[:32] for row in keys for key in row if key}
        assert set(ensemble.ledger.stages()) == {key for row in keys for key in row if key}
        assert not (tmp_path / "ensemble" / "working").exists()

        # An emptied shard drops out of the vote.
        sizes = {k: sum(where == k for _, where, _ in without(PLACES, gone)) for k in range(3)}
        voting = {k: size for k, size in sizes.items() if size}
        assert ensemble.final_keys() == {k: keys[k][2] for k in voting}
        np.testing.assert_array_equal(ensemble.weights(), np.ones(len(voting)))
        np.testing.assert_allclose(
            ensemble.weights("size"), np.array([*voting.values()]) / sum(sizes.values()), rtol=1e-6
        )


def test_an_id_twice_is_one_deletion_and_the_first_request_did_it(trained, tmp_path):
    with trained(tmp_path / "ensemble", HOW[0]) as ensemble:
        # Two processes may accept an id at the same time; both requests are served, together or not.
        ensemble.ledger.receive(["record-s2r2n0"])
        ensemble.ledger.receive(["record-s2r2n0", "record-s2r1n0"])
        receipts = serve(ensemble, export=False)
        assert [len(receipt["ids_sha256"]) for receipt in receipts] == [1, 2]
        deleted = {"record-s2r2n0": 1, "record-s2r1n0": 2}
        assert ensemble.ledger.deleted_by(deleted) == deleted
        before = files(tmp_path / "ensemble" / "stages")
        ensemble.ledger.receive(["record-s2r2n0"])
        (receipt,) = serve(ensemble, export=False)
        assert receipt["stages"] == [] and receipt["examples_revisited"] == 0
        assert ensemble.ledger.deleted_by(deleted) == deleted
        assert files(tmp_path / "ensemble" / "stages") == before


@pytest.mark.parametrize("how", HOW, ids=lambda how: how["members"])
def test_an_emptied_slice_still_trains_its_stage(how, trained, tmp_path):
    with trained(tmp_path / "ensemble", how) as ensemble:
        (receipt,) = delete(ensemble, in_slice(0, 1))
        first, second, third = ensemble.needed()[0]
        assert len({first, second, third}) == 3
        assert bits(stored(ensemble)[0][0]) != bits(stored(ensemble)[0][1])
        stage = ensemble.ledger.stages()[second]
        # Two records, in one batch, visited as often as in the first stage: 2 epochs / (3 slices + 1), of 3 epochs.
        assert (stage["steps"], stage["visits"]) == (2, 4)
        assert receipt["stages_retrained"] == 2 and receipt["examples_revisited"] == 2 * 2 + 5 * 1


def test_one_program_trains_every_stage_and_serves_every_deletion(tmp_path):
    with make(tmp_path / "ensemble", PLACES, train={"b1": 0.85}) as ensemble:
        run = make_run(members(ensemble.step, "map"))
        ensemble.train()
        delete(ensemble, ["record-s0r1n0"])
        delete(ensemble, in_shard(1))
        verify(ensemble)
        assert run._cache_size() == 1  # shapes, and where arrays come from, are the same for all of them


# ---------------------------------------------------------------------------------------------- random cases

# A program of its own each; what is drawn besides needs no other.
PROGRAMS = [
    dict(task="causal", members="map", width=2, train=dict(batch_size=4, microbatch=2, weight_decay=0.1)),
    dict(task="causal", members="vmap", width=2, weighting="token",
         train=dict(batch_size=3, microbatch=0, schedule="linear", warmup=0.3, max_grad_norm=0.0)),
    dict(task="classification", members="map", width=1,
         train=dict(batch_size=2, microbatch=1, schedule="constant", max_grad_norm=0.1)),
    dict(task="classification", members="vmap", width=3, train=dict(batch_size=5, microbatch=0, weight_decay=0.5)),
]  # fmt: skip


def any_program(rng) -> dict:
    """Draw what needs a program of its own."""
    batch = int(rng.integers(1, 7))
    task = str(rng.choice(["causal", "classification"]))
    train = dict(
        batch_size=batch, microbatch=int(rng.choice([0, *(m for m in range(1, batch + 1) if batch % m == 0)])),
        weight_decay=float(rng.choice([0.0, 0.1, 1.0])), schedule=str(rng.choice(["cosine", "linear", "constant"])),
        warmup=float(rng.choice([0.0, 0.03, 0.5])), max_grad_norm=float(rng.choice([0.0, 0.05, 1.0])),
        b1=float(rng.choice([0.9, 0.5])), epsilon=float(rng.choice([1e-8, 1e-3])),
    )  # fmt: skip
    part = {"causal": "mix/.*", "classification": "score/.*"}[task]
    return dict(
        task=task, members=str(rng.choice(["map", "vmap"])), width=int(rng.integers(1, 5)), train=train,
        weighting="sequence" if task == "classification" else str(rng.choice(["sequence", "token"])),
        trainable=(part,) if rng.random() < 0.2 else (),
    )  # fmt: skip


def check_random_case(rng, program, tmp_path, name, *, solo=True):
    task, width = program["task"], program["width"]
    shards, slices = int(rng.integers(width, 5)), int(rng.integers(1, 5))
    if rng.random() < 0.5:
        places = grid(rng.integers(1, 4, (shards, slices)).tolist(), task)
    else:  # as the command deals
        ids = [f"record-{n}" for n in range(int(rng.integers(shards * slices, 3 * shards * slices)))]
        dealt = uniform(ids, shards, slices, int(rng.integers(100)))
        places = [(record(one, task, 1 + n % 6), int(k), int(r)) for n, (one, k, r) in enumerate(zip(ids, *dealt))]
    train = program["train"] | dict(
        epochs=int(rng.integers(slices // 2 + 1, slices // 2 + 4)), learning_rate=float(10 ** rng.uniform(-3, -1))
    )
    text = TextConfig(text_mode="split", max_length=8) if task == "causal" and rng.random() < 0.3 else None
    settings = program | dict(train=train, text=text, seed=int(rng.integers(1000)), slices=slices, shards=shards)
    alive = places
    with make(tmp_path / name, places, **settings) as ensemble:
        ensemble.train()
        for _ in range(int(rng.integers(1, 4))):
            trainable = [p for p in alive if tokens(ensemble.recipe, ensemble.tokenizer, [p[0]])]
            stays = trainable[int(rng.integers(len(trainable)))][0].id  # something must
            kind = rng.random()
            shard, cut = int(rng.integers(shards)), int(rng.integers(slices))
            chosen = [
                one.id for one, k, r in alive if one.id != stays and (
                    k == shard if kind < 0.15 else (k, r) == (shard, cut) if kind < 0.3 else rng.random() < 0.2)
            ]  # fmt: skip
            requests = np.array_split(rng.permutation(chosen), int(rng.integers(1, 4))) if chosen else []
            for ids in requests:
                ensemble.ledger.receive(ask(ensemble, map(str, ids)).new)
            serve(ensemble, export=False)
            alive = without(alive, chosen)
        assert_exact(ensemble, alive, tmp_path / f"{name}-fresh", solo=solo)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p['task']}-{p['members']}-{p['width']}")
def test_random_ensembles_and_deletions(program, seed, tmp_path):
    check_random_case(np.random.default_rng([seed, PROGRAMS.index(program)]), program, tmp_path, "ensemble")


@pytest.mark.slow
def test_random_ensembles_and_deletions_of_any_kind(tmp_path):
    for seed in range(60):
        rng = np.random.default_rng([seed, 99])
        program = any_program(rng)
        print(seed, program)  # shown when one fails
        check_random_case(rng, program, tmp_path, f"ensemble-{seed}", solo=False)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW, ids=lambda how: how["members"])
@pytest.mark.parametrize("start, task, lora", [
    ("llama", "causal", LoraConfig(rank=0)), ("llama", "causal", LoraConfig(rank=2)),
    ("distilbert", "classification", LoraConfig(rank=2, targets=("q|v",), also=("score",))),
])  # fmt: skip
def test_real_models(start, task, lora, how, tmp_path):
    places = grid(SIZES, task)
    with make(tmp_path / "ensemble", places, start=start, task=task, lora=lora, **how) as ensemble:
        ensemble.train()
        gone = {"record-s0r1n1", "record-s1r0n0", "record-s1r2n1", *in_slice(2, 0)}
        delete(ensemble, *([identity] for identity in gone))
        assert_exact(ensemble, without(places, gone), tmp_path / "fresh")


# ------------------------------------------------------------------------------------ what is left of a record

FORGOTTEN = ("record-s0r0n0", "record-s2r1n1")


def traces(one: Record) -> dict[str, bytes]:
    """Return what would tell of a record: its id, half of its text, and digests of the text."""
    half = one.text[: len(one.text) // 2]
    assert len(half) >= 8  # too long to occur by chance
    found = {"id": one.id, "text": half, "content": content_id(None, one.text), "normalised": normalised(one)}
    return {name: value.encode() for name, value in found.items()}


def test_no_file_holds_a_deleted_record(tmp_path):
    """Also a real model against the plain loop, and the export of members."""
    directory = tmp_path / "ensemble"
    places = [(record(one.id, "causal", 5), *place) for one, *place in PLACES]
    for n in range(400):  # so many that the ledger's pages split and merge
        places.append((record(f"record-more{n:03}", "causal", 5), n % 3, n % 2))
    gone = {*FORGOTTEN, *(f"record-more{n:03}" for n in range(400) if n % 7 or n < 200)}
    marked = {one.id: traces(one) for one, *_ in places if one.id in gone}

    def holds():
        content = [(path, about[2]) for path, about in files(directory).items()]
        return {
            (path, identity, name) for path, blob in content
            for identity, each in marked.items() for name, needle in each.items() if needle in blob
        }  # fmt: skip

    train = dict(epochs=2, batch_size=8, microbatch=4)
    with make(directory, places, start="llama", slices=3, train=train) as ensemble:
        serve(ensemble, export=True)
        assert {(identity, name) for _, identity, name in holds()} == {
            (identity, name) for identity, each in marked.items() for name in each
        }
        assert {path for path, *_ in holds()} == {"ledger.sqlite"}
        exported = files(directory / "members")
        for ids in (sorted(gone)[:150], sorted(gone)[150:]):
            ensemble.ledger.receive(ask(ensemble, ids).new)
            serve(ensemble, export=True)
        assert holds() == set()
        # What is kept of an id is its digest: it answers whether a record was deleted.
        ledger = (directory / "ledger.sqlite").read_bytes()
        assert all(id_hash(identity).encode() in ledger for identity in gone)
        assert record("record-s1r1n0", "causal", 5).text.encode() in ledger
        assert sorted(path.name for path in directory.iterdir()) == [
            "base", "config.json", "ledger.sqlite", "members", "stages"
        ]  # fmt: skip

        assert_exact(ensemble, without(places, gone), tmp_path / "fresh")
        now = files(directory / "members")
        assert set(now) == set(exported)
        final = ensemble.final_keys()
        for shard in range(3):
            weights = f"shard-{shard}/model.safetensors"
            assert now[weights] != exported[weights]
            assert final[shard].encode() in now[f"shard-{shard}/stage.json"][2]


def test_a_retrained_member_is_exported_and_an_emptied_one_removed(tmp_path):
    directory = tmp_path / "ensemble"
    with make(directory, PLACES, start="llama", train=dict(epochs=2, batch_size=8, microbatch=4)) as ensemble:
        serve(ensemble, export=True)
        before = files(directory / "members")
        stray = [directory / "members" / ".DS_Store", directory / "stages" / ".DS_Store"]
        for path in stray:  # a file browser was here
            path.write_text("x")
        ensemble.ledger.receive([*in_shard(2), "record-s0r2n0"])
        serve(ensemble, export=True)
        after = files(directory / "members")
        assert {path.split("/")[0] for path in after} == {"shard-0", "shard-1"}
        assert not any(path.exists() for path in stray)
        for path, about in before.items():
            if path.startswith("shard-1/"):
                assert after[path] == about
        assert after["shard-0/model.safetensors"] != before["shard-0/model.safetensors"]


# ---------------------------------------------------------------------------------------------- keys

RECIPE, _ = recipe_of(PLACES)
OTHERWISE = {
    "task": "classification", "labels": ("no", "yes"), "shards": 4, "slices": 4, "seed": 1,
    "widths": {"tokens": 32, "labels": 32}, "weighting": "token", "members": "vmap", "width": 2,
    "trainable": ("mix/.*",), "lora": LoraConfig(rank=1), "compute": ComputeConfig(dtype="bfloat16"),
    "text": TextConfig(max_length=8), "start": "0" * 64,
}  # fmt: skip
TRAIN_OTHERWISE = {
    "learning_rate": 0.021, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.1, "b1": 0.8, "b2": 0.99,
    "epsilon": 1e-7, "max_grad_norm": 0.5, "epochs": 4, "batch_size": 8, "microbatch": 1,
}  # fmt: skip
IDS = [[one.id for one, *place in PLACES if place == [0, cut]] for cut in range(3)]


def fields(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_every_setting_changes_every_key():
    # Whoever adds a setting must say here how it differs.
    assert fields(Recipe) == {*OTHERWISE, "train"} and fields(TrainConfig) == set(TRAIN_OTHERWISE)
    changed = [dataclasses.replace(RECIPE, **{name: value}) for name, value in OTHERWISE.items()]
    changed += [
        dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, **{name: value}))
        for name, value in TRAIN_OTHERWISE.items()
    ]
    keys = [key for recipe in (RECIPE, *changed) for shard in range(3) for key in stage_keys(recipe, shard, IDS)]
    assert len(set(keys)) == len(keys) == (1 + len(OTHERWISE) + len(TRAIN_OTHERWISE)) * 3 * 3


def test_a_key_is_what_it_says():
    seen = sorted(IDS[0] + IDS[1])
    body = hashlib.sha256("\n".join(f"{len(one)}:{one}" for one in seen).encode()).hexdigest()
    expected = hashlib.sha256(f"{RECIPE.digest} 2 1 {body}".encode()).hexdigest()
    assert stage_keys(RECIPE, 2, IDS)[1] == expected


def test_ids_enter_as_a_set_and_cannot_be_confused():
    keys = stage_keys(RECIPE, 0, IDS)
    assert stage_keys(RECIPE, 0, [cut[::-1] for cut in IDS]) == keys
    moved = stage_keys(RECIPE, 0, [IDS[1], IDS[0], IDS[2]])
    assert moved[0] != keys[0] and moved[1:] == keys[1:]
    assert stage_keys(RECIPE, 0, [["a\n1:b"]]) != stage_keys(RECIPE, 0, [["a", "b"]])
    assert stage_keys(RECIPE, 0, [["ab", "c"]]) != stage_keys(RECIPE, 0, [["a", "bc"]])
    assert stage_keys(RECIPE, 0, [[], ["a"], []])[0] is None
    assert None not in stage_keys(RECIPE, 0, [[], ["a"], []])[1:]


def test_the_base_model_is_in_the_key():
    digests = {base_digest(base("llama", "causal", seed)) for seed in (0, 1)}
    assert len(digests) == 2 and base_digest(base("llama", "causal")) == RECIPE.start
    assert base_digest(base("distilbert", "classification")) not in digests


@pytest.mark.parametrize("text", [TextConfig(), TextConfig(text_mode="split", max_length=6)], ids=["whole", "split"])
def test_a_key_hashes_exactly_the_records_that_training_reads(text, tmp_path):
    """Some records are too short to have a token to score, some are split into many examples."""
    short = [(Record(f"short-{n}", "" if n % 2 else "a"), n % 3, n % 3) for n in range(5)]
    places = sorted([*PLACES, *short, (record("long", "causal", 6), 1, 1)], key=lambda place: place[0].text)
    with make(tmp_path / "ensemble", places, text=text) as ensemble:
        keys, everyone = ensemble.needed(), [one.id for one, *_ in places]
        other = {identity: ensemble.needed([identity]) for identity in everyone}
        read = {}
        for shard in range(3):
            for stage in range(3):
                examples = ensemble._batches(shard, stage, {}, set()).streams[0].examples
                read[shard, stage] = {identity.split("#")[0] for identity in examples.ids}
                hashed = {identity for identity in everyone if other[identity][shard][stage] != keys[shard][stage]}
                assert hashed == read[shard, stage]
        assert set().union(*read.values()) < set(everyone)  # the short ones are not there
        assert {one.id for one, k, r in PLACES if (k, r) == (1, 1)} | {"long"} <= read[1, 1]


def test_a_record_without_examples_leaves_without_retraining(tmp_path):
    places = [*PLACES, (Record("empty", ""), 0, 0), (Record("alone", ""), 3, 0)]
    with make(tmp_path / "ensemble", places) as ensemble:
        ensemble.train()
        assert set(ensemble.final_keys()) == {0, 1, 2}  # shard 3 has nothing to learn from
        before = files(tmp_path / "ensemble" / "stages")
        (receipt,) = delete(ensemble, ["empty", "alone"])
        assert receipt["stages"] == [] and receipt["examples_revisited"] == 0
        assert files(tmp_path / "ensemble" / "stages") == before
        assert ensemble.ledger.where(["empty"]) == {} and ensemble.ledger.deleted_by(["empty"]) == {"empty": 1}
        assert_exact(ensemble, PLACES, tmp_path / "fresh")


def test_nothing_may_be_left(trained, tmp_path):
    with trained(tmp_path / "ensemble", HOW[0]) as ensemble:
        with pytest.raises(UserError, match="no record"):
            ask(ensemble, [one.id for one, *_ in PLACES])
        ensemble.ledger.receive(ask(ensemble, [one.id for one, *_ in PLACES[1:]]).new)
        with pytest.raises(UserError, match="no record"):  # together with the request that waits
            ask(ensemble, [PLACES[0][0].id])


# -------------------------------------------------------------------------------- the comparison can tell


def test_the_reference_depends_on_each_of_its_records(trained, tmp_path):
    """The plain loop gives other bits where a record is missing, moved to another slice, or another seed is used."""
    with trained(tmp_path / "ensemble", HOW[0]) as ensemble:
        true = [bits(stage) for stage in alone(ensemble, PLACES, 0)]
        assert true == [bits(stage) for stage in alone(ensemble, PLACES[::-1], 0)]
        fewer = [bits(stage) for stage in alone(ensemble, without(PLACES, {"record-s0r1n0"}), 0)]
        assert [a == b for a, b in zip(true, fewer)] == [True, False, False]
        moved = [(one, k, 2 if one.id == "record-s0r1n0" else r) for one, k, r in PLACES]
        assert [a == bits(b) for a, b in zip(true, alone(ensemble, moved, 0))] == [True, False, False]
        ensemble.recipe = dataclasses.replace(ensemble.recipe, seed=1)
        assert bits(alone(ensemble, PLACES, 0)[2]) != true[2]  # the order of its two batches


def test_verify_finds_a_stage_that_was_trained_on_something_else(trained, tmp_path):
    with trained(tmp_path / "ensemble", HOW[0]) as ensemble:
        with closing(sqlite3.connect(ensemble.ledger.path)) as db, db:  # unasked: keys no longer tell the truth
            db.execute("UPDATE records SET text = 'something else' WHERE id = 'record-s1r1n0'")
        wrong = {(check.shard, check.stage) for check in verify(ensemble) if not check.same}
        assert wrong == {(1, 1), (1, 2)}
