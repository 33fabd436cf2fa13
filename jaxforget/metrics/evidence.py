"""What metrics ask of a model, and its answers: scored texts, continued prompts, gradient norms.

Metrics ask for all they need by name; a model then answers in few programs, and metrics are NumPy on the answers. Rows
of all sets go through the model together, in widths of 32 and its doubles. Shapes: N examples, B batch, T tokens, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig, encode
from jaxforget.data.tokens import IGNORED, Examples, concatenate, pad_id_of
from jaxforget.errors import UserError
from jaxforget.metrics.bias.generation import encode_prompts
from jaxforget.metrics.bias.scoring import AT_ONCE, width_of
from jaxforget.metrics.language import TokenScores, in_batches
from jaxforget.models import Model, Params, sharding
from jaxforget.models.generate import generate
from jaxforget.training.objectives import sequence_mean, token_logp


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a model is asked: its tokenizer, and how records become text."""

    model: Any
    tokenizer: Any
    text: TextConfig
    tell: Callable[[str], None] = lambda message: None
    encoded: dict[str, Examples] = dataclasses.field(default_factory=dict)  # sets so far, by name

    def encode(self, records: Sequence[Record], name: str) -> Examples:
        """Tokenise the records of a set for scoring, once."""
        if name not in self.encoded:
            self.encoded[name] = encode(records, self.tokenizer, self.text, context=self.model.max_length, where=name,
                                        tell=self.tell)  # fmt: skip
        return self.encoded[name]

    def prompt(self, question: str) -> str:
        """Return what the model reads before it answers a question."""
        return self.text.prompt_template.replace("{question}", question)


