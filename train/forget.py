"""Delete records from an ensemble: `python -m train.forget --ensemble DIR --id X` or `--ids FILE`.

The ensemble afterwards is, bit for bit, the one that training without those records gives. A request is written down
before anything is done about it; a killed process loses none, and `--resume` finishes what was accepted.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from jaxforget import command
from jaxforget.data.text import read
from jaxforget.errors import RunError, UserError
from jaxforget.report.page import cell, table, write_page
from jaxforget.report.run import Run
from jaxforget.sisa.deletion import ask, same_environment, serve, verify
from jaxforget.sisa.ensemble import Ensemble, locked
from jaxforget.sisa.ledger import id_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Delete records from an ensemble, exactly."""

    ensemble: Path | None = None
    """Directory that train.sisa made."""
    id: tuple[str, ...] = ()
    """Ids of records to delete."""
    ids: Path | None = None
    """File of records to delete: .txt with one id a line, or a data file, read as the training text was."""
    with_duplicates: bool = False
    """Also delete records that say the same, exactly or up to case, spacing and punctuation."""
    status: bool = False
    """Show the requests and what they stand at; nothing is changed."""
    verify: bool = False
    """Train from scratch on the surviving records and compare every stage bit for bit."""
    resume: bool = False
    """Finish requests that were accepted; rebuild stages that are missing."""
    wait: bool = True
    """Wait while another process works on the ensemble. The request is accepted in either case."""
    out: Path | None = None
    """Directory for the report; runs/<command>-<time> when not given. Must be empty."""


def default() -> Config:
    """delete what is asked, retrain what is concerned"""
    return Config()


PRESETS = {"default": default}
FIELDS = ("name", "state", "records", "shards", "stages_retrained", "examples_revisited", "share_of_retraining",
          "seconds", "note")  # fmt: skip


def run(config: Config) -> None:
    """Accept, serve, report."""
    if config.ensemble is None:
        raise UserError("--ensemble is missing; give the directory that train.sisa made")
    if not (config.id or config.ids or config.status or config.verify or config.resume):
        raise UserError("nothing to do; give --id, --ids, --resume, --verify or --status")
    with Ensemble(config.ensemble) as ensemble:
        if config.status:
            status(config, ensemble)
            return
        # Ids go into the report as digests: it must not keep what was deleted.
        told = dataclasses.replace(config, id=tuple(map(id_hash, config.id)), resume=False)
        out = Run("train.forget", told, config.out, None)
        started, notes = time.perf_counter(), {}
        asked = None
        if config.id or config.ids:
            asked = ask(ensemble, [*config.id, *read_ids(config, ensemble)], with_duplicates=config.with_duplicates)
            notes = explain(config, asked)
        out.begin()
        number = None
        if asked and asked.new:
            number = ensemble.ledger.receive(asked.new)
            command.say(f"request {number}: {len(asked.new)} records, accepted")
        with locked(config.ensemble, wait=config.wait, tell=command.say), command.progress("retraining") as show:
            keywords = dict(
                show=show, checkpoint_every=json.loads(ensemble.ledger.meta("config"))["checkpoint_every"],
                log=lambda tag, step, metrics: out.log(tag, step, metrics),
                resumed=lambda tag, step: out.rewind(tag, step),
            )  # fmt: skip
            export = json.loads(ensemble.ledger.meta("config"))["export"]
            receipts = serve(ensemble, tell=command.say, export=export, **keywords)
            checks = verify(ensemble, show=show) if config.verify else []
        # A request of ours may have been served by the process we waited for.
        numbers = {receipt["request"] for receipt in receipts} | {number}
        ours = [request for request in ensemble.ledger.requests() if request["request"] in numbers]
        report(out, ours, checks, notes, time.perf_counter() - started)
        if checks:
            same = sum(check.same for check in checks)
            command.say(f"{same} of {len(checks)} stages equal training from scratch, bit for bit")
        if not all(check.same for check in checks):
            place = "" if same_environment(ensemble) else "; this machine or its packages are not those of the training"
            wrong = ", ".join(f"shard {c.shard} slice {c.stage}" for c in checks if not c.same)
            raise RunError(f"differs from training from scratch: {wrong}{place}")


def read_ids(config: Config, ensemble: Ensemble) -> list[str]:
    """Read the ids of --ids."""
    if config.ids is None:
        return []
    if config.ids.suffix != ".txt":
        text = dataclasses.replace(ensemble.recipe.text, limit=None)  # that of training says nothing about this file
        return [record.id for record in read(str(config.ids), text)]
    try:
        lines = config.ids.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.ids}: cannot be read as text ({error})") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{config.ids}: holds no ids; give one a line")
    return ids


