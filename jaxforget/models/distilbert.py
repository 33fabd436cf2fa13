"""DistilBERT: BERT without token types, with other names.

Shapes: D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxforget.models import configs, encoder
from jaxforget.models.encoder import ARCHITECTURES, BLOCKS, Block, decoder_keys, module_keys
from jaxforget.models.layers import ACTIVATIONS, Draws

__all__ = ["ARCHITECTURES", "BLOCKS", "IGNORED", "PREFIX", "Block", "Config", "Top", "keys"]
PREFIX = "distilbert."  # absent from checkpoints of the bare model
IGNORED = (r"embeddings\.position_ids", r"vocab_projector\.weight")  # the latter where tied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields, names and defaults of Hugging Face's DistilBertConfig. Its dropout is not used here."""

    model_type: str = "distilbert"
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False  # how the position table starts; it is trained and stored all the same
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    activation: str = "gelu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    head: str = "masked"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ["distilbert"])
        configs.check_head(self, ARCHITECTURES)
        configs.choose("activation", self.activation, ACTIVATIONS)
        configs.positive(self, "vocab_size", "max_position_embeddings", "n_layers", "n_heads", "dim", "hidden_dim")
        configs.divides(self, "dim", "n_heads")

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.only(raw, **encoder.REQUIRED)
        config = configs.read(cls, raw, **configs.head_from(raw, ARCHITECTURES["distilbert"]))
        # Hugging Face reads these names too. A file that has them has to agree with itself.
        configs.only(raw, hidden_size=config.dim, num_attention_heads=config.n_heads, num_hidden_layers=config.n_layers)
        return config

    def to_hf(self) -> dict[str, Any]:
        return configs.write(self, ARCHITECTURES)

    # What `Model` asks of every family.
    causal = False
    stacks = property(lambda self: {"blocks": self.n_layers})
    max_length = property(lambda self: self.max_position_embeddings)
    position_limit = property(lambda self: self.max_position_embeddings)  # learned positions end here
    windows = property(lambda self: (None,) * self.n_layers)
    scales = property(lambda self: None)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        return self.n_heads, self.n_heads, self.dim // self.n_heads

    # What the modules of encoder.py ask.
    hidden_size = property(lambda self: self.dim)
    intermediate_size = property(lambda self: self.hidden_dim)
    hidden_act = masked_act = property(lambda self: self.activation)
    pooled_act = "relu"
    type_vocab_size = 0
    layer_norm_eps = 1e-12


class Top(encoder.Top):
    """What surrounds the blocks."""

    def __init__(self, config: Config, draws: Draws):
        super().__init__(config, draws)
        if config.sinusoidal_pos_embds:
            self.positions.table = nnx.Param(jnp.asarray(sinusoids(config.max_position_embeddings, config.dim)))


def sinusoids(rows: int, width: int) -> np.ndarray:
    """Return a float32 table_TD of sines (even columns) and cosines (odd). Source: arXiv 1706.03762, section 3.5."""
    column_D = np.arange(width)
    angle_TD = np.arange(rows)[:, None] / 10000.0 ** (2 * (column_D // 2) / width)
    return np.where(column_D % 2 == 0, np.sin(angle_TD), np.cos(angle_TD)).astype(np.float32)


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    layer = {
        "attention.q_lin": "attn/q",
        "attention.k_lin": "attn/k",
        "attention.v_lin": "attn/v",
        "attention.out_lin": "attn/o",
        "sa_layer_norm": "attn_norm",
        "ffn.lin1": "mlp/up",
        "ffn.lin2": "mlp/down",
        "output_layer_norm": "mlp_norm",
    }
    names = {
        "distilbert.embeddings.word_embeddings": "embed",
        "distilbert.embeddings.position_embeddings": "positions",
        "distilbert.embeddings.LayerNorm": "embed_norm",
    }
    names |= {f"distilbert.transformer.layer.{{}}.{theirs}": f"blocks/{ours}" for theirs, ours in layer.items()}
    if config.head == "classification":
        return module_keys(names | {"pre_classifier": "pool", "classifier": "score"})
    if config.head == "none":
        return module_keys(names)
    names |= {"vocab_transform": "transform", "vocab_layer_norm": "transform_norm"}
    return module_keys(names) | decoder_keys(config, "vocab_projector", "vocab_projector.bias")
