"""Records -> padded arrays for classes, masked tokens, and pairs of source and target. N examples, T tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.data.tokens import IGNORED, Examples, pad_id_of, right_pad
from jaxforget.errors import UserError


def class_names(records: Sequence[Record], where: str) -> tuple[str, ...]:
    """Return the different labels of the records, numbers in numeric order, else alphabetically."""
    names = {_label(record, where) for record in records}
    if len(names) < 2:
        raise UserError(f"{where}: all {len(records)} records have the label {min(names)!r}; two or more are needed")
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if numeric else str))


def classify(
    records: Sequence[Record], tokenizer: Any, names: Sequence[str], *, max_length: int, where: str = "records"
) -> Examples:
    """Encode texts, or pairs of prompt and text, with their class.

    columns: tokens, length, key as for `tokenize`; label int32 (N,), the position in `names`; segments int32 (N, T)
    where the tokenizer makes them. Texts are encoded as the tokenizer does by default and cut to max_length, special
    tokens kept. Raises UserError for a label that is not among the names.
    """
    place = {name: index for index, name in enumerate(names)}
    labels = []
    for record in records:
        name = _label(record, where)
        if name not in place:
            raise UserError(f"{where}: record {record.id!r} has the label {name!r}; known are {', '.join(names)}")
        labels.append(place[name])
    encoded = _encode(records, tokenizer, max_length)
    columns = encoded.columns | {"label": np.asarray(labels, np.int32)}
    return Examples(encoded.ids, columns, encoded.pad_id, encoded.truncated)


def maskable(records: Sequence[Record], tokenizer: Any, *, max_length: int) -> Examples:
    """Encode texts, or prompt and text joined, for masked-token prediction; what is masked is drawn at every visit.

    columns: as for `tokenize`, but labels[n, t] is the token at position t itself, -100 where it is special. Raises
    UserError when the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError("task masked needs a tokenizer with a mask token; this one has none")
    joined = [dataclasses.replace(r, prompt=None, text=f"{r.prompt} {r.text}") if r.prompt else r for r in records]
    encoded = _encode(joined, tokenizer, max_length)
    tokens_NT = encoded.columns["tokens"]
    special_NT = np.isin(tokens_NT, tokenizer.all_special_ids)
    special_NT |= np.arange(tokens_NT.shape[1])[None] >= encoded.lengths[:, None]
    labels_NT = np.where(special_NT, IGNORED, tokens_NT).astype(np.int32)
    kept = np.flatnonzero((labels_NT != IGNORED).any(axis=1))
    whole = Examples(encoded.ids, encoded.columns | {"labels": labels_NT}, encoded.pad_id)
    chosen = whole.take(kept)
    return Examples(chosen.ids, chosen.columns, encoded.pad_id, encoded.truncated, len(whole) - len(kept))


def pairs(
    records: Sequence[Record], tokenizer: Any, *, max_length: int, start_id: int, prompt_template: str = "{question}"
) -> Examples:
    """Encode prompts as the source and texts as the target of an encoder-decoder.

    columns: tokens, length, key of the source; decoder_tokens int32 (N, T'), start_id and then the target without its
    last token; labels int32 (N, T'), the target, -100 in padding. Both end with EOS where the tokenizer has one, and
    are cut to max_length. Raises UserError for a record without a prompt.
    """
    for record in records:
        if record.prompt is None:
            raise UserError(f"task seq2seq needs a question and an answer; record {record.id!r} is plain text")
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ended(texts):
        rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        rows = [row if row[-1:] == eos else row + eos for row in rows]
        cut = [row if len(row) <= max_length else row[: max_length - len(eos)] + eos for row in rows]
        return cut, np.asarray([len(row) > max_length for row in rows], bool)

    sources, long_source = ended([prompt_template.replace("{question}", record.question) for record in records])
    targets, long_target = ended([record.text for record in records])
    pad_id, ids = pad_id_of(tokenizer), tuple(record.id for record in records)
    columns = {
        "tokens": right_pad(sources, pad_id, max_length),
        "length": np.asarray([len(row) for row in sources], np.int32),
        "key": id_keys(ids),
        "decoder_tokens": right_pad([[start_id] + row[:-1] for row in targets], pad_id, max_length),
        "labels": right_pad(targets, IGNORED, max_length),
    }
    return Examples(ids, columns, pad_id, int((long_source | long_target).sum()))


def _label(record: Record, where: str) -> str:
    value = record.fields.get("label")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: record {record.id!r} has the label {value!r}; it must be text or a whole number")
    return str(value)


def _encode(records: Sequence[Record], tokenizer: Any, max_length: int) -> Examples:
    texts = [record.text if record.prompt is None else (record.prompt, record.text) for record in records]
    if any(record.prompt is None for record in records) and any(record.prompt is not None for record in records):
        raise UserError("some records have a question and others are plain text; a model reads one kind")
    out = tokenizer(texts, return_attention_mask=False, verbose=False, truncation=True, max_length=max_length)
    full = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    ids = tuple(record.id for record in records)
    columns = {
        "tokens": right_pad(out["input_ids"], pad_id_of(tokenizer), max_length),
        "length": np.asarray([len(row) for row in out["input_ids"]], np.int32),
        "key": id_keys(ids),
    }
    if any(any(row) for row in out.get("token_type_ids", ())):
        columns["segments"] = right_pad(out["token_type_ids"], 0, max_length)
    truncated = sum(len(a) > len(b) for a, b in zip(full, out["input_ids"], strict=True))
    return Examples(ids, columns, pad_id_of(tokenizer), truncated)
