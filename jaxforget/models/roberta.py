"""RoBERTa: BERT with other positions, heads and names.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxforget.errors import UserError
from jaxforget.models import bert, encoder
from jaxforget.models.encoder import ARCHITECTURES, BLOCKS, Block, decoder_keys, module_keys
from jaxforget.models.layers import Place

__all__ = ["ARCHITECTURES", "BLOCKS", "IGNORED", "PREFIX", "Block", "Config", "Top", "keys"]
PREFIX = "roberta."  # absent from checkpoints of the bare model
IGNORED = (*bert.BACKBONE_IGNORED, r"lm_head\.(decoder\.(weight|bias)|bias)")  # copies that a tied decoder has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(bert.Config):
    """Fields, names and defaults of Hugging Face's RobertaConfig. Its dropout is not used here."""

    model_type: str = "roberta"
    vocab_size: int = 50265
    pad_token_id: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise UserError(
                f"config field pad_token_id is {self.pad_token_id}; it must be 0 or above, and the positions after it "
                f"below max_position_embeddings, which is {self.max_position_embeddings}"
            )

    # The rows of the position table up to that of padding stand for no position.
    max_length = property(lambda self: self.max_position_embeddings - self.pad_token_id - 1)
    masked_act = "gelu"


class Top(encoder.Top):
    """What surrounds the blocks."""

    def number(self, tokens_BT: jax.Array, place: Place) -> jax.Array:
        """Count the tokens that are not padding, from the row of the position table after that of padding."""
        real_BT = tokens_BT != self.config.pad_token_id
        return self.config.pad_token_id + real_BT * jnp.cumsum(real_BT, axis=1)


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = bert.backbone_keys(PREFIX)
    if config.head == "classification":
        return table | module_keys({"classifier.dense": "pool", "classifier.out_proj": "score"})
    if config.head == "masked":
        table |= module_keys({"lm_head.dense": "transform", "lm_head.layer_norm": "transform_norm"})
        table |= decoder_keys(config, "lm_head.decoder", "lm_head.bias")
    return table
