"""What BERT, RoBERTa and DistilBERT have in common: heads, post-norm blocks, learned positions.

Shapes: B batch, T tokens, D width, F MLP width, N heads, H head width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxforget.models.layers import ACTIVATIONS, Draws, Place, attend
from jaxforget.models.modules import Embedding, LayerNorm, Linear
from jaxforget.models.parts import MLP, Attention

ARCHITECTURES = {
    model_type: {
        "masked": f"{name}ForMaskedLM",
        "classification": f"{name}ForSequenceClassification",
        "none": f"{name}Model",
    }
    for model_type, name in (("bert", "Bert"), ("roberta", "Roberta"), ("distilbert", "DistilBert"))
}
# Settings that change the computation, and the one value of each that is implemented.
REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "per_layer_config": None,
}


class Top(nnx.Module):
    """What surrounds the blocks."""

    def __init__(self, config: Any, draws: Draws):
        D, std = config.hidden_size, config.initializer_range
        self.embed = Embedding(config.vocab_size, D, draws, std=std)
        self.positions = Embedding(config.max_position_embeddings, D, draws, std=std)
        if config.type_vocab_size:
            self.segments = Embedding(config.type_vocab_size, D, draws, std=std)
        self.embed_norm = LayerNorm(D, epsilon=config.layer_norm_eps)
        if config.head == "classification":
            self.pool = Linear(D, D, draws, std=std, bias=True)
            self.score = Linear(D, len(config.labels), draws, std=std, bias=True)
        elif config.head == "masked":
            self.transform = Linear(D, D, draws, std=std, bias=True)
            self.transform_norm = LayerNorm(D, epsilon=config.layer_norm_eps)
            if config.tie_word_embeddings:
                self.head = Tied(config.vocab_size)
            else:
                self.head = Linear(D, config.vocab_size, draws, std=std, bias=True)
        self.config = config

    def number(self, tokens_BT: jax.Array, place: Place) -> jax.Array:
        """Return the row of the position table for every token."""
        return place.positions_BT

    def start(self, tokens_BT: jax.Array, place: Place, length: Any, dtype: Any) -> tuple[jax.Array, None]:
        """Return x_BTD and what all blocks share: nothing."""
        types = self.config.type_vocab_size
        x_BTD = self.embed(tokens_BT, dtype) + self.positions(self.number(tokens_BT, place), dtype)
        if types:
            given = types > 1 and place.segments_BT is not None
            x_BTD += self.segments(place.segments_BT if given else jnp.zeros((1, 1), jnp.int32), dtype)
        return self.embed_norm(x_BTD), None

    def finish(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        c = self.config
        if c.head == "none":
            return x_BTD
        if c.head == "classification":
            return self.score(ACTIVATIONS[c.pooled_act](self.pool(x_BTD[:, 0])), jnp.float32)
        x_BTD = self.transform_norm(ACTIVATIONS[c.masked_act](self.transform(x_BTD)))
        if c.tie_word_embeddings:
            return self.head(x_BTD, self.embed.table.get_value())
        return self.head(x_BTD, jnp.float32)


class Tied(nnx.Module):
    """Score x against every row of the embedding, and add a bias."""

    def __init__(self, rows: int):
        self.bias = nnx.Param(jnp.zeros((rows,), jnp.float32))

    def __call__(self, x_BTD, table_VD):
        return attend(x_BTD, table_VD, self.bias.get_value())


class Block(nnx.Module):
    """Norms follow the sums."""

    def __init__(self, config: Any, draws: Draws):
        D, std, epsilon = config.hidden_size, config.initializer_range, config.layer_norm_eps
        self.attn = Attention(D, config.heads[0], draws, std=std, bias=True)
        self.attn_norm = LayerNorm(D, epsilon=epsilon)
        self.mlp = MLP(D, config.intermediate_size, draws, std=std, activation=config.hidden_act)
        self.mlp_norm = LayerNorm(D, epsilon=epsilon)

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(x_BTD, place, layer)
        x_BTD = self.attn_norm(x_BTD + y_BTD)
        return self.mlp_norm(x_BTD + self.mlp(x_BTD)), cache


BLOCKS = {"blocks": Block}


def module_keys(names: dict[str, str]) -> dict[str, tuple[str, bool]]:
    """Map the weight and the bias of embeddings, norms and dense layers. names: Hugging Face's -> ours."""
    table = {}
    for theirs, ours in names.items():
        if ours in ("embed", "positions", "segments"):
            table[f"{theirs}.weight"] = (f"{ours}/table", False)
            continue
        table[f"{theirs}.weight"] = (f"{ours}/scale", False) if ours.endswith("norm") else (f"{ours}/kernel", True)
        table[f"{theirs}.bias"] = (f"{ours}/bias", False)
    return table


def decoder_keys(config: Any, dense: str, bias: str) -> dict[str, tuple[str, bool]]:
    """Map the decoder of the masked head. Untied it has its own bias, and Hugging Face keeps `bias` without use."""
    table = {bias: ("head/bias", False)}
    return table if config.tie_word_embeddings else table | module_keys({dense: "head"})
