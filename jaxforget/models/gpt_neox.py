"""GPT-NeoX, and Pythia, whose files say `gpt_neox`. Source: arXiv 2204.06745.

Shapes: B batch, T tokens, D width, F MLP width, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxforget.errors import UserError
from jaxforget.models import configs, rotary
from jaxforget.models.layers import ACTIVATIONS, Draws, Place, self_attention
from jaxforget.models.modules import Embedding, LayerNorm, Linear
from jaxforget.models.parts import MLP, add_head, apply_head, head_keys
from jaxforget.models.rotary import Rope

ARCHITECTURES = {
    "gpt_neox": {
        "causal": "GPTNeoXForCausalLM",
        "classification": "GPTNeoXForSequenceClassification",
        "none": "GPTNeoXModel",
    }
}
PREFIX = "gpt_neox."  # absent from checkpoints of the bare model
# Causal masks, once stored as buffers, and what is computed from the config.
IGNORED = (r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",)
_ROTARY = {"rope_theta": ("rotary_emb_base", 10000.0), "partial_rotary_factor": ("rotary_pct", 0.25)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields, names and defaults of Hugging Face's GPTNeoXConfig; `rope` holds the rotary ones. No dropout here."""

    model_type: str = "gpt_neox"
    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True  # attention and MLP read the same input
    attention_bias: bool = True
    rope: Rope = Rope(partial_rotary_factor=0.25)
    head: str = "causal"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ARCHITECTURES)
        configs.check_head(self, ARCHITECTURES)
        configs.choose("hidden_act", self.hidden_act, ACTIVATIONS)
        configs.positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        configs.positive(self, "intermediate_size", "max_position_embeddings")
        configs.divides(self, "hidden_size", "num_attention_heads")
        width = self.heads[2]
        if self.rope.rotated(width) % 2 or not self.rope.rotated(width):
            raise UserError(
                f"config field rotary_pct is {self.rope.partial_rotary_factor} of heads {width} wide; it must leave an "
                "even number above 0"
            )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.only(raw, is_causal=True)
        # The family's own names for what may also stand inside rope_parameters.
        outer = {ours: raw.get(theirs) for ours, (theirs, _) in _ROTARY.items()}
        outer = {ours: _ROTARY[ours][1] if value is None else value for ours, value in outer.items()}
        rope = Rope.from_hf(raw | outer, partial=True)
        return configs.read(cls, raw, rope=rope, **configs.head_from(raw, ARCHITECTURES["gpt_neox"]))

    def to_hf(self) -> dict[str, Any]:
        raw = configs.write(self, ARCHITECTURES, drop=("rope",)) | self.rope.to_hf()
        return raw | {theirs: getattr(self.rope, ours) for ours, (theirs, _) in _ROTARY.items()}

    # What `Model` asks of every family.
    causal = True
    stacks = property(lambda self: {"blocks": self.num_hidden_layers})
    max_length = property(lambda self: self.max_position_embeddings)
    position_limit = property(lambda self: None)  # rotary positions do not end
    windows = property(lambda self: (None,) * self.num_hidden_layers)
    scales = property(lambda self: None)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        return self.num_attention_heads, self.num_attention_heads, self.hidden_size // self.num_attention_heads


class Top(nnx.Module):
    """What surrounds the blocks."""

    def __init__(self, config: Config, draws: Draws):
        D, std = config.hidden_size, config.initializer_range
        self.embed = Embedding(config.vocab_size, D, draws, std=std)
        self.final_norm = LayerNorm(D, epsilon=config.layer_norm_eps)
        add_head(self, config, D, draws, std=std)
        self.config = config

    def start(
        self, tokens_BT: jax.Array, place: Place, length: Any, dtype: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return x_BTD and what all blocks share: the rotary tables."""
        return self.embed(tokens_BT, dtype), rotary.tables(self.config, place.positions_BT, length)

    def finish(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        return apply_head(self, self.config, self.final_norm(x_BTD), place)


class Attention(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        D, std, bias = config.hidden_size, config.initializer_range, config.attention_bias
        self.qkv = Linear(D, 3 * D, draws, std=std, bias=bias)  # the q, k and v of one head, then those of the next
        self.o = Linear(D, D, draws, std=std, bias=bias)
        self.heads = config.num_attention_heads

    def __call__(self, x_BTD, shared, place, layer):
        B, T, D = x_BTD.shape
        qkv_BTN3H = self.qkv(x_BTD).reshape(B, T, self.heads, 3, -1)
        q, k, v = (qkv_BTN3H[:, :, :, i] for i in range(3))
        y_BTNH, cache = self_attention(rotary.rotate(q, *shared), rotary.rotate(k, *shared), v, place, layer)
        return self.o(y_BTNH.reshape(B, T, D)), cache


class Block(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        self.attn_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.attn = Attention(config, draws)
        self.mlp_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, draws, std=config.initializer_range,
            activation=config.hidden_act,
        )  # fmt: skip
        self.parallel = config.use_parallel_residual

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), shared, place, layer)
        seen_BTD = x_BTD if self.parallel else x_BTD + y_BTD
        return x_BTD + y_BTD + self.mlp(self.mlp_norm(seen_BTD)), cache


BLOCKS = {"blocks": Block}


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = {"gpt_neox.embed_in.weight": ("embed/table", False)}
    norms = {
        "layers.{}.input_layernorm": "blocks/attn_norm",
        "layers.{}.post_attention_layernorm": "blocks/mlp_norm",
        "final_layer_norm": "final_norm",
    }
    for theirs, ours in norms.items():
        table[f"gpt_neox.{theirs}.weight"] = (f"{ours}/scale", False)
        table[f"gpt_neox.{theirs}.bias"] = (f"{ours}/bias", False)
    dense = {
        "attention.query_key_value": ("attn/qkv", config.attention_bias),
        "attention.dense": ("attn/o", config.attention_bias),
        "mlp.dense_h_to_4h": ("mlp/up", True),
        "mlp.dense_4h_to_h": ("mlp/down", True),
    }
    for theirs, (ours, biased) in dense.items():
        table[f"gpt_neox.layers.{{}}.{theirs}.weight"] = (f"blocks/{ours}/kernel", True)
        if biased:
            table[f"gpt_neox.layers.{{}}.{theirs}.bias"] = (f"blocks/{ours}/bias", False)
    return table | head_keys(config, "embed_out.weight")
