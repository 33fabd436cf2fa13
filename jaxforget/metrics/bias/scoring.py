"""Log-probabilities of sentences, causal and masked. Shapes: S sentences, T tokens, V vocabulary.

Sentences become rows of a few widths, 32 and its doubles, so that few programs are compiled. Equal sentences are scored
once: they tie exactly, whatever rounding does. Log-probabilities of tokens are float32, in nats; sums are float64.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import IGNORED, Examples, pad_id_of
from jaxforget.errors import UserError
from jaxforget.metrics.language import token_scores
from jaxforget.models import Model, Params

SHORTEST = 32  # width of the narrowest rows
AT_ONCE = 2**26  # logits of a batch


class Scores(NamedTuple):
    """What a sentence scores. A sentence that cannot be scored, too long or without a token, has count 0."""

    sum_S: np.ndarray  # nats
    count_S: np.ndarray  # tokens

    @property
    def mean_S(self) -> np.ndarray:
        """Nats a token."""
        return self.sum_S / np.maximum(self.count_S, 1)


class Row(NamedTuple):
    """Tokens to read, what to predict where, and the segments where the model has them."""

    tokens: Sequence[int]
    labels: dict[int, int]  # position -> token
    segments: Sequence[int] | None = None


def start_id(tokenizer: Any, name: str) -> int:
    """Return the token that begins a text: BOS, else EOS (GPT-2's <|endoftext|>). Raises UserError without either."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(f"{name}: the tokenizer has neither a BOS nor an EOS token to begin a sentence with")
    return found


def causal_scores(
    model: Model,
    params: Params,
    tokenizer: Any,
    sentences: Sequence[tuple[str, str]],
    *,
    start: int,
    always: bool = False,
) -> Scores:
    """Score sentences, given as (context, sentence): log p(sentence | context), the context may be empty.

    always: False is the rule of StereoSet's code (eval_generative_models.py): log p of a first token comes from the
    start token alone, and those of the others from the sentence without it. True: the start token stands before all.
    A context and its sentence are joined by a space; tokens after those they share with the context alone are scored.
    """
    unique = list(dict.fromkeys(sentences))
    place = {sentence: index for index, sentence in enumerate(unique)}
    whole = _encode(tokenizer, [f"{context} {text}" if context else text for context, text in unique])
    context = _encode(tokenizer, [context for context, _ in unique])
    prefix, rows, first_S = [start] * always, [], []
    for tokens, given in zip(whole, context, strict=True):
        shared = next((n for n, (a, b) in enumerate(zip(tokens, given)) if a != b), min(len(tokens), len(given)))
        begin = max(shared, 1 - always)  # without a start token nothing predicts the first
        at = begin + always - 1
        rows.append(Row(prefix + tokens, dict(enumerate(tokens[begin:], at))))
        first_S.append(tokens[0] if tokens and shared == 0 and not always else IGNORED)
    sums, counts = _score(model, params, rows, pad_id_of(tokenizer))
    first = np.asarray(first_S)
    fits = np.asarray([0 < len(row.tokens) <= model.max_length for row in rows])
    alone = fits & (first != IGNORED)
    start_V = _after(model, params, start)
    sums, counts = sums + np.where(alone, start_V[np.where(alone, first, 0)], 0.0), counts + alone
    index = [place[sentence] for sentence in sentences]
    return Scores(sums[index], counts[index])


def masked_scores(
    model: Model, params: Params, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, changed: bool
) -> Scores:
    """Score both sentences of pairs by log p(token | the rest, that token masked); first sentences, then second ones.

    changed: False scores the tokens both have in common, without the first and the last of them, which are special
    (Nangia et al., arXiv 2010.00133, metric.py); True the tokens that differ (bias-bench, crows.py). A pair without a
    token to score on either side has count 0 on both.
    """
    unique = list(dict.fromkeys(pairs))
    place = {pair: index for index, pair in enumerate(unique)}
    sides = [tokenizer([pair[side] for pair in unique], return_attention_mask=False, verbose=False) for side in (0, 1)]
    rows: dict[tuple, tuple[int, Row]] = {}  # equal rows are scored once
    owner = []
    for index, ids in enumerate(zip(*(side["input_ids"] for side in sides), strict=True)):
        chosen = masked_positions(*ids, changed=changed)
        if not all(chosen) or max(map(len, ids)) > model.max_length:
            continue
        for side, (tokens, positions) in enumerate(zip(ids, chosen, strict=True)):
            segments = sides[side]["token_type_ids"][index] if "token_type_ids" in sides[side] else None
            for at in positions:
                hidden = (*tokens[:at], tokenizer.mask_token_id, *tokens[at + 1 :])
                key = hidden, at, tokens[at]
                number, _ = rows.setdefault(key, (len(rows), Row(hidden, {at: tokens[at]}, segments)))
                owner.append((side * len(unique) + index, number))
    logp, _ = _score(model, params, [row for _, row in rows.values()], pad_id_of(tokenizer))
    sums, counts = np.zeros(2 * len(unique)), np.zeros(2 * len(unique), np.int64)
    for sentence, number in owner:
        sums[sentence] += logp[number]
        counts[sentence] += 1
    first = np.asarray([place[pair] for pair in pairs])
    both = np.concatenate([first, first + len(unique)])
    return Scores(sums[both], counts[both])


def masked_positions(one: Sequence[int], other: Sequence[int], *, changed: bool) -> tuple[list[int], list[int]]:
    """Return the positions to score in each of two token sequences, by the blocks of difflib's matcher; see above."""
    blocks = difflib.SequenceMatcher(None, list(map(str, one)), list(map(str, other))).get_opcodes()
    chosen = [block[1:] for block in blocks if (block[0] == "equal") != changed]
    positions = (
        [at for start, end, _, _ in chosen for at in range(start, end)],
        [at for _, _, start, end in chosen for at in range(start, end)],
    )
    return positions if changed else (positions[0][1:-1], positions[1][1:-1])


def width_of(length: int, longest: int) -> int:
    """Return the width of the rows that a sequence is put into: 32 or a double of it, at most `longest`."""
    width = SHORTEST
    while width < length:
        width *= 2
    return min(width, longest)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _score(model: Model, params: Params, rows: Sequence[Row], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of log p of a row's labels and their number; rows beyond the model's context have 0 of both."""
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    widths: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        if row.labels and len(row.tokens) <= model.max_length:
            widths.setdefault(width_of(len(row.tokens), model.max_length), []).append(n)
    for T, members in sorted(widths.items()):
        tokens, labels = np.full((len(members), T), pad_id, np.int32), np.full((len(members), T), IGNORED, np.int32)
        columns = {"tokens": tokens, "labels": labels}
        columns["length"] = np.asarray([len(rows[n].tokens) for n in members], np.int32)
        if rows[members[0]].segments is not None:
            columns["segments"] = np.zeros((len(members), T), np.int32)
        for m, n in enumerate(members):
            segments = rows[n].segments
            tokens[m, : len(rows[n].tokens)] = rows[n].tokens
            labels[m, list(rows[n].labels)] = list(rows[n].labels.values())
            if segments is not None:
                columns["segments"][m, : len(rows[n].tokens)] = segments
        batch = max(1, min(64, AT_ONCE // (T * model.vocab_size)))
        found = token_scores(model, params, Examples(tuple(map(str, members)), columns, pad_id), batch)
        sums[members] = found.logp_NT.sum(axis=1, dtype=np.float64)
        counts[members] = found.scored_NT.sum(axis=1)
    return sums, counts


@functools.cache
def _first(model):
    return jax.jit(lambda params, tokens_BT: jax.nn.log_softmax(model.logits(params, tokens_BT)[0, 0]))


def _after(model: Model, params: Params, start: int) -> np.ndarray:
    """Return log p of every token after the start token alone, (V,)."""
    return np.asarray(_first(model)(jax.tree.map(jnp.asarray, params), np.asarray([[start]], np.int32)), np.float64)
