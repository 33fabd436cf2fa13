"""Llama, Mistral and Qwen2, which differ in biases and windows. Yi's files say `llama`.

Shapes: B batch, T tokens, D width, N heads, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxforget.errors import UserError
from jaxforget.models import configs, rotary
from jaxforget.models.layers import ACTIVATIONS, Draws, Place, self_attention
from jaxforget.models.modules import Embedding, Linear, RMSNorm
from jaxforget.models.parts import add_head, apply_head, head_keys
from jaxforget.models.rotary import Rope

ARCHITECTURES = {
    model_type: {
        "causal": f"{name}ForCausalLM",
        "classification": f"{name}ForSequenceClassification",
        "none": f"{name}Model",
    }
    for model_type, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
}
PREFIX = "model."  # absent from checkpoints of the bare model
IGNORED = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)  # computed from the config
LAYER_TYPES = ("full_attention", "sliding_attention")

# What Hugging Face assumes of a key that the file omits, where the three differ.
_DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
_FOREIGN = {  # fields that the family does not have
    "llama": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "mistral": ("use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias", "mlp_bias"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of Hugging Face's LlamaConfig, MistralConfig and Qwen2Config; `rope` holds the rotary ones."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # llama: on q, k, v and o. qwen2 always has it on q, k and v
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False  # qwen2
    max_window_layers: int = 28  # qwen2: layers below this one see everything
    layer_types: tuple[str, ...] | None = None  # qwen2: overrides max_window_layers
    rope: Rope = Rope()
    head: str = "causal"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ARCHITECTURES)
        configs.check_head(self, ARCHITECTURES)
        configs.choose("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        configs.positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        configs.positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        configs.divides(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            configs.divides(self, "hidden_size", "num_attention_heads")
        if self.heads[2] % 2:
            raise UserError(f"config field head_dim is {self.heads[2]}; rotary positions need an even one")
        if self.sliding_window is not None:
            configs.positive(self, "sliding_window")
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            for kind in self.layer_types:
                configs.choose("layer_types", kind, LAYER_TYPES)
            if len(self.layer_types) != self.num_hidden_layers:
                raise UserError(
                    f"config field layer_types has {len(self.layer_types)} entries; num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
        self.windows  # noqa: B018  raises for a window that is used and not given

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.choose("model_type", raw.get("model_type"), ARCHITECTURES)
        types = raw.get("layer_types")
        if types is not None and not isinstance(types, list):
            raise UserError(f"config field layer_types is {types!r}; expected a list")
        return configs.read(
            cls,
            raw,
            defaults=_DEFAULTS[raw["model_type"]],
            ignore=_FOREIGN[raw["model_type"]],
            rope=Rope.from_hf(raw),
            layer_types=tuple(types) if types and raw["model_type"] == "qwen2" else None,
            **configs.head_from(raw, ARCHITECTURES[raw["model_type"]]),
        )

    def to_hf(self) -> dict[str, Any]:
        raw = configs.write(self, ARCHITECTURES, drop=("rope", *_FOREIGN[self.model_type])) | self.rope.to_hf()
        unset = [name for name in ("head_dim", "layer_types") if raw.get(name) is None]
        return {name: value for name, value in raw.items() if name not in unset}

    # What `Model` asks of every family.
    causal = True
    stacks = property(lambda self: {"blocks": self.num_hidden_layers})
    max_length = property(lambda self: self.max_position_embeddings)
    position_limit = property(lambda self: None)  # rotary positions do not end
    scales = property(lambda self: None)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, width

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each layer looks back on, itself included; None for all."""
        if self.model_type == "llama":
            return (None,) * self.num_hidden_layers
        if self.model_type == "mistral":
            return (self.sliding_window,) * self.num_hidden_layers
        window = self.sliding_window if self.use_sliding_window else None
        first = self.num_hidden_layers if window is None else self.max_window_layers
        types = self.layer_types
        if types is None:
            types = tuple(LAYER_TYPES[layer >= first] for layer in range(self.num_hidden_layers))
        if window is None and LAYER_TYPES[1] in types:
            raise UserError("config field layer_types has sliding_attention; set sliding_window and use_sliding_window")
        return tuple(window if kind == LAYER_TYPES[1] else None for kind in types)

    @property
    def biased(self) -> dict[str, bool]:
        """Which dense layers of a block have a bias."""
        qkv = self.attention_bias or self.model_type == "qwen2"
        names = dict.fromkeys(("attn/q", "attn/k", "attn/v"), qkv) | {"attn/o": self.attention_bias}
        return names | dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), self.mlp_bias)


class Top(nnx.Module):
    """What surrounds the blocks."""

    def __init__(self, config: Config, draws: Draws):
        D, std = config.hidden_size, config.initializer_range
        self.embed = Embedding(config.vocab_size, D, draws, std=std)
        self.final_norm = RMSNorm(D, epsilon=config.rms_norm_eps)
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
        D, std, biased = config.hidden_size, config.initializer_range, config.biased
        N, N_kv, H = config.heads
        self.q = Linear(D, N * H, draws, std=std, bias=biased["attn/q"])
        self.k = Linear(D, N_kv * H, draws, std=std, bias=biased["attn/k"])
        self.v = Linear(D, N_kv * H, draws, std=std, bias=biased["attn/v"])
        self.o = Linear(N * H, D, draws, std=std, bias=biased["attn/o"])
        self.width = H

    def __call__(self, x_BTD, shared, place, layer):
        B, T, _ = x_BTD.shape
        q, k, v = (part(x_BTD).reshape(B, T, -1, self.width) for part in (self.q, self.k, self.v))
        y_BTNH, cache = self_attention(rotary.rotate(q, *shared), rotary.rotate(k, *shared), v, place, layer)
        return self.o(y_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        D, F, std = config.hidden_size, config.intermediate_size, config.initializer_range
        biased = config.biased
        self.gate = Linear(D, F, draws, std=std, bias=biased["mlp/gate"])
        self.up = Linear(D, F, draws, std=std, bias=biased["mlp/up"])
        self.down = Linear(F, D, draws, std=std, bias=biased["mlp/down"])
        self.activation = config.hidden_act

    def __call__(self, x_BTD):
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        self.attn_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.attn = Attention(config, draws)
        self.mlp_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.mlp = MLP(config, draws)

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), shared, place, layer)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


BLOCKS = {"blocks": Block}


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = {
        "model.embed_tokens.weight": ("embed/table", False),
        "model.norm.weight": ("final_norm/scale", False),
        "model.layers.{}.input_layernorm.weight": ("blocks/attn_norm/scale", False),
        "model.layers.{}.post_attention_layernorm.weight": ("blocks/mlp_norm/scale", False),
    }
    for ours, biased in config.biased.items():
        part, name = ours.split("/")
        theirs = f"model.layers.{{}}.{'self_attn' if part == 'attn' else part}.{name}_proj"
        table[f"{theirs}.weight"] = (f"blocks/{ours}/kernel", True)
        if biased:
            table[f"{theirs}.bias"] = (f"blocks/{ours}/bias", False)
    return table | head_keys(config)
