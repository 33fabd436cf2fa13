"""Records with a label and attributes -> three sets of examples. Shapes: N examples, J attributes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import hash64, id_keys, order
from jaxforget.data.sources import Record, content_id
from jaxforget.data.text import TextConfig, encode, read
from jaxforget.data.tokens import Examples
from jaxforget.debiasing.token_ids import classify_tokens
from jaxforget.errors import UserError
from jaxforget.models import Model

SETS = ("train", "valid", "test")
SPLIT = 0x53504C54  # what a hash is for


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled records with attributes, and how they are dealt to three sets."""

    data: tuple[str, ...] = ()
    """Records: .jsonl[.gz], .json, .csv, .tsv, .parquet files or hub names. Default: generated reviews."""
    valid: str | None = None
    """Records that attackers are chosen on; dealt from --data when not given."""
    test: str | None = None
    """Records that everything is reported on; dealt from --data when not given."""
    attributes: tuple[str, ...] = ()
    """Columns with protected attributes. Generated reviews have coast and guild."""
    unknown: tuple[str, ...] = ("", "x", "None")
    """Values of an attribute that mean it is not known; such records teach the task alone."""
    balance: bool = False
    """Keep as many records of every combination of attributes within a class, so that labels tell nothing of them."""
    known: bool = False
    """Keep only records whose attributes are all known."""
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of training, validation and test records; what says the same is dealt to the same set."""
    split_seed: int = 0
    """Seed of the deal and of --balance."""
    token_ids: bool = False
    """The text is token ids, separated by spaces; there is no tokenizer."""
    records: int = 3000
    """Generated reviews."""

    def __post_init__(self):
        checks.at_least(1, named="--", records=self.records)


def read_sets(
    config: DataConfig, text: TextConfig
) -> tuple[dict[str, list[Record]], dict[str, tuple[str, ...]], TextConfig]:
    """Read and deal the records; returns the sets, the values of every attribute, and the columns that were read."""
    attributes = config.attributes
    if config.data:
        text = dataclasses.replace(text, label_field=text.label_field or "label")
        if not attributes:
            raise UserError("--attributes is missing; name the columns with protected attributes")
        if bool(config.valid) != bool(config.test):
            raise UserError("--valid and --test go together; without them --data is dealt to three sets")
        records = [record for source in config.data for record in read(source, text)]
        records = by_content(records) if text.id_field is None else records
    else:
        if config.valid or config.test or config.token_ids:
            raise UserError("--valid, --test and --token-ids need --data")
        records, attributes = generated(config.records, config.split_seed), attributes or ("coast", "guild")
    if config.test:
        sets = {"train": records} | {name: read(getattr(config, name), text) for name in ("valid", "test")}
    else:
        sets = split_by_content(records, config.split, config.split_seed)
    names = attribute_names([record for part in sets.values() for record in part], attributes, config.unknown)
    if config.known and not config.balance:
        sets = {name: [r for r in part if all(str(r.fields[a]) in v for a, v in names.items())]
                for name, part in sets.items()}  # fmt: skip
    if config.balance:
        sets = {name: balanced(part, names, config.split_seed) for name, part in sets.items()}
    for name, part in sets.items():
        if not part:
            raise UserError(f"the {name} set is empty; give more records, or other shares in --split")
        try:  # what is missing here would be missed when attackers train, after hours
            attribute_names(part, attributes, config.unknown)
        except UserError as error:
            raise UserError(f"in the {name} set {error}") from None
    return sets, names, text


def encode_sets(
    sets: Mapping[str, Sequence[Record]],
    names: dict[str, tuple[str, ...]],
    text: TextConfig,
    model: Model,
    tokenizer: Any,
    vocabulary: dict[str, int] | None,
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Examples]:
    """Encode every set for a classifier: by its tokenizer, or by the vocabulary of its token ids."""
    labels, result = model.config.labels, {}
    for name, records in sets.items():
        if vocabulary is not None:
            examples = classify_tokens(records, vocabulary, labels, min(text.max_length or 10**9, model.max_length))
        else:
            examples = encode(records, tokenizer, text, context=model.max_length, where=name, tell=tell,
                              task="classification", labels=labels)  # fmt: skip
        result[name] = with_attributes(examples, records, names)
    return result


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
