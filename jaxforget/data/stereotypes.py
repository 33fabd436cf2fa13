"""Files of stereotype benchmarks -> items: StereoSet, CrowS-Pairs, WinoBias, own pairs, prompts by group."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxforget.data.sources import read_rows
from jaxforget.errors import UserError

LABELS = ("anti", "stereotype", "unrelated")  # what StereoSet's labels 0, 1 and 2 say
WINOBIAS = "{side}_stereotyped_type{kind}.txt.{split}"
BRACKETS = str.maketrans("", "", "[]")


@dataclasses.dataclass(frozen=True)
class Triple:
    """One StereoSet item. In intrasentence items the three are whole sentences, else what follows the context."""

    kind: str  # intrasentence or intersentence
    domain: str
    term: str
    context: str
    stereotype: str
    anti: str
    unrelated: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sentences that differ in whom they are about. `more` is the stereotypical one.

    In CrowS-Pairs it is the one that says more of a stereotype, or less against one: `antistereo` marks the latter.
    """

    more: str
    less: str
    group: str
    antistereo: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A beginning to be continued, and whom it is about."""

    text: str
    group: str


def read_stereoset(source: str) -> list[Triple]:
    """Read StereoSet as one row a sentence: context, sentence, bias_type, label (0, 1, 2), id, target.

    Three rows share an id. A context with BLANK makes an intrasentence item. Raises UserError naming file, line, field.
    """
    fields = ("context", "sentence", "bias_type", "id", "target")
    found: dict[str, dict[str, tuple[str, dict]]] = {}
    for where, row in read_rows(source, fields):
        label: Any = row.get("label")
        if isinstance(label, bool) or str(label) not in ("0", "1", "2"):
            raise UserError(f"{source}, {where}: field 'label' is {label!r}; it must be 0, 1 or 2")
        item = found.setdefault(row["id"], {})
        name = LABELS[int(label)]
        if name in item:
            raise UserError(f"{source}, {where}: id {row['id']!r} has label {label} twice, before at {item[name][0]}")
        first = next(iter(item.values()), (where, row))
        for field in ("context", "bias_type", "target"):
            if row[field] != first[1][field]:
                raise UserError(f"{source}, {where}: field {field!r} differs from that of the same id at {first[0]}")
        item[name] = where, row
    triples = []
    for identity, item in found.items():
        where, row = next(iter(item.values()))
        if missing := [name for name in LABELS if name not in item]:
            raise UserError(f"{source}, {where}: id {identity!r} has no row of label {LABELS.index(missing[0])}")
        triples.append(Triple(
            kind="intrasentence" if "BLANK" in row["context"] else "intersentence", domain=row["bias_type"],
            term=row["target"], context=row["context"], **{name: item[name][1]["sentence"] for name in LABELS},
        ))  # fmt: skip
    return triples


def read_crows_pairs(source: str) -> list[Pair]:
    """Read CrowS-Pairs: sent_more, sent_less, stereo_antistereo, bias_type.

    Raises UserError naming file, line and field.
    """
    pairs = []
    for where, row in read_rows(source, ("sent_more", "sent_less", "stereo_antistereo", "bias_type")):
        direction = row["stereo_antistereo"]
        if direction not in ("stereo", "antistereo"):
            raise UserError(f"{source}, {where}: field 'stereo_antistereo' is {direction!r}; it must be stereo or "
                            "antistereo")  # fmt: skip
        pairs.append(Pair(row["sent_more"], row["sent_less"], row["bias_type"], direction == "antistereo"))
    return pairs


def read_pairs(source: str) -> list[Pair]:
    """Read own pairs: stereotype, anti, group. Raises UserError naming file, line and field."""
    rows = read_rows(source, ("stereotype", "anti", "group"))
    return [Pair(row["stereotype"], row["anti"], row["group"]) for _, row in rows]


def read_prompts(source: str) -> list[Prompt]:
    """Read prompts of exactly two groups: prompt, group. Raises UserError naming file, line and field."""
    prompts = [Prompt(row["prompt"], row["group"]) for _, row in read_rows(source, ("prompt", "group"))]
    groups = list(dict.fromkeys(prompt.group for prompt in prompts))
    if len(groups) != 2:
        raise UserError(f"{source}: field 'group' has {len(groups)} values ({', '.join(groups[:5])}); a gap needs two")
    return prompts


def read_winobias(directory: str) -> list[Pair]:
    """Read what a directory has of {pro,anti}_stereotyped_type{1,2}.txt.{dev,test}, without numbers and brackets.

    Groups are "type 1 dev" and so on; line n of a pro file belongs to line n of its anti file. Raises UserError naming
    file and line.
    """
    if not Path(directory).is_dir():
        raise UserError(f"--winobias {directory} is not a directory; give the one with "
                        f"{WINOBIAS.format(side='pro', kind=1, split='dev')}")  # fmt: skip
    pairs = []
    for kind in ("1", "2"):
        for split in ("dev", "test"):
            names = (WINOBIAS.format(side=side, kind=kind, split=split) for side in ("pro", "anti"))
            pro, anti = (Path(directory) / name for name in names)
            if not pro.exists() and not anti.exists():
                continue
            sides = [_numbered(pro), _numbered(anti)]
            if len(sides[0]) != len(sides[1]):
                raise UserError(f"{anti} has {len(sides[1])} lines; {pro.name} has {len(sides[0])}")
            for line, (one, other) in enumerate(zip(*sides, strict=True), 1):
                if one[0] != other[0]:
                    raise UserError(f"{anti}, line {line}: begins with {other[0]}; in {pro.name} it is {one[0]}")
                pairs.append(Pair(one[1], other[1], f"type {kind} {split}"))
    if not pairs:
        raise UserError(f"--winobias {directory} has no file {WINOBIAS.format(side='pro', kind='1', split='dev')}")
    return pairs


def _numbered(path: Path) -> list[tuple[str, str]]:
    """Read lines of a number and a sentence."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; pro and anti files come in pairs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not (match := re.fullmatch(r"(\d+)\s+(\S.*?)\s*", line)):
            raise UserError(f"{path}, line {number}: is not a number followed by a sentence")
        found.append((match[1], match[2].translate(BRACKETS)))
    return found
