"""Texts that are token ids, without a tokenizer: a vocabulary of the commonest, and classifiers that read it.

Shapes: N examples, T tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.data.tokens import Examples, right_pad
from jaxforget.errors import UserError
from jaxforget.models import Model, Params
from jaxforget.models.hub import read_json
from jaxforget.models.model import build, family_of
from jaxforget.models.sharding import resting
from jaxforget.training.start import ComputeConfig, SizeConfig, Start, scratch_config

PAD, START, OTHER = 0, 1, 2  # padding, the first token of every text, and rare ones
TOKENS = "token_ids.json"  # the vocabulary's file in a model directory


def token_vocabulary(records: Sequence[Record], size: int) -> dict[str, int]:
    """Number the commonest token ids of records that are ids, from 3 on; the others are one token."""
    checks.at_least(4, vocab_size=size)
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


def scratch_tokens(
    size: SizeConfig, compute: ComputeConfig, vocabulary: dict[str, int], labels: Sequence[str]
) -> Start:
    """Make a classifier for texts of token ids."""
    family = size.family or "bert"
    special = SimpleNamespace(pad_token_id=PAD, bos_token_id=START, eos_token_id=None)
    raw = scratch_config(size, family, 3 + len(vocabulary), special)
    heads = family_of(family).ARCHITECTURES[family]
    if "classification" not in heads:
        raise UserError(f"--size.family {family} has no classification head")
    raw |= {"architectures": [heads["classification"]], "id2label": {str(i): name for i, name in enumerate(labels)}}
    model = compute.apply(build(family_of(family).Config.from_hf(raw)))

    def draw(seed: int) -> Params:
        return resting(model.init(jax.random.fold_in(jax.random.key(seed), 1)))

    return tokens_start(model, draw, vocabulary)


def tokens_start(model: Model, params: Callable[[int], Any], vocabulary: dict[str, int]) -> Start:
    """Start from a classifier of token ids; its directories keep the vocabulary."""

    def save(directory: Path) -> None:
        (directory / TOKENS).write_text(json.dumps(vocabulary) + "\n", encoding="utf-8")

    return Start(model, params, None, save)
