"""Other answers to the questions to forget: refusals, a field of the records, alternatives of the starting model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxforget.data.sampling import hash64
from jaxforget.data.sources import Record
from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.models.sharding import host
from jaxforget.unlearning.recipe import Setting
from jaxforget.unlearning.reference import stored

REFUSALS = Path(__file__).with_name("refusals.txt")
DRAW, SAMPLE = 0x49444B, 0x414C54  # what a hash and a key are for
TRIES = 16


def questions(setting: Setting) -> list[Record]:
    """Return the forget records in the order of the examples. Raises UserError unless all are questions."""
    by_id = {record.id: record for record in setting.records}
    for record in setting.records:
        if record.prompt is None:
            raise UserError(f"needs questions and answers, but forget record {record.id!r} is plain text")
    return [by_id[identity] for identity in setting.sets["forget"].ids]


def answered(records: Sequence[Record], texts: Sequence[str]) -> list[Record]:
    """Return the records with other answers."""
    return [dataclasses.replace(record, text=text) for record, text in zip(records, texts, strict=True)]


def refusals() -> list[str]:
    """Return the built-in sentences that say that nothing is known."""
    return REFUSALS.read_text(encoding="utf-8").splitlines()


def refused(setting: Setting) -> list[Record]:
    """Answer every forget question with a refusal: a function of (seed, example id), the same at every visit."""
    sentences = refusals()
    draw_N = hash64(setting.seed, setting.sets["forget"].columns["key"], DRAW) % np.uint64(len(sentences))
    return answered(questions(setting), [sentences[int(draw)] for draw in draw_N])


def has_field(setting: Setting, field: str) -> bool:
    """Say whether any forget record has the field."""
    return any(_other_answer(record, field) is not None for record in setting.records)


def from_field(setting: Setting, field: str) -> list[Record]:
    """Answer every forget question with a field of its record, of a list the first. Raises UserError naming both."""
    records = questions(setting)
    texts = [_other_answer(record, field) for record in records]
    for record, text in zip(records, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"needs another answer, but forget record {record.id!r} has no text in field {field!r}")
    return answered(records, texts)


def _other_answer(record: Record, field: str) -> Any:
    found = record.fields.get(field, record.fields.get(f"{field}s"))  # the generated corpus has the plural
    return found[0] if isinstance(found, (list, tuple)) and found else found


def generated(setting: Setting, temperature: float, max_new_tokens: int) -> list[Record]:
    """Answer every forget question by sampling from the starting model, until another answer comes out.

    Each further try is a quarter hotter. What is drawn depends on (seed, example id, try). Raises UserError where all
    TRIES give the answer to forget.
    """
    records, forget = questions(setting), setting.sets["forget"]

    def compute():
        return {"text": np.asarray(_sampled(setting, records, temperature, max_new_tokens))}

    how = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": setting.seed}
    texts = stored(setting, "alternatives", forget, compute, answers=[record.text for record in records], **how)
    return answered(records, [str(text) for text in texts["text"]])


def _sampled(setting: Setting, records: Sequence[Record], temperature: float, max_new_tokens: int) -> list[str]:
    from jaxforget.models import generate

    forget, tokenizer = setting.sets["forget"], setting.tokenizer
    scored_NT = forget.columns["labels"] != IGNORED
    prompt_N = scored_NT.argmax(axis=1) + 1  # the first scored position is the prompt's last token
    longest = max(1, min(max_new_tokens, setting.model.max_length - int(prompt_N.max())))
    key_N = (forget.columns["key"] >> np.uint64(32)).astype(np.uint32)
    texts: list[str | None] = [None] * len(records)
    size, widest = min(32, len(records)), int(prompt_N.argmax())
    for n in range(TRIES):
        wanted = [i for i, text in enumerate(texts) if text is None]
        if not wanted:
            break
        for start in range(0, len(wanted), size):
            part = wanted[start : start + size]
            # The widest prompt fills up, unread: every batch is of one shape, hence one program.
            rows_B = np.asarray(part + [widest] * (size + 1 - len(part)))
            mask_BT = np.arange(scored_NT.shape[1])[None] < prompt_N[rows_B][:, None]
            drawn_BN = generate(
                setting.model, setting.params, forget.columns["tokens"][rows_B], mask_BT,
                max_new_tokens=longest, temperature=temperature + 0.25 * n, row_ids=key_N[rows_B],
                key=jax.random.fold_in(jax.random.fold_in(jax.random.key(setting.seed), SAMPLE), n),
                eos_id=tokenizer.eos_token_id, pad_id=forget.pad_id, wanted_B=np.arange(size + 1) < len(part),
            )  # fmt: skip
            for i, row in zip(part, host(drawn_BN), strict=False):
                text = tokenizer.decode(row[row != forget.pad_id], skip_special_tokens=True).strip()
                texts[i] = text if text and text != records[i].text.strip() else None
    found = [text for text in texts if text is not None]
    if len(found) < len(texts):
        record = records[texts.index(None)]
        raise UserError(
            f"the starting model gives nothing but the answer to forget record {record.id!r} in {TRIES} tries; "
            "raise temperature, or give the records a field with other answers"
        )
    return found
