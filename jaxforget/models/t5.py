"""T5: the original, and version 1.1 and what was made of it (Flan-T5, LM-adapted).

Shapes: B batch, T tokens (queries), U tokens (keys), D width, F MLP width, N heads, H head width, V vocabulary.

Attention scores are not scaled. They get a bias that depends on the distance between query and key, by buckets: one
table for all encoder layers, one for all decoder layers, none in cross-attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxforget.errors import UserError
from jaxforget.models import configs
from jaxforget.models.layers import ACTIVATIONS, Draws, Place, attention, self_attention
from jaxforget.models.modules import Embedding, Linear, RMSNorm
from jaxforget.models.seq2seq import Seq2Seq

MODEL = Seq2Seq
ARCHITECTURES = {"t5": {"seq2seq": "T5ForConditionalGeneration", "none": "T5Model"}}
PREFIX = ""
IGNORED = (  # copies of the shared table, and one that the first checkpoints have and nothing uses
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
# Settings that change the computation, and the one value of each that is implemented.
_REQUIRED = {"is_decoder": False, "is_encoder_decoder": True, "pruned_heads": {}, "per_layer_config": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields and defaults of Hugging Face's T5Config, and what its files say besides. Its dropout is not used here."""

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # or "gated-relu"; so for every activation
    n_positions: int = 512  # of older files; a length to train at, not a limit
    decoder_start_token_id: int = 0
    tie_word_embeddings: bool = True  # False in version 1.1
    scale_decoder_outputs: bool | None = None  # by D ** -0.5, before the head; older files mean tie_word_embeddings
    head: str = "seq2seq"
    labels: tuple[str, ...] = ()
    source: str = configs.source_field()

    def __post_init__(self):
        configs.choose("model_type", self.model_type, ARCHITECTURES)
        configs.check_head(self, ARCHITECTURES)
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings)
        projections = [*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]
        configs.choose("feed_forward_proj", self.feed_forward_proj, projections)
        configs.positive(self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
        configs.positive(self, "n_positions")
        if self.relative_attention_num_buckets < 4:
            raise UserError(
                f"config field relative_attention_num_buckets is {self.relative_attention_num_buckets}; "
                "it must be at least 4"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise UserError(
                f"config field relative_attention_max_distance is {self.relative_attention_max_distance}; it must be "
                f"above half of relative_attention_num_buckets, which is {self.relative_attention_num_buckets}"
            )
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise UserError(
                f"config field decoder_start_token_id is {self.decoder_start_token_id}; "
                f"it must be at least 0 and below vocab_size, which is {self.vocab_size}"
            )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Config:
        configs.only(raw, **_REQUIRED)
        if raw.get("architectures") == ["T5WithLMHeadModel"]:  # the first name of the same
            raw = raw | {"architectures": ["T5ForConditionalGeneration"]}
        start = {"decoder_start_token_id": raw.get("pad_token_id")}
        config = configs.read(cls, raw, defaults=start, **configs.head_from(raw, ARCHITECTURES["t5"]))
        configs.only(raw, dense_act_fn=config.activation, is_gated_act=config.gated)  # they repeat feed_forward_proj
        return config

    def to_hf(self) -> dict[str, Any]:
        return configs.write(self, ARCHITECTURES) | {"is_encoder_decoder": True}

    # What `Seq2Seq` asks of every family.
    causal = False  # in the source
    stacks = property(lambda self: {"encoder": self.num_layers, "decoder": self.num_decoder_layers})
    max_length = property(lambda self: self.n_positions)
    position_limit = property(lambda self: None)  # the last bucket takes all distances
    heads = property(lambda self: (self.num_heads, self.num_heads, self.d_kv))

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """A row of ACTIVATIONS. Version 1.1 says gelu and means its approximation."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


def settle(config: Config, names: Container[str]) -> Config:
    """Return the config that the names in a file call for.

    transformers 5 writes tie_word_embeddings true whatever the model does; it unties a head that the file has.
    Where outputs are scaled, `lm_head.weight` is the copy that old files have, and not used.
    """
    if config.scale_decoder_outputs or "lm_head.weight" not in names:
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


class Top(nnx.Module):
    """What surrounds the blocks of both stacks."""

    def __init__(self, config: Config, draws: Draws):
        D, N, factor = config.d_model, config.num_heads, config.initializer_factor
        buckets = config.relative_attention_num_buckets
        self.embed = Embedding(config.vocab_size, D, draws, std=factor)
        self.encoder_bias, self.decoder_bias = (Embedding(buckets, N, draws, std=factor * D**-0.5) for _ in range(2))
        self.encoder_norm, self.decoder_norm = (_norm(config) for _ in range(2))
        if config.head == "seq2seq" and not config.tie_word_embeddings:
            self.head = Linear(D, config.vocab_size, draws, std=factor, bias=False)
        self.config = config

    def start(self, tokens_BT: jax.Array, place: Place, length: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Return x_BTD and what all blocks share: the bias of self-attention over `length` keys, (B, N, T, U)."""
        c = self.config
        bias = self.decoder_bias if place.causal else self.encoder_bias
        reach = c.relative_attention_max_distance
        buckets = _buckets(c.relative_attention_num_buckets, reach, bidirectional=not place.causal)
        offsets_BTU = jnp.arange(length, dtype=jnp.int32)[None, None] - place.positions_BT[:, :, None]
        buckets_BTU = jnp.asarray(buckets)[jnp.clip(offsets_BTU, -reach, reach) + reach]
        return self.embed(tokens_BT, dtype), jnp.transpose(bias(buckets_BTU, jnp.float32), (0, 3, 1, 2))

    def finish(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        c = self.config
        if not place.causal:
            return self.encoder_norm(x_BTD)
        x_BTD = self.decoder_norm(x_BTD)
        if c.head == "none":
            return x_BTD
        if c.scale_decoder_outputs:
            x_BTD = x_BTD * c.d_model**-0.5
        return self.embed.attend(x_BTD) if c.tie_word_embeddings else self.head(x_BTD, jnp.float32)


@functools.cache
def _buckets(count: int, reach: int, *, bidirectional: bool) -> np.ndarray:
    """Return the bucket of every offset from -reach to reach, key minus query. Source: arXiv 1910.10683, section 2.1.

    Half of the buckets are single distances, the others widen to `reach` by logarithm. Bidirectional: the upper half of
    all is for keys after the query; otherwise these share bucket 0. Made here and not on the device, because a last
    bit of the logarithm, in float32 as in Hugging Face, decides about distances between two buckets.
    """
    offset = np.arange(-reach, reach + 1)
    side = count // 2 if bidirectional else count
    distance = np.abs(offset) if bidirectional else np.maximum(-offset, 0)
    exact = side // 2
    ratio = np.log(np.maximum(distance, exact) / exact).astype(np.float32) / np.float32(math.log(reach / exact))
    wide = np.minimum(exact + (ratio * np.float32(side - exact)).astype(np.int32), side - 1)
    after = side if bidirectional else 0
    return (np.where(distance < exact, distance, wide) + np.where(offset > 0, after, 0)).astype(np.int32)


class Attention(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        D, factor = config.d_model, config.initializer_factor
        N, _, H = config.heads
        self.q = Linear(D, N * H, draws, std=factor * (D * H) ** -0.5, bias=False)
        self.k = Linear(D, N * H, draws, std=factor * D**-0.5, bias=False)
        self.v = Linear(D, N * H, draws, std=factor * D**-0.5, bias=False)
        self.o = Linear(N * H, D, draws, std=factor * (N * H) ** -0.5, bias=False)
        self.width = H

    def __call__(self, x_BTD, bias_BNTU, place, layer):
        """Attend over the own stack's tokens. Returns (y_BTD, new cache or None)."""
        q, k, v = (self.split(part(x_BTD)) for part in (self.q, self.k, self.v))
        y_BTNH, cache = self_attention(q, k, v, place, layer, scale=1.0, bias_BNTU=bias_BNTU)
        return self.join(y_BTNH), cache

    def across(self, x_BTD: jax.Array, source: dict[str, Any]) -> jax.Array:
        """Attend over the other stack's tokens, of which `source` holds k, v and mask."""
        q_BTNH = self.split(self.q(x_BTD))
        return self.join(attention(q_BTNH, source["k"], source["v"], causal=False, mask_BTU=source["mask"], scale=1.0))

    def read(self, x_BUD: jax.Array) -> dict[str, jax.Array]:
        """Return the keys and values of another stack's tokens."""
        return {"k": self.split(self.k(x_BUD)), "v": self.split(self.v(x_BUD))}

    def split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.width)

    def join(self, y_BTNH: jax.Array) -> jax.Array:
        return self.o(y_BTNH.reshape(*y_BTNH.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        D, F, factor = config.d_model, config.d_ff, config.initializer_factor
        if config.gated:
            self.gate = Linear(D, F, draws, std=factor * D**-0.5, bias=False)
        self.up = Linear(D, F, draws, std=factor * D**-0.5, bias=False)
        self.down = Linear(F, D, draws, std=factor * F**-0.5, bias=False)
        self.activation, self.gated = config.activation, config.gated

    def __call__(self, x_BTD):
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.gate(x_BTD)) * self.up(x_BTD) if self.gated else act(self.up(x_BTD)))


class EncoderBlock(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        self.attn_norm, self.mlp_norm = _norm(config), _norm(config)
        self.attn = Attention(config, draws)
        self.mlp = MLP(config, draws)

    def __call__(self, x_BTD, shared, place, layer):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), shared, place, layer)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class DecoderBlock(nnx.Module):
    def __init__(self, config: Config, draws: Draws):
        self.attn_norm, self.cross_norm, self.mlp_norm = (_norm(config) for _ in range(3))
        self.attn, self.cross = (Attention(config, draws) for _ in range(2))
        self.mlp = MLP(config, draws)

    def read(self, x_BUD: jax.Array) -> dict[str, jax.Array]:
        return self.cross.read(x_BUD)

    def __call__(self, x_BTD, shared, place, layer, source):
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), shared, place, layer)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.cross.across(self.cross_norm(x_BTD), source)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


