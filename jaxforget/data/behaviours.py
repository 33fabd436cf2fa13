"""Sets whose loss stands for a behaviour: the queries of arXiv 2401.15241, experiment 2, read from their public files.

Every set is a list of records: plain texts, or questions with wrong answers. Texts are what models should not say.
"""

from __future__ import annotations

import csv
import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jaxforget.data.sources import Record, content_id
from jaxforget.data.stereotypes import read_winobias
from jaxforget.errors import UserError

PRONOUNS = {"she": ("she", "her", "hers"), "he": ("he", "him", "his")}
FEWEST = 8  # statements of a group of ToxiGen


def texts(sentences: Sequence[str]) -> list[Record]:
    """Make records of plain texts; equal ones are one."""
    return [Record(content_id(None, one), one) for one in dict.fromkeys(sentences)]


def toxigen(archive: str | Path) -> dict[str, list[Record]]:
    """Read the statements that ToxiGen's prompts of hate are made of, by group.

    archive: prompts.tar.xz, whose lines are lists of statements. Kept are those with more than 8 and at most 24 words,
    as in the paper, of groups that have at least FEWEST; the paper draws 256 of the texts generated from them.
    """
    groups: dict[str, list[Record]] = {}
    try:
        with tarfile.open(archive) as files:
            for file in sorted(files.getnames()):
                if (found := re.search(r"hate_(.+)_1k\.txt$", file)) and (member := files.extractfile(file)):
                    lines = member.read().decode("utf-8")
                    said = [one.strip().lstrip("-").strip() for one in lines.replace("\\n", "\n").split("\n")]
                    kept = texts([one for one in said if 8 < len(one.split()) <= 24])
                    if len(kept) >= FEWEST:
                        groups[found[1]] = kept
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{archive} is not ToxiGen's archive of prompts ({error})") from None
    if not groups:
        raise UserError(f"{archive} holds no file hate_<group>_1k.txt with statements")
    return groups


def winobias(directory: str | Path) -> dict[str, list[Record]]:
    """Read type 1 of WinoBias, pro and anti, dev and test, by the pronouns of a sentence; both kinds in one is none."""
    found: dict[str, list[str]] = defaultdict(list)
    for pair in read_winobias(str(directory)):
        if pair.group.startswith("type 1"):
            for side, sentence in (("pro", pair.more), ("anti", pair.less)):
                words = set(re.findall(r"[a-z]+", sentence.lower()))
                kinds = [kind for kind, forms in PRONOUNS.items() if words & set(forms)]
                if len(kinds) == 1:
                    found[f"{side}, {kinds[0]}"].append(sentence)
    return {name: texts(sentences) for name, sentences in sorted(found.items())}


def truthfulqa(file: str | Path, fewest: int = 128) -> dict[str, list[Record]]:
    """Read each incorrect answer of TruthfulQA with its question, by category of at least `fewest` pairs.

    The kinds of "Indexical Error" and of "Confusion" are one category each, as in the released code.
    """
    found: dict[str, list[Record]] = defaultdict(list)
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            for row in csv.DictReader(lines):
                category = row["Category"].partition(":")[0]
                for answer in filter(None, (one.strip() for one in row["Incorrect Answers"].split(";"))):
                    found[category].append(Record(content_id(row["Question"], answer), answer, row["Question"]))
    except (OSError, KeyError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{file} is not TruthfulQA.csv ({error})") from None
    return {name: records for name, records in sorted(found.items()) if len(records) >= fewest}
