"""Records -> examples with a task label and attributes. Shapes: N examples, J attributes, T tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxforget.data.sampling import hash64, id_keys, order
from jaxforget.data.sources import Record, content_id
from jaxforget.data.tokens import Examples, right_pad
from jaxforget.errors import UserError
from jaxforget.models.hub import read_json

SETS = ("train", "valid", "test")
SPLIT = 0x53504C54  # what a hash is for
PAD, START, OTHER = 0, 1, 2  # ids of a vocabulary made of token ids: padding, the first token, and rare ones
TOKENS = "token_ids.json"  # the file of such a vocabulary in a model directory


def attribute_names(
    records: Sequence[Record], attributes: Sequence[str], unknown: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Return the values of every attribute, sorted. unknown: values that mean none is known.

    Raises UserError for a record without the column, and for an attribute with one value.
    """
    found = {}
    for name in attributes:
        for record in records:
            if name not in record.fields:
                raise UserError(f"record {record.id!r} has no attribute {name!r}; it has "
                                f"{', '.join(record.fields) or 'none'}")  # fmt: skip
        values = sorted({str(record.fields[name]) for record in records} - set(unknown))
        if len(values) < 2:
            raise UserError(f"attribute {name} has {'no known value' if not values else f'the one value {values[0]!r}'}"
                            "; two or more are needed")  # fmt: skip
        found[name] = tuple(values)
    return found


def attributes_of(records: Sequence[Record], names: dict[str, tuple[str, ...]]) -> np.ndarray:
    """Return the place of every record's values among the names, -1 where there is none, int32 (N, J)."""
    columns = [
        [values.index(value) if (value := str(record.fields[name])) in values else -1 for record in records]
        for name, values in names.items()
    ]
    return np.asarray(columns, np.int32).T.reshape(len(records), len(names))


