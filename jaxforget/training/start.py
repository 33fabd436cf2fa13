"""What a run starts from: a model on disk or a fresh one, with its tokenizer."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jaxforget.data.tokens import check_vocabulary, load_tokenizer, train_tokenizer
from jaxforget.errors import UserError
from jaxforget.models import Model, hub
from jaxforget.models.model import build, family_of
from jaxforget.models.sharding import check_rules, resting

# What a head is trained for from scratch, when no family is named.
USUAL_FAMILY = {"causal": "llama", "classification": "bert", "masked": "bert", "seq2seq": "t5"}
WRAPPED = ("bert", "roberta", "distilbert")  # families whose tokenizers put special tokens around a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Shape of a model trained from scratch."""

    family: Literal["llama", "gpt2", "opt", "gpt_neox", "bert", "roberta", "distilbert", "t5"] | None = None
    """Model family. Default: llama for language models, bert for classification and masked tokens, t5 for seq2seq."""
    width: int = 96
    """Model width."""
    layers: int = 2
    """Number of blocks (t5: in the encoder and in the decoder)."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key and value heads (llama); as many as heads when not given."""
    mlp_width: int | None = None
    """Width of the MLP; 8/3 of the width (llama, t5) or 4 times it (others) when not given."""
    context: int = 128
    """Longest sequence in tokens."""
    vocab_size: int = 1024
    """Size of the tokenizer that is built when none is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a model is computed. It changes speed and memory; results only by rounding."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of activations: auto is bfloat16 on accelerators and float32 on a CPU. Parameters stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing, all but dense products, or whole blocks."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """Compile one block for all layers, or each; auto unrolls up to 5, which run faster and still compile quickly."""

    def apply(self, model: Model) -> Model:
        """Return the model computed in this way."""
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        deep = max(model.config.stacks.values()) > 5
        return dataclasses.replace(
            model, dtype=auto if self.dtype == "auto" else self.dtype, remat=self.remat,
            scan_layers=deep if self.layers == "auto" else self.layers == "scan",
        )  # fmt: skip


class Start(NamedTuple):
    """A model with its tokenizer. `params(seed)` gives float32 host arrays: from disk, or drawn from the seed."""

    model: Model
    params: Callable[[int], Any]
    tokenizer: Any
    save_tokenizer: Callable[[Path], None]


def start_from(
    name: str | None,
    *,
    tokenizer_name: str | None,
    size: SizeConfig,
    compute: ComputeConfig,
    texts: Iterable[str],
    head: str | None = None,
    labels: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda message: None,
) -> Start:
    """Load model and tokenizer by directory or hub name, or make both: the tokenizer from `texts`, the model by size.

    head: what the model is for; None keeps the one in the file. labels: the classes of a classification head. Raises
    UserError when the tokenizer can produce ids the model has no embedding for.
    """
    if name is not None:
        model, loaded = hub.load(name, head=head, labels=labels, tell=tell)
        tokenizer = load_tokenizer(tokenizer_name or name)
        check_vocabulary(tokenizer, model.vocab_size, name)
        check_rules(model.shapes())
        return Start(compute.apply(model), lambda seed: loaded, tokenizer, tokenizer.save_pretrained)
    head = head or "causal"
    family = size.family or USUAL_FAMILY[head]
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        tokenizer = train_tokenizer(texts, size.vocab_size, wrap=family in WRAPPED, segments=family == "bert")
    vocab_size = max(size.vocab_size if tokenizer_name is None else 0, max(tokenizer.get_vocab().values()) + 1)
    raw = scratch_config(size, family, vocab_size, tokenizer)
    heads = family_of(family).ARCHITECTURES[family]
    if head not in heads:
        raise UserError(f"--size.family {family} has no {head} head; it has {', '.join(heads)}")
    config = family_of(family).Config.from_hf(raw | {"architectures": [heads[head]]} | _classes(labels))
    model = compute.apply(build(config))

    def draw(seed: int) -> Any:
        # Separate from the key of the run, which is key(seed) itself.
        return resting(model.init(jax.random.fold_in(jax.random.key(seed), 1)))

    return Start(model, draw, tokenizer, tokenizer.save_pretrained)


def tokenizer_files(save_tokenizer: Callable[[Path], Any]) -> dict[str, bytes]:
    """Return the files of a tokenizer, to be saved with a model."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(Path(scratch))
        return {file.name: file.read_bytes() for file in sorted(Path(scratch).iterdir())}


def require_causal(model: Model, name: Any) -> None:
    """Raise UserError for a model that does not predict next tokens."""
    if model.config.head != "causal":
        raise UserError(f"{name} is {model.config.model_type} with a {model.config.head} head; a causal one is needed")


def require_classifier(model: Model, name: Any) -> None:
    """Raise UserError for a model without classes."""
    if model.config.head != "classification":
        raise UserError(f"{name} is {model.config.model_type} with a {model.config.head} head; a classifier is needed")


def _classes(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": {str(i): name for i, name in enumerate(labels)}} if labels else {}


# What each family calls width, layers, heads, mlp_width and context.
_ENCODER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
FIELDS = {
    "llama": _ENCODER,
    "gpt2": ("n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings"),
    "gpt_neox": _ENCODER,
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"),
    "t5": ("d_model", "num_layers", "num_heads", "d_ff", "n_positions"),
}


def scratch_config(size: SizeConfig, family: str, vocab_size: int, tokenizer: Any) -> dict[str, Any]:
    """Write the config.json of a model of this size."""
    for field in ("width", "layers", "heads", "kv_heads", "mlp_width", "context"):
        value = getattr(size, field)
        if value is not None and value < 1:
            raise UserError(f"--size.{field.replace('_', '-')} is {value}; it must be at least 1")
    if size.width % size.heads:
        raise UserError(f"--size.width {size.width} is not a multiple of --size.heads {size.heads}")
    gated = -(-8 * size.width // 3 // 8) * 8
    mlp_width = size.mlp_width or (gated if family in ("llama", "t5") else 4 * size.width)
    pad_id = tokenizer.pad_token_id
    context = size.context
    if family == "roberta":  # its positions begin after the padding id
        context += (pad_id or 0) + 1
    values = (size.width, size.layers, size.heads, mlp_width, context)
    raw = {"model_type": family, "vocab_size": vocab_size, **dict(zip(FIELDS[family], values, strict=True))}
    raw |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad_id}
    if family == "llama":
        kv_heads = size.kv_heads or size.heads
        raw |= {
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
        }
    if family == "t5":
        raw |= {"d_kv": size.width // size.heads, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": pad_id}
    return raw
