"""GPT-2.

Shapes: B batch, T tokens, D width, F MLP width, N heads, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxforget.models import configs
from jaxforget.models.layers import ACTIVATIONS, Draws, Place, self_attention
from jaxforget.models.modules import Embedding, LayerNorm, Linear
from jaxforget.models.parts import MLP, add_head, apply_head, head_keys

ARCHITECTURES = {
    "gpt2": {"causal": "GPT2LMHeadModel", "classification": "GPT2ForSequenceClassification", "none": "GPT2Model"}
}
PREFIX = "transformer."  # absent from checkpoints of the bare model
IGNORED = (r"h\.\d+\.attn\.(masked_)?bias",)  # causal masks, once stored as buffers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields, names and defaults of Hugging Face's GPT2Config. Its dropout is not used here."""

    model_type: str = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # changes nothing here: scores and softmax are float32 anyway
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    head: str = "causal"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ARCHITECTURES)
        configs.check_head(self, ARCHITECTURES)
        configs.choose("activation_function", self.activation_function, ACTIVATIONS)
        configs.choose("add_cross_attention", self.add_cross_attention, [False])
        configs.positive(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        configs.divides(self, "n_embd", "n_head")

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        return configs.read(cls, raw, **configs.head_from(raw, ARCHITECTURES["gpt2"]))

    def to_hf(self) -> dict[str, Any]:
        return configs.write(self, ARCHITECTURES)

    # What `Model` asks of every family.
    causal = True
    stacks = property(lambda self: {"blocks": self.n_layer})
    max_length = property(lambda self: self.n_positions)
    position_limit = property(lambda self: self.n_positions)  # learned positions end here
    windows = property(lambda self: (None,) * self.n_layer)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        return self.n_head, self.n_head, self.n_embd // self.n_head

    @property
    def scales(self) -> tuple[float, ...] | None:
        """Factor on the attention scores of every layer; None for the usual one."""
        scale = self.heads[2] ** -0.5 if self.scale_attn_weights else 1.0
        by_layer = self.scale_attn_by_inverse_layer_idx
        if self.scale_attn_weights and not by_layer:
            return None
        return tuple(scale / (i + 1 if by_layer else 1) for i in range(self.n_layer))


class Top(nnx.Module):
    """What surrounds the blocks."""

    def __init__(self, config: Config, draws: Draws):
        std = config.initializer_range
        self.embed = Embedding(config.vocab_size, config.n_embd, draws, std=std)
        self.positions = Embedding(config.n_positions, config.n_embd, draws, std=std)
        self.final_norm = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        add_head(self, config, config.n_embd, draws, std=std)
        self.config = config

    def start(self, tokens_BT: jax.Array, place: Place, length: Any, dtype: Any) -> tuple[jax.Array, None]:
        """Return x_BTD and what all blocks share: nothing."""
        positions_BTD = self.positions(place.positions_BT, dtype)
        x_BTD = self.embed(tokens_BT, dtype)
        return x_BTD + jnp.broadcast_to(positions_BTD, x_BTD.shape), None

    def finish(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        return apply_head(self, self.config, self.final_norm(x_BTD), place)


class Attention(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        std, D = config.initializer_range, config.n_embd
        self.qkv = Linear(D, 3 * D, draws, std=std, bias=True)
        self.o = Linear(D, D, draws, std=_residual_std(config), bias=True)
        self.heads = config.n_head

    def __call__(self, x_BTD, place, layer):
        B, T, D = x_BTD.shape
        q, k, v = (part.reshape(B, T, self.heads, -1) for part in jnp.split(self.qkv(x_BTD), 3, axis=-1))
        y_BTNH, cache = self_attention(q, k, v, place, layer)
        return self.o(y_BTNH.reshape(B, T, D)), cache


class Block(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        self.attn_norm = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        self.attn = Attention(config, draws)
        self.mlp_norm = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        self.mlp = MLP(
            config.n_embd, config.n_inner or 4 * config.n_embd, draws, std=config.initializer_range,
            activation=config.activation_function, down_std=_residual_std(config),
        )  # fmt: skip

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), place, layer)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


BLOCKS = {"blocks": Block}


def _residual_std(config: Config) -> float:
    """Layers that write to the residual stream start smaller, so that depth does not inflate it."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = {
        "transformer.wte.weight": ("embed/table", False),
        "transformer.wpe.weight": ("positions/table", False),
        "transformer.ln_f.weight": ("final_norm/scale", False),
        "transformer.ln_f.bias": ("final_norm/bias", False),
    }
    for theirs, ours in (("ln_1", "attn_norm"), ("ln_2", "mlp_norm")):
        table[f"transformer.h.{{}}.{theirs}.weight"] = (f"blocks/{ours}/scale", False)
        table[f"transformer.h.{{}}.{theirs}.bias"] = (f"blocks/{ours}/bias", False)
    # Hugging Face's Conv1D stores (inputs, outputs), as we do.
    dense = {
        "attn.c_attn": "attn/qkv",
        "attn.c_proj": "attn/o",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    }
    for theirs, ours in dense.items():
        table[f"transformer.h.{{}}.{theirs}.weight"] = (f"blocks/{ours}/kernel", False)
        table[f"transformer.h.{{}}.{theirs}.bias"] = (f"blocks/{ours}/bias", False)
    return table | head_keys(config)
