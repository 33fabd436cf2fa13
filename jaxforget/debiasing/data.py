"""Records -> examples with a task label and attributes. Shapes: N examples, J attributes, T tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxforget.data.sampling import hash64, id_keys, order
from jaxforget.data.sources import Record, content_id
from jaxforget.data.tokens import Examples, right_pad
from jaxforget.errors import UserError

SETS = ("train", "valid", "test")
SPLIT = 0x53504C54  # what a hash is for
PAD, START, OTHER = 0, 1, 2  # ids of a vocabulary made of token ids: padding, the first token, and rare ones


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


def unique(records: Sequence[Record]) -> list[Record]:
    """Give records of several sources that say the same ids of their own: "-2", "-3", in the order they come."""
    seen: Counter[str] = Counter()
    result = []
    for record in records:
        seen[record.id] += 1
        number = seen[record.id]
        result.append(record if number == 1 else dataclasses.replace(record, id=f"{record.id}-{number}"))
    taken = Counter(record.id for record in result)
    if twice := [identity for identity, count in taken.items() if count > 1]:
        raise UserError(f"two records have the id {twice[0]!r}; give each one an id of its own")
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


def token_examples(records: Sequence[Record], vocabulary: dict[str, int], max_length: int) -> Examples:
    """Encode records whose text is token ids: START and then what the vocabulary makes of them, cut to max_length."""
    rows = [[START, *(vocabulary.get(token, OTHER) for token in record.text.split())] for record in records]
    ids = tuple(record.id for record in records)
    columns = {
        "tokens": right_pad([row[:max_length] for row in rows], PAD, max_length),
        "length": np.asarray([min(len(row), max_length) for row in rows], np.int32),
        "key": id_keys(ids),
    }
    return Examples(ids, columns, PAD, sum(len(row) > max_length for row in rows))


def with_attributes(examples: Examples, records: Sequence[Record], names: dict[str, tuple[str, ...]]) -> Examples:
    """Add the column `attributes`, int32 (N, J)."""
    assert examples.ids == tuple(record.id for record in records)
    return dataclasses.replace(examples, columns=examples.columns | {"attributes": attributes_of(records, names)})
