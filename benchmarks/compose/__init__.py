"""Every pair of ingredients, and some triples, in one training step; then each is asked for what it guarantees.

    JAX_NUM_CPU_DEVICES=8 python -m benchmarks.compose
    python -m benchmarks.compose --compositions sisa+dp lora+sparse+unlearning

An ingredient fills slots of the step (training/step.py) or of what stands around it: data, members, mesh. It brings
checks of its own, which look at a finished run by other means than it was trained by. Nothing here knows of pairs: a
composition is trained by what its ingredients add, in the order of INGREDIENTS, and passes if the checks of all hold.
Exit code 1 if one does not.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.compose import checks, ingredients
from benchmarks.compose.checks import Check
from benchmarks.compose.draft import Built, Draft, blank, train
from benchmarks.compose.world import PRESETS, Config, World
from jaxforget import command
from jaxforget.errors import RunError, UserError
from jaxforget.models import sharding
from jaxforget.report.page import table, write_page
from jaxforget.report.run import Run
from jaxforget.sisa.plan import epoch_schedule


class Ingredient(NamedTuple):
    """What is added to a draft, and what must hold afterwards."""

    add: Callable[[Draft], Draft]
    checks: tuple[Check, ...]


INGREDIENTS: dict[str, Ingredient] = {  # in this order they are added
    "cda": Ingredient(ingredients.cda, (checks.paired,)),
    "unlearning": Ingredient(ingredients.unlearning, (checks.forgets,)),
    "sparse": Ingredient(ingredients.sparse, (checks.core, checks.as_module)),
    "lora": Ingredient(ingredients.adapters, (checks.core, checks.low_rank)),
    "dp": Ingredient(ingredients.dp, (checks.private,)),
    "sisa": Ingredient(ingredients.sisa, (checks.deletion,)),
    "mesh": Ingredient(ingredients.mesh, (checks.as_on_one_device,)),
}
# Every pair makes sense. sparse + lora: two changes of one core, each taken off alone; not a sparse change of adapters.
# unlearning + sisa: deletion is exact for what the members did, not for the model they start from, which knows all.
PAIRS = tuple(itertools.combinations(INGREDIENTS, 2))
TRIPLES = (
    ("cda", "dp", "sisa"),
    ("unlearning", "dp", "sisa"),
    ("unlearning", "sparse", "sisa"),
    ("unlearning", "lora", "dp"),
    ("dp", "sisa", "mesh"),
)
COMPOSITIONS = (*PAIRS, *TRIPLES, tuple(INGREDIENTS))
FIELDS = ("name", "guarantees", "hold", "nearest_its_limit", "deviation", "limit", "seconds")
DETAILS = ("name", "ingredient", "guarantee", "deviation", "limit", "holds", "said")


def composed(world: World, names: Sequence[str], also: Sequence[Callable[[Draft], Draft]] = ()) -> Draft:
    """Add ingredients to plain training, and whatever else."""
    added = [one.add for name, one in INGREDIENTS.items() if name in names]
    return functools.reduce(lambda draft, add: add(draft), (*added, *also), blank(world))


def guarantees(draft: Draft, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Train a composition and ask its ingredients; gives a row for each guarantee."""
    built = Built(draft)
    stages = train(built, draft.world.records)
    asked = {one: name for name in reversed(names) for one in INGREDIENTS[name].checks}  # each once
    for one, name in asked.items():
        for found in one(built, stages):
            yield {"name": title(names), "ingredient": name, **found._asdict(), "holds": found.holds}


def title(names: Sequence[str]) -> str:
    return " + ".join(names)


def parse(text: str) -> tuple[str, ...]:
    """Read names with + between them. Raises UserError for one that is not in INGREDIENTS."""
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in INGREDIENTS:
            raise UserError(f"--compositions {text}: no ingredient {name!r}; there are {', '.join(INGREDIENTS)}")
    return tuple(name for name in INGREDIENTS if name in names)


def run(config: Config) -> None:
    """Train and check every composition, and write the tables."""
    command.at_least(1, shards=config.shards, slices=config.slices, places=config.places, rank=config.rank,
                     batch_size=config.batch_size)  # fmt: skip
    least = config.shards * config.slices * config.batch_size
    if not least <= config.records < 1 / ingredients.DELTA:
        raise UserError(f"--records is {config.records}; give at least {least}, a batch for every slice of a shard, "
                        f"and fewer than {1 / ingredients.DELTA:g}")  # fmt: skip
    ingredients.privacy_of(config)  # tells noise and a bound that are none
    epoch_schedule(config.epochs, config.slices)  # tells a slice without an epoch
    chosen = tuple(map(parse, config.compositions)) or COMPOSITIONS
    if sharding.current() is not None:
        raise UserError("--mesh is for all of a run; here --meshes are those of the compositions that have one")
    if not config.meshes:
        raise UserError("--meshes is empty; give one or more, such as data=8")
    needed = max(map(checks.devices_of, config.meshes))
    enough = jax.device_count() >= needed
    for text in config.meshes if enough else ():
        sharding.make_mesh(text)  # tells an axis that there is not
    world = World(config)
    world.start  # noqa: B018 - tells a size that is none
    out = Run("benchmarks.compose", config, config.out, None)
    out.begin()
    rows: list[dict[str, Any]] = []
    details = []
    for names in chosen:
        if "mesh" in names and not enough:
            rows.append({"name": title(names), "nearest_its_limit": f"not run: needs JAX_NUM_CPU_DEVICES={needed}"})
            continue
        began = time.perf_counter()
        found = list(guarantees(composed(world, names), names))
        details += found
        rows.append({"name": title(names), **summary(found), "seconds": time.perf_counter() - began})
        command.say(f"{rows[-1]['name']}: {rows[-1]['hold']} of {rows[-1]['guarantees']} guarantees hold, "
                    f"{rows[-1]['seconds']:,.1f} s")  # fmt: skip
    document = out.finish(rows, guarantees=details)
    broken = [row for row in details if not row["holds"]]
    told = [f"{row['name']}: {row['guarantee']} ({row['deviation']:.3g})" for row in broken]
    left = sum("hold" not in row for row in rows)
    said = [f"{len(details) - len(broken)} of {len(details)} guarantees of {len(rows) - left} compositions hold."]
    said += [f"{left} compositions with a mesh were not run."] * bool(left) + [f"Broken: {one}." for one in told]
    lead = f"Does a step keep what each of its ingredients promises? {config.records} texts, {document['device']}."
    note = "With a limit of 0 bits, texts, stages or steps are counted. What comes nearest to its limit stands here."
    sections = [("Compositions", note, table(rows, FIELDS)), ("Guarantees", "", table(details, DETAILS))]
    write_page(out.directory / "report.html", "Ingredients of a step, two and three at a time", lead, sections,
               document["config"], said)  # fmt: skip
    command.print_table(rows, FIELDS, f"benchmarks.compose · {out.directory}")
    if broken:
        raise RunError(f"{len(broken)} of {len(details)} guarantees do not hold: {'; '.join(told)}")


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what holds, and name what is nearest to its limit: of what is broken, else of what need not be exact."""
    nearest = max(found, key=lambda row: (not row["holds"], row["deviation"] / row["limit"] if row["limit"] else -1.0))
    return {"guarantees": len(found), "hold": sum(row["holds"] for row in found),
            "nearest_its_limit": nearest["guarantee"], "deviation": nearest["deviation"],
            "limit": nearest["limit"]}  # fmt: skip


__all__ = ["PRESETS", "Config", "run"]
