"""The ledger: what is accepted is kept, what is deleted leaves nothing, and a damaged or foreign file is told."""

import json
import random
import re
import shutil
import sqlite3
import string
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ensembles import grid, make, opened

from jaxforget.data.sources import Record, content_id
from jaxforget.errors import RunError, UserError
from jaxforget.sisa.deletion import Asked, ask
from jaxforget.sisa.ledger import (
    COMMITTED,
    NAME,
    PLANNED,
    RECEIVED,
    RETRAINED,
    Ledger,
    Row,
    Twin,
    id_hash,
    normalised,
)

SHARDS, SLICES = 3, 2
TEXTS = {f"id-{n}": f"what number {n} says" for n in range(12)}


def write(directory, texts=TEXTS) -> Ledger:
    """Write a ledger of plain texts, dealt in turn, and open it."""
    records = [Record(name, text) for name, text in texts.items()]
    rows = [Row(record, n % SHARDS, n // SHARDS % SLICES, 1) for n, record in enumerate(records)]
    Ledger.create(directory, {"recipe": "the recipe"}, rows)
    return Ledger(directory)


def ensemble(ledger):
    """Stand in for the ensemble: what `ask` reads of it."""
    return SimpleNamespace(
        ledger=ledger, sizes=lambda without: ledger.counts(SHARDS, SLICES, without).sum(axis=1)
    )  # fmt: skip


def forget(ledger, ids) -> int:
    """Take a request through all its states."""
    number = ledger.receive(ids)
    ledger.advance([number], PLANNED, [{}])
    ledger.advance([number], RETRAINED, [{}], forget=True)
    ledger.compact()
    ledger.advance([number], COMMITTED, [{"committed": "now"}])
    return number


# ---------------------------------------------------------------------------------------------- records


def test_records_come_back_as_they_were_given(tmp_path):
    records = {
        "plain": Record("plain", "a text"),
        "asked": Record("asked", "an answer", "a question"),
        "empty question": Record("empty question", "an answer", ""),
        "class": Record("class", "a text", None, {"label": "0", "other": "dropped"}),
        "number": Record("number", "a text", None, {"label": 3}),
        "o'clock\n\"-- ; DROP TABLE records": Record("o'clock\n\"-- ; DROP TABLE records", "línea\n\U0001f642\0x", "?"),
    }
    Ledger.create(tmp_path, {}, [Row(one, 1, n % 2, n) for n, one in enumerate(records.values())])
    with Ledger(tmp_path) as ledger:
        for cut in range(2):
            rows = ledger.records(1, cut)
            assert [row.record.id for row in rows] == sorted([*records][cut::2])
            for shard, where, (record, k, r, count) in ((1, cut, row) for row in rows):
                given = records[record.id]
                assert (k, r, count) == (shard, where, [*records].index(record.id))
                assert (record.text, record.prompt) == (given.text, given.prompt)
                label = given.fields.get("label")
                assert record.fields == ({} if label is None else {"label": str(label)})
        assert ledger.records(0, 0) == [] and ledger.where(["no", "number"]) == {"number": (1, 0)}


def test_places_and_counts_against_plain_loops(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        Row(Record(f"id-{n}", f"text {n}"), *(int(x) for x in rng.integers((SHARDS, SLICES, 4)))) for n in range(60)
    ]
    Ledger.create(tmp_path, {}, rows)
    gone = {f"id-{n}" for n in range(0, 60, 7)}
    with Ledger(tmp_path) as ledger:
        for without in (set(), gone):
            left = [row for row in rows if row.record.id not in without]
            ids = [[sorted(row.record.id for row in left if row[1:3] == (k, r) and row.rows) for r in range(SLICES)]
                   for k in range(SHARDS)]  # fmt: skip
            count = [[sum(row.rows for row in left if row[1:3] == (k, r)) for r in range(SLICES)]
                     for k in range(SHARDS)]  # fmt: skip
            assert ledger.ids(SHARDS, SLICES, without) == ids
            assert ledger.counts(SHARDS, SLICES, without).tolist() == count
            assert [row.record.id for row in ledger.records(1, 1, without)] == sorted(
                row.record.id for row in left if row[1:3] == (1, 1)
            )


def test_a_creation_that_stops_halfway_leaves_no_ledger(tmp_path):
    def rows():
        yield Row(Record("one", "a text"), 0, 0, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ledger.create(tmp_path, {}, rows())
    with pytest.raises(UserError, match="not an ensemble"):
        Ledger(tmp_path)
    with write(tmp_path) as ledger:
        assert ledger.where(["one", "id-3"]) == {"id-3": (0, 1)}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_processes_are_told_once_however_many_ids_are_asked_for(tmp_path, monkeypatch):
    told = []

    def count(act):
        told.append(act)
        return act()

    monkeypatch.setattr("jaxforget.files.through_first", count)
    with write(tmp_path, {f"id-{n}": f"text {n % 7}" for n in range(50)}) as ledger:
        for ask_for, most in ((ledger.where, 1), (ledger.deleted_by, 1), (ledger.twins, 2)):
            told.clear()
            ask_for([f"id-{n}" for n in range(40)])
            assert len(told) == most
        for n in range(30):
            ledger.receive([f"id-{n}"])
        told.clear()
        assert len(ledger.requests()) == 30 and len(told) == 2


# ---------------------------------------------------------------------------------------------- requests


def test_a_request_goes_through_its_states(tmp_path):
    with write(tmp_path) as ledger:
        assert ledger.requests() == [] and ledger.receive(["id-1", "id-0"]) == 1 and ledger.receive(["id-5"]) == 2
        first, second = ledger.requests(RECEIVED)
        assert (first["request"], first["state"], first["ids"], first["receipt"]) == (1, RECEIVED, ["id-0", "id-1"], {})
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["received"])
        ledger.advance([1, 2], PLANNED, [{"n": 1}, {"n": 2}])
        assert ledger.requests(RECEIVED) == []
        assert [r["receipt"] for r in ledger.requests(PLANNED)] == [{"n": 1}, {"n": 2}]
        assert ledger.where(["id-0"]) and ledger.deleted_by(["id-0"]) == {}
    with Ledger(tmp_path) as ledger:  # another process goes on
        ledger.advance([1], RETRAINED, [{"n": 3}], forget=True)
        asked = ["id-0", "id-1", "id-5"]
        assert ledger.where(asked).keys() == {"id-5"} and ledger.deleted_by(asked) == {"id-0": 1, "id-1": 1}
        done, waiting = ledger.requests(RETRAINED, PLANNED)
        assert (done["ids"], done["receipt"], done["received"]) == ([], {"n": 3}, first["received"])
        assert waiting == second | {"state": PLANNED, "receipt": {"n": 2}}
        assert ledger.counts(SHARDS, SLICES).sum() == len(TEXTS) - 2
        assert ledger.receive(["id-6"]) == 3


def test_a_change_that_fails_changes_nothing(tmp_path):
    with write(tmp_path) as ledger:
        ledger.receive(["id-0"])
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(RunError, match="unchanged"):
            ledger.receive(["id-1", "id-1"])
        with pytest.raises(TypeError):  # not JSON: after the records have gone, before the end
            ledger.advance([1, 1], RETRAINED, [{}, {"wrong": object()}], forget=True)
        assert (tmp_path / NAME).read_bytes() == before
        assert ledger.receive(["id-1"]) == 2


KILLED = """
import os, sys
from jaxforget.sisa.ledger import Ledger

def write(db):
    db.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the end
    db.execute("DELETE FROM records")
    db.execute("UPDATE requests SET state = 'committed'")
    os._exit(9)

Ledger(sys.argv[1])._change(write)
"""


def test_a_kill_inside_a_change_undoes_it(tmp_path):
    with write(tmp_path, {f"id-{n}": "word " * 400 for n in range(200)}) as ledger:
        ledger.receive(["id-0"])
        requests, ids = ledger.requests(), ledger.ids(SHARDS, SLICES)
    repo = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=repo).returncode == 9
    with Ledger(tmp_path) as ledger:
        assert ledger.requests() == requests and ledger.ids(SHARDS, SLICES) == ids


def test_connections_that_write_at_the_same_time_lose_nothing(tmp_path):
    texts = {f"id-{n}": f"text {n}" for n in range(200)}
    write(tmp_path, texts).__exit__()
    start, numbers, errors = threading.Barrier(4), [[], []], []

    def receive(worker):
        with Ledger(tmp_path) as ledger:
            start.wait()
            for n in range(worker * 40, worker * 40 + 40):
                numbers[worker].append(ledger.receive([f"id-{n}"]))

    def train():
        with Ledger(tmp_path) as ledger:
            start.wait()
            for n in range(40):
                ledger.add_stages([(f"key-{n}", n, 0, "d", 1, 2)])
                if n % 10 == 9:
                    ledger.compact()

    def serve():
        with Ledger(tmp_path) as ledger:
            start.wait()
            for n in range(100, 140):
                ledger.advance([ledger.receive([f"id-{n}"])], RETRAINED, [{}], forget=True)

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=work) for work in ((receive, 0), (receive, 1), (train,), (serve,))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    with Ledger(tmp_path) as ledger:
        requests = {request["request"]: request for request in ledger.requests()}
        assert sorted(requests) == list(range(1, 121))
        for worker in range(2):
            asked = [requests[number]["ids"] for number in numbers[worker]]
            assert asked == [[f"id-{n}"] for n in range(worker * 40, worker * 40 + 40)]
        assert len(ledger.stages()) == 40
        gone = {f"id-{n}" for n in range(100, 140)}
        assert set(texts) - ledger.where(texts).keys() == gone == ledger.deleted_by(texts).keys()


