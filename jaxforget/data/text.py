"""From a `--data`-like flag to examples: which columns to read and how to tokenise, as flags every command shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxforget import checks
from jaxforget.data.sources import Record, read_records
from jaxforget.data.tasks import classify, maskable, pairs
from jaxforget.data.tokens import Examples, tokenize
from jaxforget.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How records are read and tokenised."""

    text_field: str | None = None
    """Column with plain text. Without field flags: question + answer, prompt + answer, else text."""
    question_field: str | None = None
    """Column with the question (not scored)."""
    answer_field: str | None = None
    """Column with the answer (scored)."""
    id_field: str | None = None
    """Column with a unique id; without it an id is a digest of the content."""
    label_field: str | None = None
    """Column with the class (--task classification); "label" when not given."""
    limit: int | None = None
    """Read at most this many records of each source."""
    max_length: int | None = None
    """Longest example in tokens; the model's context when not given."""
    text_mode: Literal["truncate", "split", "pack"] = "truncate"
    """Plain text: one example a record, non-overlapping chunks of it, or documents packed into full blocks."""
    prompt_template: str = "Question: {question}\nAnswer:"
    """What the model reads before an answer."""

    def __post_init__(self):
        checks.at_least(1, named="--", limit=self.limit)
        checks.at_least(2, named="--", max_length=self.max_length)


def read(source: str, config: TextConfig) -> list[Record]:
    """Read one source with the configured columns."""
    return read_records(
        source,
        text_field=config.text_field,
        question_field=config.question_field,
        answer_field=config.answer_field,
        id_field=config.id_field,
        label_field=config.label_field,
        limit=config.limit,
    )


def tokenizer_texts(records: Sequence[Record], config: TextConfig) -> list[str]:
    """Return the texts that a tokenizer for these records is trained on: prompts as the model reads them, and texts."""
    prompts = [config.prompt_template.replace("{question}", record.prompt) for record in records if record.prompt]
    return prompts + [f" {record.text}" if record.prompt else record.text for record in records]


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    config: TextConfig,
    *,
    context: int,
    where: str,
    tell: Callable[[str], None],
    task: str = "causal",
    labels: Sequence[str] = (),
    start_id: int = 0,
) -> Examples:
    """Tokenise records for a task, to the model's context, and tell the user what had to be cut or dropped.

    labels: the class names of a classification head. start_id: the token a seq2seq decoder begins with. Raises
    UserError when `max_length` exceeds the context or nothing is left.
    """
    longest = config.max_length or context
    if longest > context:
        raise UserError(f"--max-length is {longest}, but the model's context is {context} tokens")
    if task != "causal" and config.text_mode != "truncate":
        raise UserError(f"--text-mode {config.text_mode} is for --task causal; {task} reads whole records")
    if task == "classification":
        examples = classify(records, tokenizer, labels, max_length=longest, where=where)
    elif task == "masked":
        examples = maskable(records, tokenizer, max_length=longest)
    elif task == "seq2seq":
        examples = pairs(records, tokenizer, max_length=longest, start_id=start_id,
                         prompt_template=config.prompt_template)  # fmt: skip
    else:
        examples = tokenize(
            records, tokenizer, max_length=longest, text_mode=config.text_mode, prompt_template=config.prompt_template
        )
    if examples.truncated:
        tell(f"{where}: {examples.truncated} of {len(records)} records are longer than {longest} tokens; truncated")
    if examples.dropped:
        tell(f"{where}: {examples.dropped} records or chunks have too few tokens to score; dropped")
    if not len(examples):
        raise UserError(f"{where}: no record has a token to score")
    return examples
