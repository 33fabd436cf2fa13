"""A model of two stacks as pure functions: an encoder reads a source, a decoder writes a target.

Shapes: B batch, T tokens of the text at hand, U tokens of the source or cache slots, D width, N heads, H head width,
V vocabulary, L layers.

The family of such a model has the BLOCKS "encoder" and "decoder". Its `Top` serves both, told apart by `place.causal`,
and `Top.start` gets the number of keys of self-attention as `length`. A decoder block has `read(x_BUD) -> {"k", "v"}`,
which turns the encoded source into keys and values, and is called with these and `mask` as its fifth argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxforget.models.layers import Place, key_mask, run_blocks
from jaxforget.models.model import Cache, Model, Params, family_of, functional

_PLAIN = {"window": None, "scale": None}  # what self_attention asks of a layer, besides its cache


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Model):
    """An encoder-decoder. The source is padded on the right, and so is the target."""

    def logits(  # type: ignore[override]  # a target is needed; whoever has a Model calls `batch_logits`
        self,
        params: Params,
        tokens_BT: jax.Array,
        lengths_B: jax.Array | None = None,
        *,
        decoder_tokens_BT: jax.Array,
    ) -> jax.Array:
        """Return float32 logits (B, T, V) after each token of the target; T is that of `decoder_tokens_BT`.

        tokens_BT: the source; lengths_B counts its real tokens. decoder_tokens_BT: the start token and then the target
        without its last. Padding of the target is not masked: no real token looks right. Without a head the result
        is the decoder's last hidden state (B, T, D) in dtype.
        """
        source_BUD = self.encode(params, tokens_BT, lengths_B)
        T = decoder_tokens_BT.shape[1]
        place = Place(jnp.arange(T, dtype=jnp.int32)[None])
        source = (source_BUD, lengths_B)
        return self._run(params, decoder_tokens_BT, place, length=T, reach=T, source=source)[0]

    def batch_logits(self, params: Params, batch: Mapping[str, Any]) -> jax.Array:
        """Return `logits` of the columns tokens, length and decoder_tokens of a batch."""
        return self.logits(params, batch["tokens"], batch.get("length"), decoder_tokens_BT=batch["decoder_tokens"])

    def encode(self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        """Return what the decoder sees of a source: (B, T, D) in dtype."""
        T = tokens_BT.shape[1]
        place = Place(jnp.arange(T, dtype=jnp.int32)[None], causal=False, lengths_B=lengths_B)
        top, bind = self._modules(params, "encoder")
        x_BTD, shared = top.start(tokens_BT, place, T, self.dtype)

        def body(x_BTD, block_params, layer):
            return bind(block_params, self.dtype)(x_BTD, shared, place, layer)

        x_BTD, _ = self._blocks(body, x_BTD, params["encoder"], {"cache": None, **_PLAIN})
        return top.finish(x_BTD, place)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Return the decoder's empty cache of U = `length` positions. `prefill` adds what belongs to the source."""
        _, heads, width = self.config.heads
        shape = (self.config.stacks["decoder"], batch, length, heads, width)
        return {name: jnp.zeros(shape, self.dtype) for name in ("k", "v")}

    def prefill(
        self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, new: int
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Encode sources, padded on the right, and feed the start token before `new` tokens are generated.

        Returns the logits of the first token (B, V), the cache, and the position that it will take (B,), which is 1.
        The cache holds, besides the decoder's keys and values, `source`, those of cross-attention, each (L, B, U, N, H)
        and computed here once, and `lengths` (B,) of the sources.
        """
        B = tokens_BT.shape[0]
        source_BUD = self.encode(params, tokens_BT, lengths_B)
        bind = self._modules(params, "decoder")[1]

        def read(x_BUD, block_params, _):
            return x_BUD, bind(block_params, self.dtype).read(x_BUD)

        _, source_L = self._blocks(read, source_BUD, params["decoder"], None)
        cache = self.init_cache(B, 1 + new) | {"source": source_L, "lengths": lengths_B}
        start_B1 = jnp.full((B, 1), self.config.decoder_start_token_id, jnp.int32)
        positions_B1 = jnp.zeros((B, 1), jnp.int32)
        logits_B1V, cache = self.cached(params, start_B1, cache, positions_B1, positions_B1 == 0)
        return logits_B1V[:, 0], cache, jnp.ones((B,), jnp.int32)

    def flops_per_token(self, length: int) -> float:
        """Return the forward FLOPs of one token of the source and one of the target, both texts of this length.

        2 * (weights of all dense products, head included)
        + 4 * N * H * (encoder layers * length + decoder layers * (length + mean over t = 1..length of t)).

        The keys and values of cross-attention, products of the source, are among the dense ones. Look-ups count 0.
        """
        shapes = jax.tree_util.tree_leaves_with_path(self.shapes())
        weights = sum(leaf.size for path, leaf in shapes if path[-1].key == "kernel")
        if self.config.head == "seq2seq" and self.config.tie_word_embeddings:
            weights += self.shapes()["embed"]["table"].size
        N, _, H = self.config.heads
        layers = self.config.stacks
        seen = layers["encoder"] * length + layers["decoder"] * (length + (length + 1) / 2)
        return float(2 * weights + 4 * N * H * seen)

    def _run(  # type: ignore[override]  # of no use to `stream`, which asks for the first `blocks` of one stack
        self,
        params: Params,
        tokens_BT: jax.Array,
        place: Place,
        *,
        length: Any,
        reach: int,
        cache: Cache | None = None,
        read_B: jax.Array | None = None,
        source: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Run the decoder. source: (encoded source, its lengths), where there is no cache that holds them."""
        top, bind = self._modules(params, "decoder")
        x_BTD, shared = top.start(tokens_BT, place, reach, self.dtype)
        layers_L: dict[str, Any] = {"cache": None, "source": None, **_PLAIN}
        if cache is None:
            source_BUD, lengths_B = source
            slots = source_BUD.shape[1]
        else:
            source_BUD, lengths_B = None, cache["lengths"]
            slots = cache["source"]["k"][0].shape[1]
            layers_L |= {"cache": {"k": cache["k"], "v": cache["v"]}, "source": cache["source"]}
        mask_B1U = None if lengths_B is None else key_mask(lengths_B, slots)

        def body(x_BTD, block_params, layer):
            block = bind(block_params, self.dtype)
            read = layer["source"] or block.read(source_BUD)
            return block(x_BTD, shared, place, layer, {**read, "mask": mask_B1U})

        x_BTD, new = self._blocks(body, x_BTD, params["decoder"], layers_L)
        if read_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, read_B[:, None, None], axis=1)
        return top.finish(x_BTD, place), None if cache is None else cache | new

    def _modules(self, params: Params, stack: str) -> tuple[Any, Callable[[Params, Any], Any]]:
        """Return what surrounds the blocks, and the function that binds parameters to a block of this stack."""
        family, stacks = family_of(self.config.model_type), self.config.stacks
        top = functional(family.Top, self.config)[1]({k: v for k, v in params.items() if k not in stacks}, self.dtype)
        return top, functional(family.BLOCKS[stack], self.config)[1]

    def _blocks(self, body, x, params_L, layers_L):
        return run_blocks(body, x, params_L, layers_L, scan=self.scan_layers, remat=self.remat)
