"""What a run starts from: a model on disk or a fresh one, with its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxforget.data.fictional import build_tokenizer
from jaxforget.data.sources import Record
from jaxforget.data.tokens import check_vocabulary, load_tokenizer
from jaxforget.errors import UserError
from jaxforget.models import Model, hub
from jaxforget.models.model import family_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Shape of a model trained from scratch."""

    family: Literal["llama", "gpt2"] = "llama"
    """Model family."""
    width: int = 96
    """Model width."""
    layers: int = 2
    """Number of blocks."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key and value heads (llama); as many as heads when not given."""
    mlp_width: int | None = None
    """Width of the MLP; 8/3 of the width (llama) or 4 times it (gpt2) when not given."""
    context: int = 128
    """Longest sequence in tokens."""
    vocab_size: int = 1024
    """Size of the tokenizer that is built when none is given."""


class Start(NamedTuple):
    """A model with its tokenizer. `params(seed)` gives float32 host arrays: from disk, or drawn from the seed."""

    model: Model
    params: Callable[[int], Any]
    tokenizer: Any
    save_tokenizer: Callable[[Path], None]


def start_from(
    name: str | None, *, tokenizer_name: str | None, size: SizeConfig, dtype: str, corpus: Sequence[Record]
) -> Start:
    """Load model and tokenizer by directory or hub name, or make both: the tokenizer from `corpus`, the model by size.

    Raises UserError when the tokenizer can produce ids the model has no embedding for.
    """
    if name is not None:
        model, loaded = hub.load(name, dtype=dtype)
        model = shallow(model)
        tokenizer = load_tokenizer(tokenizer_name or name)
        check_vocabulary(tokenizer, model.vocab_size, name)
        return Start(model, lambda seed: loaded, tokenizer, tokenizer.save_pretrained)
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        tokenizer = build_tokenizer(corpus, size.vocab_size)
    vocab_size = max(size.vocab_size if tokenizer_name is None else 0, max(tokenizer.get_vocab().values()) + 1)
    raw = scratch_config(size, vocab_size, tokenizer)
    model = shallow(Model(family_of(raw["model_type"]).Config.from_hf(raw), dtype=dtype))

    def draw(seed: int) -> Any:
        # Separate from the key of the run, which is key(seed) itself.
        return jax.tree.map(np.asarray, model.init(jax.random.fold_in(jax.random.key(seed), 1)))

    return Start(model, draw, tokenizer, tokenizer.save_pretrained)


def shallow(model: Model) -> Model:
    """Unroll the layers of a shallow model: measured faster a step at 2 to 5 layers, and still quick to compile."""
    return dataclasses.replace(model, scan_layers=model.config.num_layers > 5)


def scratch_config(size: SizeConfig, vocab_size: int, tokenizer: Any) -> dict[str, Any]:
    """Write the config.json of a model of this size."""
    for field in ("width", "layers", "heads", "kv_heads", "mlp_width", "context"):
        value = getattr(size, field)
        if value is not None and value < 1:
            raise UserError(f"--size.{field.replace('_', '-')} is {value}; it must be at least 1")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if size.width % size.heads:
        raise UserError(f"--size.width {size.width} is not a multiple of --size.heads {size.heads}")
    if size.family == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": vocab_size,
            "n_embd": size.width,
            "n_layer": size.layers,
            "n_head": size.heads,
            "n_positions": size.context,
            "n_inner": size.mlp_width,
            **special,
        }
    mlp_width = size.mlp_width or -(-8 * size.width // 3 // 8) * 8
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads or size.heads,
        "intermediate_size": mlp_width,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        **special,
    }
