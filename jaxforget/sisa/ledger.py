"""The ledger of an ensemble: its records, where each lies, the requests to delete some, and the finished stages.

One SQLite file. Every change is a transaction, so a kill leaves the state before or after it. Deleted rows are
overwritten with zeros (secure_delete), and no write-ahead log keeps old pages. That leaves copies of rows which SQLite
once moved to another page, so `compact` writes the file anew before a request is committed.

Of several processes the first alone has the file open, and tells the others what it read. All must call the same
methods.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxforget import files
from jaxforget.data.sources import Record, content_id
from jaxforget.errors import RunError, UserError

T = TypeVar("T")
NAME = "ledger.sqlite"
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    id TEXT PRIMARY KEY, shard INTEGER NOT NULL, slice INTEGER NOT NULL, rows INTEGER NOT NULL,
    prompt TEXT, text TEXT NOT NULL, label TEXT, content TEXT NOT NULL, normal TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX records_place ON records (shard, slice);
CREATE INDEX records_normal ON records (normal);
CREATE TABLE requests (
    request INTEGER PRIMARY KEY AUTOINCREMENT, state TEXT NOT NULL, received TEXT NOT NULL, receipt TEXT
);
CREATE TABLE request_ids (request INTEGER NOT NULL, id TEXT NOT NULL, PRIMARY KEY (request, id)) WITHOUT ROWID;
CREATE TABLE deleted (id_sha256 TEXT PRIMARY KEY, request INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE stages (
    key TEXT PRIMARY KEY, shard INTEGER NOT NULL, stage INTEGER NOT NULL, digest TEXT NOT NULL,
    steps INTEGER NOT NULL, visits INTEGER NOT NULL
) WITHOUT ROWID;
"""
RECEIVED, PLANNED, RETRAINED, COMMITTED = "received", "planned", "retrained", "committed"


class Row(NamedTuple):
    """A record and its place. rows: examples it becomes; 0 when it was too short to train on."""

    record: Record
    shard: int
    slice: int
    rows: int


class Twin(NamedTuple):
    """A record that says what a deleted one said."""

    id: str
    shard: int
    exact: bool  # else equal after normalisation


def id_hash(identity: str) -> str:
    """SHA-256 of an id: what the ledger keeps of a deleted record."""
    return hashlib.sha256(identity.encode()).hexdigest()


def normalised(record: Record) -> str:
    """Digest what a record says, whatever its case, spacing, punctuation, invisible characters and Unicode form."""
    joined = unicodedata.normalize("NFKC", f"{record.prompt or ''} {record.text}").casefold()
    visible = [(c, unicodedata.category(c)) for c in joined if unicodedata.category(c) != "Cf"]
    letters = "".join(c if category[0] in "LNM" else " " for c, category in visible)
    # A text of signs alone would equal every other one.
    return content_id(None, " ".join(letters.split()) or joined.strip())