BLOCKS = {"encoder": EncoderBlock, "decoder": DecoderBlock}


def _norm(config: Config) -> RMSNorm:
    norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)
    norm.scale[...] *= config.initializer_factor
    return norm


def keys(config: Config) -> dict[str, tuple[str, bool]]:
    """Map Hugging Face names to (path, transposed). `{}` is the layer number, stacked on the leading axis."""
    table = {"shared.weight": ("embed/table", False)}
    mlp = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    parts = {"SelfAttention": "attn", "EncDecAttention": "cross", "DenseReluDense": "mlp"}
    for stack, names in (("encoder", ("SelfAttention", "DenseReluDense")), ("decoder", tuple(parts))):
        table[f"{stack}.final_layer_norm.weight"] = (f"{stack}_norm/scale", False)
        first = f"{stack}.block.0.layer.0.SelfAttention"  # Hugging Face keeps the table in the first block
        table[f"{first}.relative_attention_bias.weight"] = (f"{stack}_bias/table", False)
        for i, name in enumerate(names):
            theirs, ours = f"{stack}.block.{{}}.layer.{i}", f"{stack}/{parts[name]}"
            table[f"{theirs}.layer_norm.weight"] = (f"{ours}_norm/scale", False)
            dense = mlp | {"wo": "down"} if ours.endswith("mlp") else {part: part for part in "qkvo"}
            for part, path in dense.items():
                table[f"{theirs}.{name}.{part}.weight"] = (f"{ours}/{path}/kernel", True)
    if config.head == "seq2seq" and not config.tie_word_embeddings:
        table["lm_head.weight"] = ("head/kernel", True)
    return table
