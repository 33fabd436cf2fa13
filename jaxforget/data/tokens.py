"""Records -> padded arrays. Array letters: N examples, T tokens."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxforget import checks
from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record
from jaxforget.errors import UserError

IGNORED = -100  # the label of a position whose prediction is not scored
FILLS = {"labels": IGNORED, "segments": 0}  # padding of a column; of others the padding token
BOS, EOS, PAD, MASK = "<s>", "</s>", "<pad>", "<mask>"
SHORTEST_CHUNK = 5  # chunks under this many tokens are dropped when splitting, arXiv 2402.15159
TEXT_MODES = ("truncate", "split", "pack")


@dataclass(frozen=True)
class Examples:
    """Hold tokenised examples as arrays with a leading N.

    columns: tokens int32 (N, T), right-padded; labels int32 (N, T), where labels[n, t] is the token that
    position t must predict, tokens[n, t + 1], or -100 where nothing is scored (always in the last column and
    in padding); length int32 (N,), the real tokens of each row (the padding id may be a real token); key
    uint64 (N,), a digest of the id that data order and randomness depend on. Other tasks have other columns:
    data/tasks.py. truncated: records cut to fit. dropped: records, or chunks of them, with too little left to
    score.
    """

    ids: tuple[str, ...]
    columns: dict[str, np.ndarray]
    pad_id: int = 0
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Give the real tokens per example, int32 (N,)."""
        return self.columns["length"]

    @property
    def scored(self) -> np.ndarray:
        """Mark the positions whose prediction is scored, bool (N, T)."""
        return self.columns["labels"] != IGNORED

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Select examples by index or boolean mask. The counts of what was cut do not carry over."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Examples(tuple(self.ids[index] for index in chosen), columns, self.pad_id)

    def widen(self, widths: Mapping[str, int]) -> "Examples":
        """Right-pad the named columns to these widths, each with what says nothing there."""
        columns = dict(self.columns)
        for name, width in widths.items():
            fill = FILLS.get(name, self.pad_id)
            extra = width - columns[name].shape[1]
            columns[name] = np.pad(columns[name], ((0, 0), (0, extra)), constant_values=fill)
        return replace(self, columns=columns)


def same_widths(parts: Sequence[Examples]) -> list[Examples]:
    """Pad every column over tokens to its longest T among the parts."""
    names = [name for name, column in parts[0].columns.items() if column.ndim == 2]
    widths = {name: max(part.columns[name].shape[1] for part in parts) for name in names}
    return [part.widen(widths) for part in parts]


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Join examples, padding to the longest T. They must have the same columns."""
    wide = same_widths(parts)
    columns = {name: np.concatenate([part.columns[name] for part in wide]) for name in parts[0].columns}
    ids = tuple(identity for part in parts for identity in part.ids)
    truncated, dropped = sum(part.truncated for part in parts), sum(part.dropped for part in parts)
    return Examples(ids, columns, parts[0].pad_id, truncated, dropped)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, *, wrap: bool = False, segments: bool = False) -> Any:
    """Train a byte-level BPE with single digits and the special tokens <s>, </s> and <pad>.

    wrap: encoding puts <s> before a text and </s> after it, and there is a <mask>, as encoders expect.
    segments: also tell the two texts of a pair apart. The same
    texts give the same tokenizer. vocab_size: an upper bound, at least 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [BOS, EOS, PAD, MASK] if wrap else [BOS, EOS, PAD]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"vocab_size is {vocab_size}; it must be at least {256 + len(special)}: 256 bytes and {len(special)} "
            "special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a merge seen once would be one name
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if wrap:
        ids = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B:1 {EOS}:1", special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        mask_token=MASK if wrap else None, cls_token=BOS if wrap else None, sep_token=EOS if wrap else None,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *["token_type_ids"] * segments, "attention_mask"],
    )  # fmt: skip