def test_stages_are_kept_replaced_and_dropped(tmp_path):
    about = dict(shard=1, stage=0, digest="abc", steps=3, visits=12)
    with write(tmp_path) as ledger:
        ledger.add_stages([("one", 1, 0, "abc", 3, 12), ("two", 1, 1, "abc", 3, 12)])
        ledger.add_stages([("one", 1, 0, "def", 3, 12)])
        with pytest.raises(RunError, match="unchanged"):  # all or none
            ledger.add_stages([("three", 1, 2, "abc", 3, 12), ("four", 1, None, "abc", 3, 12)])
        assert ledger.stages() == {"one": about | {"digest": "def"}, "two": about | {"stage": 1}}
        ledger.drop_stages(["one", "absent"])
    with Ledger(tmp_path) as ledger:
        assert ledger.stages() == {"two": about | {"stage": 1}}


# ---------------------------------------------------------------------------------------------- what is asked


def test_unknown_ids_are_all_listed_and_nothing_changes(tmp_path):
    with write(tmp_path) as ledger:
        forget(ledger, ["id-0"])
        ledger.receive(["id-1"])
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(UserError) as error:
            ask(ensemble(ledger), ["id-3", "stranger", "id-0", "id-1", "id 4", "stranger", "id-99"])
        said = str(error.value)
        assert said.startswith("3 of 6 ids are not in the ensemble, so nothing was done")
        assert said.endswith(": stranger, id 4, id-99")
        assert (tmp_path / NAME).read_bytes() == before