def now() -> str:
    """Return the time as text, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Ledger:
    """An open ledger; a context manager. A class, to close the file."""

    _db: sqlite3.Connection  # in the first process alone

    def __init__(self, directory: Path):
        self.path = Path(directory) / NAME
        files.through_first(self._open)

    def _open(self) -> None:
        if not self.path.is_file():
            raise UserError(f"{self.path.parent} is not an ensemble: it has no {NAME}; make one with python -m "
                            "train.sisa")  # fmt: skip
        # Autocommit: transactions are written out below. The timeout covers another process's short transaction.
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute("SELECT count(*) FROM requests").fetchone()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise RunError(f"{self.path} cannot be read ({error})") from None

    @staticmethod
    def create(directory: Path, meta: dict[str, str], rows: Iterable[Row]) -> None:
        """Write a new ledger; it appears complete or not at all."""
        path, temporary = Path(directory) / NAME, Path(directory) / f".{NAME}"

        def write() -> None:
            temporary.unlink(missing_ok=True)
            try:
                with closing(sqlite3.connect(temporary)) as db, db:
                    db.executescript(SCHEMA)
                    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                    db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_values, rows))
            except sqlite3.OperationalError as error:
                temporary.unlink(missing_ok=True)
                raise RunError(f"{path} cannot be written ({error}); run again with --resume") from None
            os.replace(temporary, path)

        files.through_first(write)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: Any) -> None:
        if files.leads():
            self._db.close()

    def _change(self, write: Callable[[sqlite3.Connection], T]) -> T:
        """Make changes in one transaction that keeps other writers out from its beginning."""

        def transaction() -> T:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    result = write(self._db)
                    self._db.execute("COMMIT")
                    return result
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise RunError(f"{self.path} cannot be written ({error}); what it holds is unchanged") from None

        return files.through_first(transaction)

    def _read(self, query: str, values: Sequence = ()) -> Iterator[tuple]:
        """Query. Raises RunError where the file is damaged."""
        return iter(self._each(query, [values])[0])

    def _each(self, query: str, values: Iterable[Sequence]) -> list[list[tuple]]:
        """Query once for each of `values`. However many there are, the first process tells the others once."""
        asked = list(values)

        def rows() -> list[list[tuple]]:
            try:
                return [self._db.execute(query, one).fetchall() for one in asked]
            except sqlite3.Error as error:
                raise RunError(f"{self.path} cannot be read ({error})") from None

        return files.through_first(rows)

    def compact(self) -> None:
        """Write the file anew from the rows that are there. Call it after `advance` has forgotten some."""

        def anew() -> None:
            try:
                self._db.execute("VACUUM")
            except sqlite3.Error as error:
                raise RunError(f"{self.path} cannot be written anew ({error}); run again with --resume") from None

        files.through_first(anew)

    def meta(self, name: str) -> str:
        """Return a setting stored at creation."""
        return next(self._read("SELECT value FROM meta WHERE name = ?", (name,)))[0]

    # records

    def ids(self, shards: int, slices: int, without: Iterable[str] = ()) -> list[list[list[str]]]:
        """Return the surviving ids by shard and slice, less those in `without`, of records that have examples."""
        gone = set(without)
        result: list[list[list[str]]] = [[[] for _ in range(slices)] for _ in range(shards)]
        for identity, shard, cut in self._read("SELECT id, shard, slice FROM records WHERE rows > 0 ORDER BY id"):
            if identity not in gone:
                result[shard][cut].append(identity)
        return result

    def records(self, shard: int, cut: int, without: Iterable[str] = ()) -> list[Row]:
        """Return the surviving records of a slice in the order of their ids."""
        found = self._read(
            "SELECT id, prompt, text, label, rows FROM records WHERE shard = ? AND slice = ? ORDER BY id", (shard, cut)
        )
        gone = set(without)
        return [
            Row(Record(identity, text, prompt, {} if label is None else {"label": label}), shard, cut, rows)
            for identity, prompt, text, label, rows in found
            if identity not in gone
        ]

    def counts(self, shards: int, slices: int, without: Iterable[str] = ()) -> np.ndarray:
        """Return how many examples the surviving records of each slice become, int64 (shards, slices)."""
        gone = set(without)
        count_SR = np.zeros((shards, slices), np.int64)
        for identity, shard, cut, rows in self._read("SELECT id, shard, slice, rows FROM records"):
            if identity not in gone:
                count_SR[shard, cut] += rows
        return count_SR

    def where(self, ids: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return the shard and slice of those ids whose records survive."""
        ids = list(ids)
        found = self._each("SELECT shard, slice FROM records WHERE id = ?", ((one,) for one in ids))
        return {identity: rows[0] for identity, rows in zip(ids, found, strict=True) if rows}

    def deleted_by(self, ids: Iterable[str]) -> dict[str, int]:
        """Return the request that deleted an id, of those ids that were deleted."""
        ids = list(ids)
        found = self._each("SELECT request FROM deleted WHERE id_sha256 = ?", ((id_hash(one),) for one in ids))
        return {identity: rows[0][0] for identity, rows in zip(ids, found, strict=True) if rows}

    def twins(self, ids: Sequence[str]) -> list[Twin]:
        """Find surviving records that say what these say, exactly or after normalisation, and are not among them."""
        asked = sorted(set(ids))
        of_asked = self._each("SELECT content, normal FROM records WHERE id = ?", ((one,) for one in asked))
        said = [row for rows in of_asked for row in rows]  # none of a record deleted meanwhile by another process
        alike = self._each("SELECT id, shard, content FROM records WHERE normal = ?", ((normal,) for _, normal in said))
        found: dict[str, Twin] = {}
        for (content, _), others in zip(said, alike, strict=True):
            for other, shard, its in others:
                exact = its == content or (other in found and found[other].exact)
                found[other] = Twin(other, shard, exact)
        return [found[name] for name in sorted(found.keys() - set(asked))]

    # requests

    def receive(self, ids: Sequence[str]) -> int:
        """Accept a request: from here on it is never lost. Returns its number."""

        def write(db: sqlite3.Connection) -> int:
            db.execute("INSERT INTO requests (state, received) VALUES (?, ?)", (RECEIVED, now()))
            (number,) = db.execute("SELECT last_insert_rowid()").fetchone()
            db.executemany("INSERT INTO request_ids VALUES (?, ?)", ((number, identity) for identity in ids))
            return number

        return self._change(write)

    def requests(self, *states: str) -> list[dict[str, Any]]:
        """Return request, state, received, ids (empty once deleted) and receipt of requests in these states, or all."""
        rows = [row for row in self._read("SELECT * FROM requests ORDER BY request") if not states or row[1] in states]
        ids = self._each("SELECT id FROM request_ids WHERE request = ?", ((row[0],) for row in rows))
        return [
            {"request": number, "state": state, "received": received, "ids": [one for (one,) in mine],
             "receipt": json.loads(receipt) if receipt else {}}
            for (number, state, received, receipt), mine in zip(rows, ids, strict=True)
        ]  # fmt: skip

    def advance(self, numbers: Sequence[int], state: str, receipts: Sequence[dict], *, forget: bool = False) -> None:
        """Move requests to a state with their receipts. forget: their records and plain ids go in the same act."""

        def write(db: sqlite3.Connection) -> None:
            for number, receipt in zip(numbers, receipts, strict=True):
                db.execute(
                    "UPDATE requests SET state = ?, receipt = ? WHERE request = ?", (state, json.dumps(receipt), number)
                )
                if forget:
                    ids = [row[0] for row in db.execute("SELECT id FROM request_ids WHERE request = ?", (number,))]
                    db.executemany(
                        "INSERT OR IGNORE INTO deleted VALUES (?, ?)", ((id_hash(one), number) for one in ids)
                    )
                    db.executemany("DELETE FROM records WHERE id = ?", ((one,) for one in ids))
                    db.execute("DELETE FROM request_ids WHERE request = ?", (number,))

        self._change(write)

    # stages

    def stages(self) -> dict[str, dict[str, Any]]:
        """Return key -> shard, stage, digest, steps, visits of every finished stage."""
        found = self._read("SELECT key, shard, stage, digest, steps, visits FROM stages")
        names = ("shard", "stage", "digest", "steps", "visits")
        return {key: dict(zip(names, rest, strict=True)) for key, *rest in found}

    def add_stages(self, rows: Sequence[tuple[str, int, int, str, int, int]]) -> None:
        """Record stages whose checkpoints are complete: key, shard, stage, digest, steps, visits of each."""

        def write(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?, ?, ?)", rows)

        self._change(write)

    def drop_stages(self, keys: Iterable[str]) -> None:
        """Forget stages whose checkpoints are gone or damaged."""

        def write(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM stages WHERE key = ?", ((key,) for key in keys))

        self._change(write)


def _values(row: Row) -> tuple:
    record = row.record
    label = record.fields.get("label")
    content = content_id(record.prompt, record.text)
    return (
        record.id, row.shard, row.slice, row.rows, record.prompt, record.text,
        None if label is None else str(label), content, normalised(record),
    )  # fmt: skip