class Prompts(NamedTuple):
    """Prompts to continue greedily, and by how many tokens at most."""

    texts: list[str]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked, by name. Requests of one name are the same one."""

    scored: dict[str, Examples] = dataclasses.field(default_factory=dict)
    written: dict[str, Prompts] = dataclasses.field(default_factory=dict)
    gradients: dict[str, Examples] = dataclasses.field(default_factory=dict)

    def __or__(self, other: Request) -> Request:
        parts = (getattr(self, f.name) | getattr(other, f.name) for f in dataclasses.fields(self))
        return Request(*parts)


class Scored(NamedTuple):
    """Token scores of a set. z_NT: log p standardised by its mean and deviation under the model's own distribution."""

    examples: Examples
    scores: TokenScores
    z_NT: np.ndarray

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the scored tokens as text."""
        ids = [row[row != IGNORED].tolist() for row in self.examples.columns["labels"]]
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


class Evidence(NamedTuple):
    """Answers, by the names of the requests. gradients: see `gradient_norms`."""

    scored: Mapping[str, Scored]
    written: Mapping[str, list[str]]
    gradients: Mapping[str, np.ndarray]


def gather(reader: Reader, params: Params, request: Request, batch: int = 32) -> Evidence:
    """Answer a request. batch: rows at once, fewer where logits would fill memory."""
    params = sharding.place(params)
    model, scored = reader.model, {}
    for name, examples, (logp_NT, correct_NT, z_NT) in _together(_scorer(model), model, params, request.scored, batch):
        scored[name] = Scored(examples, TokenScores(logp_NT, correct_NT, examples.scored), z_NT)
    written = {name: write(reader, params, *prompts, batch) for name, prompts in request.written.items()}
    norms = _together(_norms(model), model, params, request.gradients, batch)
    return Evidence(scored, written, {name: norm_N for name, _, norm_N in norms})


def mean_losses(scored: Scored, records: Sequence[Record]) -> np.ndarray:
    """Return -log p a token of every record in nats, float64 (N,); NaN for a record without a token to score."""
    count_N, mask_NT = scored.scores.scored_NT.sum(axis=1), scored.scores.scored_NT
    loss_N = -np.where(mask_NT, scored.scores.logp_NT, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(count_N, 1)
    found = dict(zip(scored.examples.ids, np.where(count_N > 0, loss_N, np.nan), strict=True))
    return np.asarray([found.get(record.id, np.nan) for record in records], np.float64)


# ---------------------------------------------------------------------------------------------------- scoring
@functools.cache
def _scorer(model):
    @jax.jit
    def score(params, batch):
        logits_BTV = model.batch_logits(params, batch).astype(jnp.float32)
        logp_BT, scored_BT = token_logp(logits_BTV, batch["labels"])
        logp_BTV = jax.nn.log_softmax(logits_BTV)
        p_BTV = jnp.exp(logp_BTV)
        mean_BT = jnp.sum(p_BTV * logp_BTV, axis=-1)
        # The spread around the mean, not a difference of squares: float32 has no digits to lose.
        variance_BT = jnp.sum(p_BTV * jnp.square(logp_BTV - mean_BT[..., None]), axis=-1)
        z_BT = jnp.where(scored_BT, (logp_BT - mean_BT) / jnp.sqrt(jnp.maximum(variance_BT, 1e-6)), 0.0)
        return logp_BT, jnp.argmax(logits_BTV, axis=-1) == batch["labels"], z_BT

    return score


@functools.cache
def _norms(model):
    """Mean over parameter tensors, those of stacked layers apart, of the L2 norm of the gradient of the mean loss."""

    @jax.jit
    def norms(params, batch):
        def loss(params, row):
            logp_1T, scored_1T = token_logp(model.batch_logits(params, row), row["labels"])
            return -sequence_mean(logp_1T, scored_1T)[0]

        def one(row):
            grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], row))
            parts = []
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
                kept = int(path[0].key in model.config.stacks)
                parts.append(jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(kept, leaf.ndim)))).reshape(-1))
            return jnp.mean(jnp.concatenate(parts))

        return jax.lax.map(one, batch)

    return norms


def _together(
    function: Callable[..., Any], model: Model, params: Params, sets: Mapping[str, Examples], batch: int
) -> Iterator[tuple[str, Examples, Any]]:
    """Yield (name, examples, arrays) for every set: all rows of a width go through the function together."""
    if not sets:
        return
    whole = concatenate(list(sets.values()))
    longest = whole.columns["tokens"].shape[1]
    widths_N = np.asarray([width_of(int(length), longest) for length in whole.lengths])
    order, parts = [], []
    for T in sorted(set(widths_N.tolist())):
        part = whole.take(rows := np.flatnonzero(widths_N == T))
        columns = {n: column[:, :T] if column.ndim == 2 else column for n, column in part.columns.items()}
        size = max(1, min(batch, AT_ONCE // (T * model.vocab_size), 1 << (len(rows) - 1).bit_length()))
        found = in_batches(function, params, dataclasses.replace(part, columns=columns), size)
        order.append(rows)
        parts.append(jax.tree.map(functools.partial(_widened, width=longest), found))
    back = np.argsort(np.concatenate(order))
    arrays, start = jax.tree.map(lambda *several: np.concatenate(several)[back], *parts), 0
    for name, examples in sets.items():
        mine, T = slice(start, start + len(examples)), examples.columns["tokens"].shape[1]
        yield name, examples, jax.tree.map(functools.partial(_cut, rows=mine, width=T), arrays)
        start += len(examples)


def _widened(x: np.ndarray, width: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim == 2 else x


def _cut(x: np.ndarray, rows: slice, width: int) -> np.ndarray:
    return x[rows, :width] if x.ndim == 2 else x[rows]


# ---------------------------------------------------------------------------------------------------- writing
def ask_to_write(reader: Reader, texts: Sequence[str], max_new_tokens: int, where: str) -> Prompts:
    """Check that prompts fit and return them; where the context is short, so is what may be written.

    Raises UserError for a prompt that leaves no room.
    """
    texts = list(texts)
    longest = max(map(len, encode_prompts(reader.model, reader.tokenizer, texts, 1)))
    room = reader.model.max_length - longest
    if room < max_new_tokens:
        reader.tell(f"{where}: prompts of up to {longest} tokens leave room for {room} of {max_new_tokens} new tokens")
    return Prompts(texts, min(room, max_new_tokens))


def write(reader: Reader, params: Params, prompts: Sequence[str], max_new_tokens: int, batch: int = 32) -> list[str]:
    """Continue prompts greedily until EOS; return what was written, without special tokens."""
    model, tokenizer = reader.model, reader.tokenizer
    eos, pad = tokenizer.eos_token_id, pad_id_of(tokenizer)
    unique = list(dict.fromkeys(prompts))
    rows = encode_prompts(model, tokenizer, unique, max_new_tokens)
    widths: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        widths.setdefault(width_of(len(row), model.max_length - max_new_tokens), []).append(n)
    texts = {}
    for T, members in sorted(widths.items()):
        size = min(batch, 1 << (len(members) - 1).bit_length())
        for at in range(0, len(members), size):
            part = members[at : at + size]
            # One row more, unread and as wide as can be: every batch is then of one shape, hence one program.
            rows_B = size + 1 + -(size + 1) % sharding.size(*sharding.ROWS)
            tokens, mask = np.full((rows_B, T), pad, np.int32), np.ones((rows_B, T), bool)
            for b, n in enumerate(part):
                tokens[b, : len(rows[n])], mask[b, len(rows[n]) :] = rows[n], False
            wanted = np.arange(len(tokens)) < len(part)
            new = generate(model, params, tokens, mask, max_new_tokens=max_new_tokens, eos_id=eos, pad_id=pad,
                           wanted_B=wanted)  # fmt: skip
            for n, ids in zip(part, sharding.host(new).tolist(), strict=False):
                ids = ids[: ids.index(eos)] if eos in ids else ids
                texts[unique[n]] = tokenizer.decode(ids, skip_special_tokens=True)
    return [texts[prompt] for prompt in prompts]


def require_questions(records: Sequence[Record], where: str, metric: str) -> None:
    """Raise UserError unless all records are questions with answers."""
    if any(record.prompt is None for record in records):
        raise UserError(f"--{where.replace('_', '-')} is plain text; metric {metric} needs questions with answers")