def test_ids_are_sorted_by_what_became_of_them(tmp_path):
    with write(tmp_path) as ledger:
        first, second = forget(ledger, ["id-0", "id-7"]), ledger.receive(["id-1", "id-2"])
        asked = ask(ensemble(ledger), iter(["id-7", "id-4", "id-2", "id-3", "id-4", "id-7"]))
        assert asked == Asked(("id-4", "id-3"), {"id-7": first}, {"id-2": second}, ())
        ledger.advance([second], PLANNED, [{}])
        assert ask(ensemble(ledger), ["id-1"]).waiting == {"id-1": second}  # until it is retrained
        assert ask(ensemble(ledger), ["id-0"]) == Asked((), {"id-0": first}, {}, ())


def test_the_last_record_stays(tmp_path):
    texts = {"id-0": "a text", "id-1": "another", "id-2": "a third"}
    with write(tmp_path, texts) as ledger:
        ledger.receive(["id-0"])
        with pytest.raises(UserError, match="no record to train on"):
            ask(ensemble(ledger), ["id-1", "id-2"])
        assert ask(ensemble(ledger), ["id-1"]).new == ("id-1",)


def test_duplicates_are_found_and_asked_for_with_all_of_theirs(tmp_path):
    texts = {
        "id-0": "The cat sat.", "id-1": "the  CAT sat", "id-2": "The cat sat.", "id-3": "the cat sat!?",
        "id-4": "a dog", "id-5": "A DOG", "id-6": "other",
    }  # fmt: skip
    with write(tmp_path, texts) as ledger:
        twins = (Twin("id-1", 1, False), Twin("id-2", 2, True), Twin("id-3", 0, False))
        assert ask(ensemble(ledger), ["id-0"]) == Asked(("id-0",), {}, {}, twins)
        assert ask(ensemble(ledger), ["id-0", "id-3", "id-1"]).twins == (Twin("id-2", 2, True),)
        asked = ask(ensemble(ledger), ["id-5", "id-0"], with_duplicates=True)
        assert asked.new[:2] == ("id-5", "id-0") and asked.twins == ()
        assert sorted(asked.new) == ["id-0", "id-1", "id-2", "id-3", "id-4", "id-5"]
        # Those that wait for deletion are no duplicates that stay, and what they say is known as long as they wait.
        number = ledger.receive(["id-1", "id-3"])
        assert ask(ensemble(ledger), ["id-0"]).twins == (Twin("id-2", 2, True),)
        assert ask(ensemble(ledger), ["id-1"]) == Asked(
            (), {}, {"id-1": number}, (Twin("id-0", 0, False), Twin("id-2", 2, False))
        )
        assert sorted(ask(ensemble(ledger), ["id-1"], with_duplicates=True).new) == ["id-0", "id-2"]