def load_tokenizer(name_or_dir: str | Path) -> Any:
    """Load a tokenizer from a directory or by hub name. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    path = Path(name_or_dir)
    if not path.is_dir() and (path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name_or_dir))):
        raise UserError(f"{name_or_dir}: not a tokenizer; give a directory or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_dir))
    except Exception as error:  # the library raises many kinds: no network, no such name, damaged files
        reason = str(error).split("\n")[0].rstrip(". ") or type(error).__name__
        raise UserError(f"{name_or_dir}: no tokenizer could be loaded ({reason})") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # A directory without vocabulary files can give an empty tokenizer instead of an error.
        raise UserError(f"{name_or_dir}: no tokenizer could be loaded (the vocabulary is empty)")
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raise UserError when the tokenizer can produce ids that the model `where` has no embedding for."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise UserError(f"{where}: the tokenizer produces {needed} ids, the model's vocabulary has only {vocab_size}")


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    text_mode: str = "truncate",
    prompt_template: str = "Question: {question}\nAnswer:",
    answer_prefix: str = " ",
    add_eos: bool | None = None,
    pad_to_multiple: int = 8,
) -> Examples:
    """Encode records as right-padded next-token examples.

    Plain text: the tokenizer's own default encoding, every token after the first scored. Question and answer:
    the default encoding of the template, then answer_prefix + answer without special tokens, then EOS; only
    answer and EOS are scored, and what exceeds max_length is cut from the end. text_mode, for plain text
    only: "truncate" makes one example of a record; "split" makes chunks of max_length with ids `<id>#<i>`
    (arXiv 2402.15159), dropping those under 5 tokens; "pack" joins all documents with EOS (else BOS, else
    nothing) into blocks of max_length, whose ids are digests of their content. add_eos: None ends answers but
    not texts with EOS, where there is one; True ends both; False neither. T is the longest example rounded up
    to pad_to_multiple, at most max_length. Raises UserError for settings that cannot be met.
    """
    checks.one_of(TEXT_MODES, text_mode=text_mode)
    if max_length < 2 or pad_to_multiple < 1:
        raise UserError(f"max_length is {max_length}, at least 2; pad_to_multiple is {pad_to_multiple}, at least 1")
    if "{question}" not in prompt_template:
        raise UserError(f"prompt_template is {prompt_template!r}; it must contain {{question}}")
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise UserError("add_eos is set, but the tokenizer has no EOS token")

    appends_eos = eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]
    plain = [record for record in records if record.prompt is None]
    asked = [record for record in records if record.prompt is not None]
    if text_mode == "pack" and asked:
        raise UserError(f"text_mode is 'pack', which is for plain text, but record {asked[0].id!r} has a question")

    texts = _encode(tokenizer, [record.text for record in plain], special=True)
    if appends_eos and (add_eos is False or text_mode == "pack"):
        texts = [text[:-1] for text in texts]
    if add_eos and text_mode != "pack" and not appends_eos:
        texts = [text + [eos] for text in texts]
    if text_mode == "pack":
        separator = eos if eos is not None else tokenizer.bos_token_id
        blocks, dropped = _pack(texts, separator, tokenizer.bos_token_id, max_length, bool(add_eos))
        return _arrays(blocks, tokenizer, max_length, pad_to_multiple, 0, dropped)

    prompts = _encode(tokenizer, [prompt_template.replace("{question}", record.question) for record in asked], True)
    if appends_eos:
        prompts = [prompt[:-1] for prompt in prompts]
    answers = _encode(tokenizer, [answer_prefix + record.text for record in asked], special=False)
    if eos is not None and add_eos is not False:
        answers = [answer + [eos] for answer in answers]

    # A row is (id, tokens, first scored token).
    rows: list[tuple[str, list[int], int]] = []
    truncated = dropped = 0
    text_of, pair_of = iter(texts), iter(zip(prompts, answers))
    for record in records:
        if record.prompt is not None:
            prompt, answer = next(pair_of)
            tokens, first = prompt + answer, max(len(prompt), 1)
        else:
            tokens, first = next(text_of), 1
        if text_mode == "split" and record.prompt is None:
            chunks = [tokens[at : at + max_length] for at in range(0, len(tokens), max_length)] or [[]]
            for index, chunk in enumerate(chunks):
                if len(chunk) < SHORTEST_CHUNK:
                    dropped += 1
                else:
                    rows.append((record.id if len(chunks) == 1 else f"{record.id}#{index}", chunk, 1))
            continue
        if min(len(tokens), max_length) <= first:
            dropped += 1
            continue
        truncated += len(tokens) > max_length
        rows.append((record.id, tokens[:max_length], first))
    return _arrays(rows, tokenizer, max_length, pad_to_multiple, truncated, dropped)


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: we cut to length ourselves, so its warning about long sequences would mislead.
    return tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _pack(
    texts: list[list[int]], separator: int | None, bos: int | None, max_length: int, end: bool
) -> tuple[list[tuple[str, list[int], int]], int]:
    stream: list[int] = []
    for index, text in enumerate(texts):
        # A BOS that the encoding already starts with separates documents by itself.
        if index and separator is not None and not (separator == bos and text[:1] == [bos]):
            stream.append(separator)
        stream.extend(text)
    if end and stream and separator is not None:
        stream.append(separator)
    blocks = [stream[at : at + max_length] for at in range(0, len(stream), max_length)]
    kept = [block for block in blocks if len(block) > 1]
    occurrences: Counter[str] = Counter()
    rows = []
    for block in kept:
        digest = hashlib.sha256(np.asarray(block, "<i4").tobytes()).hexdigest()[:20]
        occurrences[digest] += 1
        rows.append((digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}", block, 1))
    return rows, len(blocks) - len(kept)


def pad_id_of(tokenizer: Any) -> int:
    """Give the id that fills padding: the tokenizer's, else its EOS, else 0."""
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(pad for pad in pads if pad is not None)


def right_pad(rows: Sequence[Sequence[int]], fill: int, max_length: int, pad_to_multiple: int = 8) -> np.ndarray:
    """Stack rows of different lengths, int32 (N, T): T is the longest rounded up, at most max_length."""
    longest = max((len(row) for row in rows), default=1)
    stacked = np.full((len(rows), min(max_length, -(-longest // pad_to_multiple) * pad_to_multiple)), fill, np.int32)
    for n, row in enumerate(rows):
        stacked[n, : len(row)] = row
    return stacked


def _arrays(
    rows: Sequence[tuple[str, list[int], int]],
    tokenizer: Any,
    max_length: int,
    pad_to_multiple: int,
    truncated: int,
    dropped: int,
) -> Examples:
    pad_id = pad_id_of(tokenizer)
    tokens_NT = right_pad([tokens for _, tokens, _ in rows], pad_id, max_length, pad_to_multiple)
    labels_NT = np.full_like(tokens_NT, IGNORED)
    for n, (_, tokens, first) in enumerate(rows):
        labels_NT[n, first - 1 : len(tokens) - 1] = tokens[first:]
    ids = tuple(identity for identity, _, _ in rows)
    length_N = np.asarray([len(tokens) for _, tokens, _ in rows], np.int32)
    columns = {"tokens": tokens_NT, "labels": labels_NT, "length": length_N, "key": id_keys(ids)}
    return Examples(ids, columns, pad_id, truncated, dropped)
