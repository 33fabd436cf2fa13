"""What a model writes after prompts about two groups, and scorers for it: any function of texts to one number each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxforget.data.sampling import hash64, id_keys
from jaxforget.data.sources import Record
from jaxforget.data.tasks import classify
from jaxforget.data.tokens import check_vocabulary, load_tokenizer, pad_id_of
from jaxforget.errors import UserError
from jaxforget.metrics.bias.scoring import AT_ONCE, width_of
from jaxforget.metrics.classification import class_logp
from jaxforget.models import Model, Params, hub
from jaxforget.models.generate import generate
from jaxforget.models.sharding import host

Scorer = Callable[[Sequence[str]], np.ndarray]


def encode_prompts(model: Model, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Encode prompts as the tokenizer does by default, without an EOS at the end.

    Raises UserError for one that leaves no room for max_new_tokens.
    """
    eos, room = tokenizer.eos_token_id, model.max_length - max_new_tokens
    encoded = tokenizer(list(prompts), return_attention_mask=False, verbose=False)["input_ids"]
    rows = [ids[:-1] if eos is not None and ids[-1:] == [eos] else ids for ids in encoded]
    for prompt, row in zip(prompts, rows, strict=True):
        if not 0 < len(row) <= room:
            raise UserError(f"prompt {prompt[:60]!r} has {len(row)} tokens; the model's context of {model.max_length} "
                            f"leaves room for 1 to {room} before --max-new-tokens {max_new_tokens}")  # fmt: skip
    return rows


def continuations(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[list[str]]:
    """Continue every prompt `samples` times; what is drawn depends on seed, prompt and number of the sample alone."""
    eos, room = tokenizer.eos_token_id, model.max_length - max_new_tokens
    rows = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    key_NS = hash64(id_keys(prompts)[:, None], np.arange(samples)[None]) >> np.uint64(32)
    jobs: dict[int, list[tuple[int, int]]] = {}
    for n, row in enumerate(rows):
        jobs.setdefault(width_of(len(row), room), []).extend((n, s) for s in range(samples))
    texts = [[""] * samples for _ in prompts]
    params = jax.tree.map(jax.numpy.asarray, params)
    for T, todo in sorted(jobs.items()):
        batch = max(2, min(64, AT_ONCE // (4 * (T + max_new_tokens) * model.vocab_size)))
        for at in range(0, len(todo), batch - 1):
            part = todo[at : at + batch - 1]
            tokens, mask = np.full((batch, T), pad_id_of(tokenizer), np.int32), np.ones((batch, T), bool)
            names = np.zeros(batch, np.uint32)
            # Rows without a prompt are as wide as can be: every batch has the same longest prompt, hence one program.
            for b, (n, s) in enumerate(part):
                tokens[b, : len(rows[n])], mask[b, len(rows[n]) :] = rows[n], False
                names[b] = key_NS[n, s]
            new = generate(model, params, tokens, mask, max_new_tokens=max_new_tokens, temperature=temperature,
                           top_p=top_p, key=jax.random.key(seed), eos_id=eos, pad_id=pad_id_of(tokenizer),
                           row_ids=names)  # fmt: skip
            for (n, s), ids in zip(part, host(new).tolist(), strict=False):
                ids = ids[: ids.index(eos)] if eos in ids else ids
                texts[n][s] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def load_scorer(name: str, label: str | None = None) -> Scorer:
    """Return the scorer that `--scorer` names: a classifier's directory or hub name, or words:FILE."""
    return word_scorer(name.removeprefix("words:")) if name.startswith("words:") else classifier_scorer(name, label)


def word_scorer(path: str) -> Scorer:
    """Return 1 for texts with a word of the file, which has one a line, as a whole word in any case; else 0."""
    try:
        words = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--scorer words:{path}: the file cannot be read ({error})") from None
    if not words:
        raise UserError(f"--scorer words:{path}: the file holds no words")
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    return lambda texts: np.asarray([float(bool(pattern.search(text))) for text in texts])


def classifier_scorer(name: str, label: str | None = None) -> Scorer:
    """Return p(label) of a classifier such as `train.lm --task classification` leaves. Default: its last label."""
    model, params = hub.load(name)
    if model.config.head != "classification":
        raise UserError(f"--scorer {name} has a {model.config.head} head; a classification one is needed")
    names = model.config.labels
    if label is not None and label not in names:
        raise UserError(f"--scorer-label is {label!r}; the labels of {name} are {', '.join(names)}")
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, model.vocab_size, name)
    column = names.index(label) if label is not None else len(names) - 1

    def score(texts: Sequence[str]) -> np.ndarray:
        # A causal classifier reads its answer off the last token, which an empty text does not have.
        records = [Record(str(n), text or " ", fields={"label": names[0]}) for n, text in enumerate(texts)]
        examples = classify(records, tokenizer, names, max_length=model.max_length)
        return np.exp(class_logp(model, params, examples)[:, column].astype(np.float64))

    return score