def test_a_request_served_meanwhile_is_no_error(tmp_path, monkeypatch):
    """Another process may delete a record between two looks at the ledger."""
    with write(tmp_path) as ledger:
        number = ledger.receive(["id-1"])
        waiting = ledger.requests(RECEIVED)
        ledger.advance([number], RETRAINED, [{}], forget=True)
        monkeypatch.setattr(ledger, "requests", lambda *states: waiting)
        assert ask(ensemble(ledger), ["id-1", "id-2"]).new == ("id-2",)
        assert ledger.twins(["id-1"]) == []


SAME = [
    ("Hello, World!", "hello world"), ("a  b\n c", "A B C"), ("don't", "Don’t"), ("ﬁne", "fine"), ("ＡＢＣ１", "abc1"),
    ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("x²", "X2"), ("a\u00a0b", "a b"), ("a_b-c", "a b c"),
    ("e.g. this", "E G THIS"), (" !? ", "!?"), ("नमस्ते!", "नमस्ते"), ("Ⅳ", "iv"), ("…", "..."),
    ("so\u00adft", "soft"), ("\ufeffhello\u200b", "hello"),
]  # fmt: skip
DIFFERENT = [
    ("a b", "ab"), ("15", "1 5"), ("caf\u00e9", "cafe"), ("!!!", "???"), ("\U0001f642", "\U0001f641"), ("", "!"),
    ("yes", "yes 1"), ("a b", "b a"), ("naïve", "naive"), ("+", "-"), ("कि", "क"), ("一", "二"),
]  # fmt: skip


@pytest.mark.parametrize("one, other", SAME)
def test_normalisation_keeps_what_is_said(one, other, tmp_path):
    assert normalised(Record("a", one)) == normalised(Record("b", other))
    with write(tmp_path, {"a": one, "b": other, "c": "else"}) as ledger:
        assert ledger.twins(["a"]) == [Twin("b", 1, False)] and ledger.twins(["b"]) == [Twin("a", 0, False)]


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_normalisation_keeps_apart_what_differs(one, other, tmp_path):
    with write(tmp_path, {"a": one, "b": other, "c": "else"}) as ledger:
        assert ledger.twins(["a"]) == [] and ledger.twins(["b"]) == []