def explain(config: Config, asked) -> dict:
    """Tell what became of the ids; returns the counts."""
    for name, numbers in (("already deleted", asked.deleted), ("already waiting for deletion", asked.waiting)):
        if numbers:
            listed = ", ".join(f"{identity} (request {number})" for identity, number in numbers.items())
            command.say(f"{name}: {listed}")
    if asked.twins:
        listed = ", ".join(
            f"{twin.id} (shard {twin.shard}, {'exact' if twin.exact else 'normalised'})" for twin in asked.twins
        )
        command.say(f"{len(asked.twins)} other records say the same and stay in the ensemble; --with-duplicates "
                    f"deletes them too: {listed}")  # fmt: skip
    return {
        "already_deleted": len(asked.deleted),
        "already_waiting": len(asked.waiting),
        "duplicates_left_exact": sum(twin.exact for twin in asked.twins),
        "duplicates_left_normalised": sum(not twin.exact for twin in asked.twins),
    }


def row(request: dict) -> dict:
    """Make a row of the table from a request."""
    receipt = request["receipt"]
    result = {
        "name": f"request {request['request']}", "state": request["state"],
        "records": len(receipt.get("ids_sha256", request["ids"])),
    }  # fmt: skip
    if receipt:
        full = receipt["examples_of_full_retraining"]
        emptied = receipt["shards_emptied"]
        result |= {
            "shards": len(receipt["shards"]), "stages_retrained": receipt["stages_retrained"],
            "examples_revisited": receipt["examples_revisited"],
            "share_of_retraining": receipt["examples_revisited"] / full if full else None,
            "seconds": receipt.get("seconds"),
        }  # fmt: skip
        notes = [f"together with {len(receipt['batch']) - 1} others"] if len(receipt["batch"]) > 1 else []
        notes += [f"shard {', '.join(map(str, emptied))} is empty and has no vote"] if emptied else []
        result |= {"note": "; ".join(notes)} if notes else {}
    return result


def status(config: Config, ensemble: Ensemble) -> None:
    """Print every request, and what the ensemble lacks."""
    rows = [row(request) for request in ensemble.ledger.requests()]
    command.print_table(rows, FIELDS, f"train.forget · {config.ensemble}")
    sizes = ensemble.sizes()
    missing = len(ensemble.missing(ensemble.needed()))
    voting = sum(size > 0 for size in sizes)
    command.say(f"{sizes.sum()} examples in {voting} of {len(sizes)} shards; {missing} stages are missing")
    if missing or any(request["state"] != "committed" for request in rows):
        command.say(f"finish with: python -m train.forget --ensemble {config.ensemble} --resume")


def report(out: Run, requests, checks, notes, seconds: float) -> None:
    """Write results.json and report.html, and print the table."""
    rows, receipts = [row(request) for request in requests], [request["receipt"] for request in requests]
    total = {"name": "this run", "seconds": round(seconds, 3), **notes}
    if checks:
        total |= {"stages_verified": sum(check.same for check in checks),
                  "stages_different": sum(not check.same for check in checks)}  # fmt: skip
    document = out.finish([*rows, total], receipts=receipts)
    sections = [("Requests", "What every request cost; share of retraining: visits of examples, divided by those of "
                 "training everything that is left.",
                 table([*rows, total], FIELDS))]  # fmt: skip
    if checks:
        said = [{"name": f"shard {c.shard}, slice {c.stage}", "served": c.served[:16],
                 "from_scratch": c.scratch[:16], "same": "yes" if c.same else "NO"} for c in checks]  # fmt: skip
        sections.append(("Verification", "SHA-256 of every stage's parameters (its first 16 digits), as served and as "
                         "trained from scratch without the deleted records.",
                         table(said, ("name", "same", "served", "from_scratch"))))  # fmt: skip
    found = [f"Requests committed: {len(receipts)}, in {cell(total['seconds'])} s."]
    if shares := [one["share_of_retraining"] for one in rows if one.get("share_of_retraining") is not None]:
        span = " to ".join(f"{share:.1%}" for share in sorted({min(shares), max(shares)}))
        found.append(f"A request took {span} of the visits of examples that training everything that is left takes.")
    if checks:
        found.append(f"Verified against training from scratch: {total['stages_verified']} stages, "
                     f"{total['stages_different']} of them different.")  # fmt: skip
    write_page(out.directory / "report.html", "Deletions",
               "Which records were deleted from the ensemble, and at what cost? Every shard that held one is trained "
               f"again from the slice before it. {document['device']}.",
               sections, document["config"], found, tell_command=False)  # fmt: skip
    command.print_table([*rows, total], FIELDS, f"train.forget · {out.directory}")


if __name__ == "__main__":
    command.main(run, PRESETS)
