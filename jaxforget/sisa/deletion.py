"""Serving requests to delete: accept, plan, retrain, erase. Every step can be killed and repeated.

    received    accepted and written down; from here on it will be served
    planned     the stages to retrain are known
    retrained   the new stages are complete, and the records have left the ledger
    committed   the old stages are erased

Waiting requests are served together: a stage that several of them touch is retrained once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxforget import files
from jaxforget.errors import UserError
from jaxforget.report.run import environment
from jaxforget.sisa.cost import training_visits
from jaxforget.sisa.ensemble import Ensemble, Keys
from jaxforget.sisa.ledger import COMMITTED, PLANNED, RECEIVED, RETRAINED, Twin, id_hash, now
from jaxforget.sisa.store import Scratch

Receipt = dict[str, Any]


class Asked(NamedTuple):
    """What became of the ids of a request before anything is done about them."""

    new: tuple[str, ...]
    deleted: dict[str, int]  # id -> the request that deleted it
    waiting: dict[str, int]  # id -> the accepted request that will
    twins: tuple[Twin, ...]  # surviving records that say the same and were not asked for


def ask(ensemble: Ensemble, ids: Iterable[str], *, with_duplicates: bool = False) -> Asked:
    """Sort the ids of a request. with_duplicates: ask for their twins too.

    Raises UserError that lists all unknown ids, or when nothing would be left; nothing is changed in any case.
    """
    ledger = ensemble.ledger
    asked = list(dict.fromkeys(ids))
    waiting = {
        identity: request["request"] for request in ledger.requests(RECEIVED, PLANNED) for identity in request["ids"]
    }
    deleted, there = ledger.deleted_by(asked), ledger.where(asked)
    new = [identity for identity in asked if identity in there and identity not in waiting]
    if unknown := [identity for identity in asked if identity not in deleted and identity not in there]:
        raise UserError(f"{len(unknown)} of {len(asked)} ids are not in the ensemble, so nothing was done: "
                        f"{', '.join(unknown)}")  # fmt: skip
    twins = ledger.twins([*new, *(identity for identity in asked if identity in waiting)])
    twins = [twin for twin in twins if twin.id not in waiting]
    if with_duplicates:
        # What a twin says is what the deleted record said, so it has no further twins but by normalisation.
        while twins:
            new += [twin.id for twin in twins]
            twins = [twin for twin in ledger.twins(new) if twin.id not in waiting]
    gone = {*waiting, *new}
    if new and not ensemble.sizes(gone).any():
        raise UserError("the request would leave no record to train on; delete the ensemble's directory instead")
    return Asked(tuple(new), deleted, {i: waiting[i] for i in asked if i in waiting}, tuple(twins))


def serve(
    ensemble: Ensemble, *, tell: Callable[[str], None] = lambda message: None, export: bool = True, **training: Any
) -> list[Receipt]:
    """Bring every accepted request to committed. The caller holds the ensemble's lock. Returns their receipts.

    Without requests it trains the stages that are missing, all of a new ensemble, and erases what should not be there.
    """
    ledger = ensemble.ledger
    done = {request["request"] for request in ledger.requests(COMMITTED)}
    if half_done := ledger.requests(RETRAINED):  # a kill came between the two last steps
        ensemble.train(**training)  # nothing, unless a checkpoint was damaged since
        _erase(ensemble, half_done, export)
    waiting = ledger.requests(RECEIVED, PLANNED)
    started = time.perf_counter()
    if waiting:
        without = sorted({identity for request in waiting for identity in request["ids"]})
        before, after = ensemble.needed(), ensemble.needed(without)
        tell(f"serving {len(waiting)} requests: {_summary(ensemble, without, before, after)}")
        numbers = [request["request"] for request in waiting]
        receipts = _plan(ensemble, waiting, without, before, after)
        ledger.advance(numbers, PLANNED, receipts)
        ensemble.train(without, **training)
        digests = ensemble.store.digests()
        for receipt in receipts:
            receipt["retrained"] = now()
            receipt["seconds"] = round(time.perf_counter() - started, 3)
            for change in receipt["stages"]:
                change["after"] = digests.get(after[change["shard"]][change["slice"]])
        ledger.advance(numbers, RETRAINED, receipts, forget=True)
    else:
        ensemble.train(**training)
    _erase(ensemble, ledger.requests(RETRAINED), export)
    return [r["receipt"] for r in ledger.requests(COMMITTED) if r["request"] not in done]


def _erase(ensemble: Ensemble, requests: Sequence[dict], export: bool) -> None:
    """Remove every stage that the surviving records do not call for, then commit."""
    ensemble.store.keep_only(key for row in ensemble.needed() for key in row if key is not None)
    files.remove(ensemble.directory / "working")
    if export:
        ensemble.export()
    if requests:
        ensemble.ledger.compact()
    receipts = [request["receipt"] | {"committed": now()} for request in requests]
    ensemble.ledger.advance([request["request"] for request in requests], COMMITTED, receipts)


def _plan(
    ensemble: Ensemble, waiting: Sequence[dict], without: Sequence[str], before: Keys, after: Keys
) -> list[Receipt]:
    """Write what each request is about to change. Stages are those of the whole batch of requests."""
    recipe = ensemble.recipe
    digests, gone = ensemble.store.digests(), set(without)
    stages: list[dict[str, Any]] = [
        {"shard": shard, "slice": stage, "before": None if old is None else digests.get(old), "after": None}
        for shard, (row, new_row) in enumerate(zip(before, after, strict=True))
        for stage, (old, new) in enumerate(zip(row, new_row, strict=True))
        if old != new
    ]
    count_SR = ensemble.ledger.counts(recipe.shards, recipe.slices, gone)
    visits = sum(recipe.epochs[s["slice"]] * int(count_SR[s["shard"], : s["slice"] + 1].sum()) for s in stages)
    had, have = ensemble.sizes(), ensemble.sizes(gone)
    shared = {
        "batch": [request["request"] for request in waiting],
        "stages": stages,
        "shards": sorted({s["shard"] for s in stages}),
        "stages_retrained": sum(after[s["shard"]][s["slice"]] is not None for s in stages),
        "examples_revisited": visits,
        "examples_of_full_retraining": training_visits(count_SR, recipe.epochs),
        "shards_emptied": [shard for shard in range(recipe.shards) if had[shard] and not have[shard]],
        "config_sha256": recipe.digest,
        **environment(),
    }
    return [
        {"request": r["request"], "received": r["received"], "ids_sha256": sorted(map(id_hash, r["ids"])), **shared}
        for r in waiting
    ]


def _summary(ensemble: Ensemble, without: Sequence[str], before: Keys, after: Keys) -> str:
    shards = [k for k, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    stages = sum(a != b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    total = sum(key is not None for row in before for key in row)
    return f"{len(without)} records in shards {', '.join(map(str, shards))}; {stages} of {total} stages to retrain"


class Check(NamedTuple):
    """A stage compared with the same stage trained from scratch."""

    shard: int
    stage: int
    served: str  # digest of the parameters
    scratch: str

    @property
    def same(self) -> bool:
        """Say whether all bits agree."""
        return self.served == self.scratch


def verify(ensemble: Ensemble, **training: Any) -> list[Check]:
    """Train every stage from scratch on the surviving records, in memory, and compare it bit for bit with the disk.

    Raises RunError for a stage that cannot be read, or is not what was saved.
    """
    served = ensemble.read(key for row in ensemble.needed() for key in row if key is not None)
    scratch = Scratch()
    ensemble.train(scratch=scratch, **training)
    fresh = scratch.digests()
    return [
        Check(shard, stage, served[key], fresh[key])
        for shard, row in enumerate(ensemble.needed())
        for stage, key in enumerate(row)
        if key is not None
    ]


def same_environment(ensemble: Ensemble) -> bool:
    """Say whether this machine and these packages are those of the training; elsewhere bits may differ."""
    about = json.loads((ensemble.directory / "config.json").read_text(encoding="utf-8"))
    return {name: about.get(name) for name in ("versions", "device")} == environment()
