"""BERT, and MiniLM, whose files say `bert`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxforget.models import configs
from jaxforget.models.encoder import ARCHITECTURES, BLOCKS, REQUIRED, Block, Top, decoder_keys, module_keys
from jaxforget.models.layers import ACTIVATIONS

__all__ = ["ARCHITECTURES", "BLOCKS", "IGNORED", "PREFIX", "Block", "Config", "Top", "keys"]
PREFIX = "bert."  # absent from checkpoints of the bare model
BACKBONE_IGNORED = (r"embeddings\.(position|token_type)_ids", r"pooler\.dense\.(weight|bias)")  # where not used
# The other head of pretraining, and the copies that a tied decoder has.
IGNORED = (*BACKBONE_IGNORED, r"cls\.(seq_relationship|predictions(\.decoder)?)\.(weight|bias)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields, names and defaults of Hugging Face's BertConfig. Its dropout is not used here."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True
    head: str = "masked"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, [type(self).model_type])
        configs.check_head(self, ARCHITECTURES)
        configs.choose("hidden_act", self.hidden_act, ACTIVATIONS)
        configs.positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        configs.positive(self, "num_attention_heads", "max_position_embeddings", "type_vocab_size")
        configs.divides(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.only(raw, **REQUIRED)
        if raw.get("architectures") == ["BertForPreTraining"]:  # the masked head, and one that is not used
            raw = raw | {"architectures": ["BertForMaskedLM"]}
        return configs.read(cls, raw, **configs.head_from(raw, ARCHITECTURES[cls.model_type]))

    def to_hf(self) -> dict[str, Any]:
        return configs.write(self, ARCHITECTURES)

    # What `Model` asks of every family.
    causal = False
    stacks = property(lambda self: {"blocks": self.num_hidden_layers})
    max_length = property(lambda self: self.max_position_embeddings)
    position_limit = property(lambda self: self.max_length)  # learned positions end here
    windows = property(lambda self: (None,) * self.num_hidden_layers)
    scales = property(lambda self: None)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head width."""
        N = self.num_attention_heads
        return N, N, self.hidden_size // N

    # What `Top` asks besides.
    masked_act = property(lambda self: self.hidden_act)
    pooled_act = "tanh"


# Modules of the backbone by their Hugging Face names, after PREFIX. `{}` is the layer number.
_BACKBONE = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "embed_norm",
    "encoder.layer.{}.attention.self.query": "blocks/attn/q",
    "encoder.layer.{}.attention.self.key": "blocks/attn/k",
    "encoder.layer.{}.attention.self.value": "blocks/attn/v",
    "encoder.layer.{}.attention.output.dense": "blocks/attn/o",
    "encoder.layer.{}.attention.output.LayerNorm": "blocks/attn_norm",
    "encoder.layer.{}.intermediate.dense": "blocks/mlp/up",
    "encoder.layer.{}.output.dense": "blocks/mlp/down",
    "encoder.layer.{}.output.LayerNorm": "blocks/mlp_norm",
}


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = backbone_keys(PREFIX)
    if config.head == "classification":
        return table | module_keys({"bert.pooler.dense": "pool", "classifier": "score"})
    if config.head == "masked":
        transform = {"dense": "transform", "LayerNorm": "transform_norm"}
        table |= module_keys({f"cls.predictions.transform.{theirs}": ours for theirs, ours in transform.items()})
        table |= decoder_keys(config, "cls.predictions.decoder", "cls.predictions.bias")
    return table


def backbone_keys(prefix: str) -> dict[str, tuple[str, bool]]:
    return module_keys({prefix + theirs: ours for theirs, ours in _BACKBONE.items()})