def test_a_question_is_part_of_what_is_said(tmp_path):
    records = [
        Record("a", "Paris", "Where?"), Record("b", "Paris", "Where?"), Record("c", "PARIS.", "where"),
        Record("d", "Paris", "Who?"), Record("e", "Where? Paris"), Record("f", "Paris"),
    ]  # fmt: skip
    Ledger.create(tmp_path, {}, [Row(record, 0, 0, 1) for record in records])
    with Ledger(tmp_path) as ledger:
        assert ledger.twins(["a"]) == [Twin("b", 0, True), Twin("c", 0, False), Twin("e", 0, False)]
        assert ledger.twins(["c", "a"]) == [Twin("b", 0, True), Twin("e", 0, False)]
        assert ledger.twins(["d"]) == [] == ledger.twins(["f"])


def test_twins_against_pairs(tmp_path):
    """Random short texts over few signs, so that many agree; ASCII, where normalisation has a one-line definition."""
    rng = random.Random(0)
    texts = {
        f"id-{n:03}": "".join(rng.choice("aAb .,!\t") for _ in range(rng.randint(0, 5))) for n in range(150)
    }  # fmt: skip

    def said(text):
        return re.findall("[a-z]+", text.lower()) or text.strip()

    with write(tmp_path, texts) as ledger:
        for _ in range(40):
            asked = rng.sample([*texts], rng.randint(1, 6))
            expected = [
                (name, any(text == texts[one] for one in asked)) for name, text in texts.items()
                if name not in asked and any(said(text) == said(texts[one]) for one in asked)
            ]  # fmt: skip
            assert [(twin.id, twin.exact) for twin in ledger.twins(asked)] == expected


# -------------------------------------------------------------------------------------- nothing is left


def word(rng, length):
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))


@pytest.mark.parametrize("seed", range(8))
def test_no_byte_of_a_deleted_record_is_left(seed, tmp_path):
    """Rows move between pages as others come and go, and SQLite's secure_delete leaves copies where they were."""
    rng = random.Random(seed)
    count = rng.choice([20, 60, 300, 1000])
    rows = [
        Row(
            Record(
                f"id-{word(rng, 12)}", word(rng, 12 + rng.choice([0, 40, 300, 5000] if count < 1000 else [0, 300])),
                word(rng, 30) if rng.random() < 0.5 else None, {"label": word(rng, 15)},
            ),
            rng.randrange(SHARDS), rng.randrange(SLICES), 1,
        )
        for _ in range(count)
    ]  # fmt: skip
    Ledger.create(tmp_path, {}, rows)

    def traces(row):
        record = row.record
        parts = (record.id, record.text[:12], record.text[-12:], (record.prompt or record.id)[:12],
                 record.fields["label"], content_id(record.prompt, record.text), normalised(record))  # fmt: skip
        return [part.encode() for part in parts]

    alive, gone = rows, []
    with Ledger(tmp_path) as ledger:
        blob = (tmp_path / NAME).read_bytes()
        assert all(trace in blob for row in rows for trace in traces(row))
        for _ in range(3):
            rng.shuffle(alive)
            cut = rng.randint(1, len(alive) // 3)
            now, alive = alive[:cut], alive[cut:]
            gone += now
            forget(ledger, [row.record.id for row in now])
            assert [path.name for path in tmp_path.iterdir()] == [NAME]
            blob = (tmp_path / NAME).read_bytes()
            assert not [trace for row in gone for trace in traces(row) if trace in blob]
            assert all(trace in blob for row in alive for trace in traces(row))
            assert all(id_hash(row.record.id).encode() in blob for row in gone)
        assert len(ledger.deleted_by(row.record.id for row in gone)) == len(gone)
        left = {name for row in ledger.ids(SHARDS, SLICES) for cut in row for name in cut}
        assert left == {row.record.id for row in alive}


def test_deleted_rows_are_overwritten_at_once(tmp_path):
    """A kill before the file is written anew finds them gone already."""
    with write(tmp_path, {"id-a": "the secret", "id-b": "public"}) as ledger:
        assert ledger._db.execute("PRAGMA secure_delete").fetchone() == (1,)
        assert b"the secret" in (tmp_path / NAME).read_bytes()
        ledger.advance([ledger.receive(["id-a"])], RETRAINED, [{}], forget=True)
        blob = (tmp_path / NAME).read_bytes()
        assert b"the secret" not in blob and b"id-a" not in blob and b"public" in blob


# -------------------------------------------------------------------------------------- files that are not right


@pytest.mark.parametrize("where", [".", "missing"])
def test_a_directory_that_is_no_ensemble(where, tmp_path):
    with pytest.raises(UserError, match="not an ensemble: it has no ledger.sqlite"):
        Ledger(tmp_path / where)


def other_database(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE things (x)")
    db.close()


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, other_database], ids=["empty", "text", "other"])
def test_a_file_that_is_no_ledger(content, tmp_path):
    path = tmp_path / NAME
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(RunError, match="ledger.sqlite cannot be read"):
        Ledger(tmp_path)