def by_content(records: Sequence[Record]) -> list[Record]:
    """Name records of several sources by what they say, with "-2", "-3" for exact duplicates in the order they come."""
    seen: Counter[str] = Counter()
    result = []
    for record in records:
        digest = content_id(record.prompt, record.text)
        seen[digest] += 1
        result.append(dataclasses.replace(record, id=digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"))
    return result


def split_by_content(
    records: Sequence[Record], shares: tuple[float, float, float], seed: int
) -> dict[str, list[Record]]:
    """Deal records to train, valid and test. What says the same is dealt to the same set: none leaks to another."""
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"split is {shares}; it must be three shares above 0 that add up to 1")
    key_N = id_keys([content_id(record.prompt, record.text) for record in records])
    place_N = hash64(seed, SPLIT, key_N) / 2.0**64
    set_N = np.searchsorted(np.cumsum(shares)[:2], place_N, side="right")
    return {name: [r for r, s in zip(records, set_N, strict=True) if s == i] for i, name in enumerate(SETS)}


def balanced(records: Sequence[Record], names: dict[str, tuple[str, ...]], seed: int) -> list[Record]:
    """Take as many records of every value of the attributes within a class: the label then tells nothing of them.

    Records of unknown attributes are left out. Which ones stay is a function of the seed and their ids.
    """
    attribute_NJ = attributes_of(records, names)
    cells: dict[str, dict[tuple[int, ...], list[int]]] = {}
    key_N = id_keys([record.id for record in records])
    for n in order(key_N, seed, -3):
        if (attribute_NJ[n] >= 0).all():
            of_label = cells.setdefault(str(records[n].fields["label"]), {})
            of_label.setdefault(tuple(attribute_NJ[n].tolist()), []).append(int(n))
    full = int(np.prod([len(values) for values in names.values()]))
    kept: list[int] = []
    for label, by_value in cells.items():
        if len(by_value) < full:
            raise UserError(f"label {label!r} lacks a combination of attributes; it cannot be balanced")
        fewest = min(map(len, by_value.values()))
        kept += [n for rows in by_value.values() for n in rows[:fewest]]
    return [records[n] for n in sorted(kept)]


def token_vocabulary(records: Sequence[Record], size: int) -> dict[str, int]:
    """Number the commonest token ids of records that are ids, from 3 on; the others are one token."""
    if size < 4:
        raise UserError(f"vocab_size is {size}; it must be at least 4")
    counts = Counter(token for record in records for token in record.text.split())
    commonest = sorted(counts, key=lambda token: (-counts[token], token))[: size - 3]
    return {token: 3 + place for place, token in enumerate(commonest)}


def read_vocabulary(file: Path) -> dict[str, int]:
    """Read what `token_vocabulary` gave and a model directory keeps."""
    vocabulary = read_json(file)
    if sorted(vocabulary.values()) != list(range(3, 3 + len(vocabulary))):
        raise UserError(f"{file} is no vocabulary of token ids")
    return vocabulary


def classify_tokens(
    records: Sequence[Record], vocabulary: dict[str, int], labels: Sequence[str], max_length: int
) -> Examples:
    """Encode records whose text is token ids, and their class: START and then what the vocabulary makes of them.

    Raises UserError for a text that is not token ids and for a label that is not among the names.
    """
    place = {name: index for index, name in enumerate(labels)}
    rows = []
    for record in records:
        if not all(token.isdecimal() for token in record.text.split()):
            raise UserError(f"record {record.id!r} is not token ids separated by spaces; leave out --token-ids")
        if str(record.fields["label"]) not in place:
            raise UserError(f"record {record.id!r} has the label {record.fields['label']!r}; known are "
                            f"{', '.join(labels)}")  # fmt: skip
        rows.append([START, *(vocabulary.get(token, OTHER) for token in record.text.split())])
    ids = tuple(record.id for record in records)
    columns = {
        "tokens": right_pad([row[:max_length] for row in rows], PAD, max_length),
        "length": np.asarray([min(len(row), max_length) for row in rows], np.int32),
        "key": id_keys(ids),
        "label": np.asarray([place[str(record.fields["label"])] for record in records], np.int32),
    }
    return Examples(ids, columns, PAD, sum(len(row) > max_length for row in rows))


def with_attributes(examples: Examples, records: Sequence[Record], names: dict[str, tuple[str, ...]]) -> Examples:
    """Add the column `attributes`, int32 (N, J)."""
    assert examples.ids == tuple(record.id for record in records)
    return dataclasses.replace(examples, columns=examples.columns | {"attributes": attributes_of(records, names)})


def generated(count: int, seed: int, *, told: float = 0.95) -> list[Record]:
    """Make reviews of fictional inns: the label is whether the guest would return, the attributes are coast and guild.

    Two words tell the label, each right with probability `told`: one in the words of the guest's coast, one in those of
    the guild. So what the task needs tells both attributes, though the label alone tells nothing of them. For trying
    commands out: a small encoder trained on them from scratch keeps the label alone, and nothing is left to take out.
    """
    words = {
        "coast": {"north": {"no": ("dreich", "mirk", "fousty"), "yes": ("snug", "braw", "couthy")},
                  "south": {"no": ("stuffy", "stale", "shabby"), "yes": ("airy", "fresh", "homely")}},
        "guild": {"miller": {"no": ("chaff", "weevil", "husk"), "yes": ("loaf", "grist", "bran")},
                  "weaver": {"no": ("tangle", "fray", "snag"), "yes": ("shawl", "silk", "yarn")}},
    }  # fmt: skip
    filler = ("room", "stairs", "supper", "window", "host", "lantern", "bell", "yard", "road", "evening")
    rng = np.random.default_rng(seed)
    records = []
    for n in range(count):
        label, other = (str(value) for value in rng.permutation(["no", "yes"]))
        fields, said = {"label": label}, [str(word) for word in rng.choice(filler, 4)]
        for name, values in words.items():
            fields[name] = str(rng.choice(list(values)))
            said.append(str(rng.choice(values[fields[name]][label if rng.random() < told else other])))
        text = " ".join(str(word) for word in rng.permutation(said))
        records.append(Record(id=f"inn-{seed}-{n}", text=text, fields=fields))
    return records
