"""OPT, and Galactica, whose files say `opt`. Source: arXiv 2205.01068.

Shapes: B batch, T tokens, D width, F MLP width, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxforget.models import configs
from jaxforget.models.layers import ACTIVATIONS, Draws, Place, layer_norm
from jaxforget.models.modules import Embedding, LayerNorm, Linear
from jaxforget.models.parts import MLP, Attention, add_head, apply_head, head_keys

ARCHITECTURES = {
    "opt": {"causal": "OPTForCausalLM", "classification": "OPTForSequenceClassification", "none": "OPTModel"}
}
PREFIX = "model."  # absent from checkpoints of the bare model
IGNORED = ()
OFFSET = 2  # position 0 is row 2 of the table
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields, names and defaults of Hugging Face's OPTConfig. Its dropout and layer drop are not used here."""

    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True  # False: after each sum, and no final norm
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None  # width of the embedding; default: hidden_size
    num_attention_heads: int = 12
    activation_function: str = "relu"
    init_std: float = 0.02
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    head: str = "causal"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ARCHITECTURES)
        configs.check_head(self, ARCHITECTURES)
        configs.choose("activation_function", self.activation_function, ACTIVATIONS)
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        configs.positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "word_embed_proj_dim")
        configs.positive(self, "num_attention_heads", "max_position_embeddings")
        configs.divides(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.only(raw, is_causal=True)
        return configs.read(cls, raw, **configs.head_from(raw, ARCHITECTURES["opt"]))

    def to_hf(self) -> dict[str, Any]:
        return configs.write(self, ARCHITECTURES)

    # What `Model` asks of every family.
    causal = True
    stacks = property(lambda self: {"blocks": self.num_hidden_layers})
    max_length = property(lambda self: self.max_position_embeddings)
    position_limit = property(lambda self: self.max_position_embeddings)  # learned positions end here
    windows = property(lambda self: (None,) * self.num_hidden_layers)
    scales = property(lambda self: None)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        return self.num_attention_heads, self.num_attention_heads, self.hidden_size // self.num_attention_heads

    # What the modules and `keys` ask besides.
    @property
    def embed_width(self) -> int:
        return self.word_embed_proj_dim or self.hidden_size

    projects = property(lambda self: self.embed_width != self.hidden_size)
    final_norm = property(lambda self: self.do_layer_norm_before and not self._remove_final_layer_norm)


class PlainNorm(nnx.Module):
    """Layer norm without parameters."""

    def __call__(self, x):
        D = x.shape[-1]
        return layer_norm(x, jnp.ones((D,), jnp.float32), jnp.zeros((D,), jnp.float32), epsilon=EPSILON)


def _norm(config: Config) -> nnx.Module:
    return LayerNorm(config.hidden_size, epsilon=EPSILON) if config.layer_norm_elementwise_affine else PlainNorm()


class Top(nnx.Module):
    """What surrounds the blocks."""

    def __init__(self, config: Config, draws: Draws):
        D, E, std = config.hidden_size, config.embed_width, config.init_std
        self.embed = Embedding(config.vocab_size, E, draws, std=std)
        self.positions = Embedding(config.max_position_embeddings + OFFSET, D, draws, std=std)
        if config.projects:
            self.project_in = Linear(E, D, draws, std=std, bias=False)
            self.project_out = Linear(D, E, draws, std=std, bias=False)
        if config.final_norm:
            self.final_norm = _norm(config)
        add_head(self, config, E, draws, std=std)
        self.config = config

    def start(self, tokens_BT: jax.Array, place: Place, length: Any, dtype: Any) -> tuple[jax.Array, None]:
        """Return x_BTD and what all blocks share: nothing."""
        x_BTD = self.embed(tokens_BT, dtype)
        x_BTD = self.project_in(x_BTD) if self.config.projects else x_BTD
        positions_BTD = self.positions(place.positions_BT + OFFSET, dtype)
        return x_BTD + jnp.broadcast_to(positions_BTD, x_BTD.shape), None

    def finish(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        x_BTD = self.final_norm(x_BTD) if self.config.final_norm else x_BTD
        x_BTD = self.project_out(x_BTD) if self.config.projects else x_BTD
        return apply_head(self, self.config, x_BTD, place)


class Block(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        D, std, bias = config.hidden_size, config.init_std, config.enable_bias
        self.attn_norm = _norm(config)
        self.attn = Attention(D, config.num_attention_heads, draws, std=std, bias=bias)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(D, config.ffn_dim, draws, activation=config.activation_function, std=std, bias=bias)
        self.before = config.do_layer_norm_before

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD) if self.before else x_BTD, place, layer)
        x_BTD = x_BTD + y_BTD
        if self.before:
            return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache
        x_BTD = self.attn_norm(x_BTD)
        return self.mlp_norm(x_BTD + self.mlp(x_BTD)), cache


BLOCKS = {"blocks": Block}


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = {
        "model.decoder.embed_tokens.weight": ("embed/table", False),
        "model.decoder.embed_positions.weight": ("positions/table", False),
    }
    if config.projects:
        table["model.decoder.project_in.weight"] = ("project_in/kernel", True)
        table["model.decoder.project_out.weight"] = ("project_out/kernel", True)
    norms = {"layers.{}.self_attn_layer_norm": "blocks/attn_norm", "layers.{}.final_layer_norm": "blocks/mlp_norm"}
    if config.final_norm:
        norms["final_layer_norm"] = "final_norm"
    for theirs, ours in norms.items() if config.layer_norm_elementwise_affine else ():
        table[f"model.decoder.{theirs}.weight"] = (f"{ours}/scale", False)
        table[f"model.decoder.{theirs}.bias"] = (f"{ours}/bias", False)
    dense = {f"self_attn.{name}_proj": f"attn/{name}" for name in "qkv"}
    dense |= {"self_attn.out_proj": "attn/o", "fc1": "mlp/up", "fc2": "mlp/down"}
    for theirs, ours in dense.items():
        table[f"model.decoder.layers.{{}}.{theirs}.weight"] = (f"blocks/{ours}/kernel", True)
        if config.enable_bias:
            table[f"model.decoder.layers.{{}}.{theirs}.bias"] = (f"blocks/{ours}/bias", False)
    return table | head_keys(config)