def test_a_damaged_page_is_told_whatever_is_read(tmp_path):
    """SQLite has no checksums, so damage inside a text passes; all that it notices must come as RunError."""
    origin = tmp_path / "origin"
    origin.mkdir()
    with write(origin, {f"id-{n}": f"text {n} " * 20 for n in range(120)}) as ledger:
        for n in range(3):
            ledger.receive([f"id-{n}"])
            ledger.add_stages([(f"key-{n}", n, 0, "d", 1, 1)])
        forget(ledger, ["id-9"])
    whole, size = (origin / NAME).read_bytes(), 4096
    rng, told = np.random.default_rng(0), 0
    for page in range(len(whole) // size):
        directory = tmp_path / str(page)
        directory.mkdir()
        (directory / NAME).write_bytes(whole[: page * size] + rng.bytes(size) + whole[(page + 1) * size :])
        try:
            with Ledger(directory) as ledger:
                ledger.meta("recipe"), ledger.ids(SHARDS, SLICES), ledger.counts(SHARDS, SLICES)
                for shard in range(SHARDS):
                    ledger.records(shard, 0)
                ledger.where(["id-3"]), ledger.twins(["id-3"]), ledger.requests(), ledger.stages()
                ledger.deleted_by(["id-9"])
                forget(ledger, ["id-4"])
        except RunError as error:
            assert NAME in str(error)
            told += 1
    assert told >= 0.8 * page > 5


# -------------------------------------------------------------------------- settings and the initial model


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ledger") / "ensemble"
    make(directory, grid([[1, 1], [1, 1]])).__exit__()
    return directory


@pytest.fixture
def directory(untrained, tmp_path):
    return shutil.copytree(untrained, tmp_path / "ensemble")


def edit_config(directory, change):
    path = directory / "config.json"
    about = json.loads(path.read_text())
    change(about["config"])
    path.write_text(json.dumps(about))


@pytest.mark.parametrize("change, named", [
    (lambda config: config.update(export=True), r"\(export\)"),
    (lambda config: config.update(checkpoint_every=7, export=True), r"\(export, checkpoint_every\)"),
    (lambda config: config.pop("checkpoint_every"), r"\(checkpoint_every\)"),
])  # fmt: skip
def test_edited_settings_are_named(change, named, directory):
    edit_config(directory, change)
    with pytest.raises(UserError, match=f"config.json has changed since training {named}; restore it"):
        opened(directory)


def test_settings_that_do_not_change_numbers_may_differ(directory):
    edit_config(directory, lambda config: config.update(out="elsewhere", resume=True))
    opened(directory).__exit__()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"config": 3}', '{"config": []}', '{"config": [1]}'])
def test_settings_that_cannot_be_read(content, directory):
    path = directory / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match="config.json (cannot be read|has changed)"):
        opened(directory)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda base: flip(base / "model.safetensors"),
    lambda base: (base / "config.json").write_text((base / "config.json").read_text().replace("16", "32")),
    lambda base: flip(base / "tokenizer.json"),
    lambda base: (base / "model.safetensors").unlink(),
    lambda base: (base / "another.json").write_text("{}"),
    lambda base: (base / "config.json").rename(base / "config_.json"),
    shutil.rmtree,
], ids=["weights", "architecture", "tokenizer", "weights gone", "another file", "renamed", "all gone"])  # fmt: skip
def test_an_edited_initial_model_is_named(damage, directory):
    damage(directory / "base")
    with pytest.raises(UserError, match="base has changed since training; restore it"):
        opened(directory)
