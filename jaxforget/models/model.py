"""A model as pure functions of nested dicts of arrays.

Shapes: B batch, T tokens, U cache slots, N key/value heads, H head width, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError
from jaxforget.models.layers import REMAT, Draws, Place, last_token, linear, run_blocks
from jaxforget.models.sharding import gather, pin

Params = dict[str, Any]
Cache = dict[str, jax.Array]
DTYPES = ("float32", "bfloat16")
_NO_WINDOW = 1 << 30


def family_of(model_type: str | None) -> Any:
    """Return the module that implements a model_type. Raises UserError listing the valid ones."""
    from jaxforget.models import FAMILIES  # here, because the module of the table imports this one

    if model_type not in FAMILIES:
        raise UserError(f"config field model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f"jaxforget.models.{FAMILIES[model_type]}")


def build(config: Any, **options: Any) -> Model:
    """Make the model of a family's config. options: dtype, scan_layers, remat."""
    return getattr(family_of(config.model_type), "MODEL", Model)(config, **options)


@functools.lru_cache(maxsize=256)
def functional(module: Any, config: Any) -> tuple[Callable[[jax.Array], Params], Callable[[Params, Any], Any]]:
    """Split a module class into `init(key) -> params` and `bind(params, dtype of activations) -> module`, both pure."""
    from flax import nnx  # here, because Flax takes half a second to import, which --help need not

    count = Draws()
    skeleton = nnx.split(nnx.eval_shape(lambda: module(config, count)))[0]

    def init(key):
        draws = Draws(jax.random.normal(key, (count.used,), jnp.float32))
        return nnx.to_pure_dict(nnx.split(module(config, draws))[1])

    return init, lambda params, dtype: nnx.merge(skeleton, gather(params, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _init(config, key):
    family = family_of(config.model_type)
    top_key, *stack_keys = jax.random.split(key, 1 + len(config.stacks))
    params = functional(family.Top, config)[0](top_key)
    for (stack, layers), stack_key in zip(config.stacks.items(), stack_keys, strict=True):
        keys_L = jax.random.split(stack_key, layers)
        params[stack] = jax.vmap(functional(family.BLOCKS[stack], config)[0])(keys_L)
    return pin(params)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of one stack of blocks: a config and how to compute it. Hashable, so it can be static under jit.

    config: the `Config` of a family. dtype: of activations; parameters and logits are float32. scan_layers:
    compile one block for all layers; unrolled compiles slower and may run faster with few layers. remat:
    what the backward pass computes again to save memory, a row of layers.REMAT.

    Padding stands on the right everywhere; `lengths_B` counts the real tokens of each row.
    """

    config: Any
    dtype: str = dataclasses.field(default="float32", kw_only=True)
    scan_layers: bool = dataclasses.field(default=True, kw_only=True)
    remat: str = dataclasses.field(default="none", kw_only=True)

    def __post_init__(self):
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:  # not a dtype at all
            name = repr(self.dtype)
        if name not in DTYPES:
            raise UserError(f"dtype is {name}; supported: {', '.join(DTYPES)}")
        object.__setattr__(self, "dtype", name)
        if self.remat not in REMAT:
            raise UserError(f"remat is {self.remat!r}; supported: {', '.join(REMAT)}")

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for. Learned positions end there, rotary ones go on."""
        return self.config.max_length

    def init(self, key: jax.Array) -> Params:
        """Draw float32 parameters with Hugging Face's standard deviations. Blocks have a leading L axis."""
        return _init(self.config, key)

    def shapes(self) -> Params:
        """Return the parameters' shapes and dtypes, computing nothing."""
        return jax.eval_shape(functools.partial(_init, self.config), jax.random.key(0))

    def logits(
        self,
        params: Params,
        tokens_BT: jax.Array,
        lengths_B: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Return float32 logits: (B, T, V) of language-model heads, (B, C) of classification.

        A causal model with a language-model head ignores `lengths_B`: right padding cannot change the logits of real
        tokens. (Except with the dynamic rope type beyond max_length: there every logit depends on T.) Without a head
        the result is the last hidden state (B, T, D) in dtype. Raises UserError where T exceeds learned positions.
        """
        T = tokens_BT.shape[1]
        limit = self.config.position_limit
        if limit is not None and T > limit:
            raise UserError(f"sequence length is {T}; this model has {limit} positions")
        place = Place(jnp.arange(T, dtype=jnp.int32)[None], self.config.causal, lengths_B, segments_BT)
        return self._run(params, tokens_BT, place, length=T, reach=T)[0]

    def batch_logits(self, params: Params, batch: Mapping[str, Any]) -> jax.Array:
        """Return `logits` of the columns of a batch: tokens, and length and segments where it has them."""
        return self.logits(params, batch["tokens"], batch.get("length"), batch.get("segments"))

    def stream(self, params: Params, batch: Mapping[str, Any], blocks: int) -> jax.Array:
        """Return the residual stream (B, T, D) in dtype after this many blocks; the others are not computed.

        params: may end with these blocks. For models that are one stack of blocks.
        """
        T = batch["tokens"].shape[1]
        place = Place(jnp.arange(T, dtype=jnp.int32)[None], self.config.causal, batch.get("length"),
                      batch.get("segments"))  # fmt: skip
        return self._run(params, batch["tokens"], place, length=T, reach=T, blocks=blocks)[0]

    @property
    def headless(self) -> Model:
        """Give the same model without its head: `logits` is then the last hidden state."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, head="none", labels=()))

    def pooled(self, params: Params, batch: Mapping[str, Any]) -> jax.Array:
        """Return what a classification head reads (B, D): the state of the first token, if causal of the last real one.

        params: of this model, or without its head.
        """
        bare = self.headless
        x_BTD = bare.batch_logits({name: params[name] for name in bare.shapes()}, batch)
        return last_token(x_BTD, batch.get("length")) if self.config.causal else x_BTD[:, 0]

    def classify(self, params: Params, pooled_BD: jax.Array) -> jax.Array:
        """Return float32 class logits (B, C) of what `pooled` gives; together they are `batch_logits`."""
        if self.config.causal:
            return linear(pooled_BD, params["score"]["kernel"], out_dtype=jnp.float32)
        top = {name: part for name, part in params.items() if name not in self.config.stacks}
        return functional(family_of(self.config.model_type).Top, self.config)[1](top, self.dtype).finish(
            pooled_BD[:, None], None
        )

    def init_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache of U = `length` positions: {"k", "v"}, each (L, B, U, N, H) in dtype."""
        _, heads, width = self.config.heads
        shape = (self.config.stacks["blocks"], batch, length, heads, width)
        return {name: jnp.zeros(shape, self.dtype) for name in ("k", "v")}

    def prefill(
        self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, new: int
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts, padded on the right, before `new` tokens are generated.

        Returns the logits after each prompt (B, V), the cache, and the position of the next token (B,).
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        valid_BT = positions_BT < lengths_B[:, None]
        cache = self.init_cache(B, T + new)
        logits_B1V, cache = self.cached(params, tokens_BT, cache, positions_BT, valid_BT, read_B=lengths_B - 1)
        return logits_B1V[:, 0], cache, lengths_B

    def cached(
        self,
        params: Params,
        tokens_BT: jax.Array,
        cache: Cache,
        positions_BT: jax.Array,
        valid_BT: jax.Array,
        read_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return float32 logits of new tokens that follow those in the cache, and the extended cache.

        positions_BT: position of each token in its own row, which is also its cache slot; a row must fill its
        positions from 0 without gaps. valid_BT: False for padding, wherever it stands; its logits mean
        nothing.
        read_B: the one column per row to return logits for, (B, 1, V), sparing the head for the others.
        """
        slots = cache["k"].shape[2]
        positions_BT = jnp.where(valid_BT, positions_BT, 0)
        place = Place(positions_BT, slots_BT=jnp.where(valid_BT, positions_BT, slots))
        length_B11 = jnp.max(positions_BT + 1, axis=1)[:, None, None]
        return self._run(params, tokens_BT, place, length=length_B11, reach=slots, cache=cache, read_B=read_B)

    def flops_per_token(self, length: int) -> float:
        """Return the forward FLOPs of one token in a sequence of this length, averaged over its positions.

        2 * (weights of all dense products, head included)
        + sum over layers of 4 * N * H * mean over t = 1..length of min(t, window).

        N query heads; 4 is two products, q with keys and scores with values; t is `length` where nothing is causal.
        The embedding look-up counts 0. A classification head counts as if it saw every token.
        """
        shapes = jax.tree_util.tree_leaves_with_path(self.shapes())
        weights = sum(leaf.size for path, leaf in shapes if path[-1].key == "kernel")
        if self.config.head in ("causal", "masked") and self.config.tie_word_embeddings:
            weights += self.shapes()["embed"]["table"].size
        N, _, H = self.config.heads
        t = np.arange(1, length + 1) if self.config.causal else np.full(1, length)
        seen = [np.minimum(t, window or length).mean() for window in self.config.windows]
        return float(2 * weights + 4 * N * H * sum(seen))

    def _run(
        self,
        params: Params,
        tokens_BT: jax.Array,
        place: Place,
        *,
        length: Any,
        reach: int,
        cache: Cache | None = None,
        read_B: jax.Array | None = None,
        blocks: int | None = None,
    ) -> tuple[jax.Array, Any]:
        family = family_of(self.config.model_type)
        top = functional(family.Top, self.config)[1]({k: v for k, v in params.items() if k != "blocks"}, self.dtype)
        bind = functional(family.BLOCKS["blocks"], self.config)[1]
        x_BTD, shared = top.start(tokens_BT, place, length, self.dtype)

        def body(x_BTD, block_params, layer):
            return bind(block_params, self.dtype)(x_BTD, shared, place, layer)

        layers_L = {"cache": cache, "window": self._windows(reach), "scale": self.config.scales}
        if layers_L["scale"] is not None:
            layers_L["scale"] = np.asarray(layers_L["scale"], np.float32)
        stack_L = params["blocks"]
        if blocks is not None:
            stack_L, layers_L = jax.tree.map(lambda x: x[:blocks], (stack_L, layers_L))
        x_BTD, cache = run_blocks(body, x_BTD, stack_L, layers_L, scan=self.scan_layers, remat=self.remat)
        if blocks is not None:
            return x_BTD, cache
        if read_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, read_B[:, None, None], axis=1)
        return top.finish(x_BTD, place), cache

    def _windows(self, reach: int) -> np.ndarray | None:
        """Return the window of each layer, or None where none is shorter than the `reach` keys there are."""
        windows = [_NO_WINDOW if window is None else window for window in self.config.windows]
        return None if min(windows) >= reach else np.asarray(windows, np.int32)
