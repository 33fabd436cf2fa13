"""Every operation that touches a parameter, and the attention that joins them.

Shapes: B batch, T tokens (queries), U tokens (keys), D model width, N heads, H head width, F output width, V
vocabulary, L layers, M rows of a flattened product.

Parameters are float32. An operation casts them to the dtype of its input; norms, softmax and logits are
float32. A parameter is read only by the functions `linear`, `embed`, `attend`, `layer_norm` and `rms_norm`:
whoever wants to observe or change how parameters act has these five places to look at. The modules in modules.py
only own the arrays. Two kinds of leaf may stand where an array is expected: LowRank acts as another kernel, and Tapped
acts as the same and tells what each example does to its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxforget.models import sharding


# ---------------------------------------------------------------------------------------------- operations
@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel that acts as kernel + scale * a @ b without forming the sum. Source: arXiv 2106.09685.

    kernel: (D, F), a: (D, R), b: (R, F), all with the same leading axes. It stands wherever a `kernel` leaf may.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float

    shape = property(lambda self: self.kernel.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "tap"], meta_fields=["spec"])
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A parameter that tells, in the backward pass, what each example does to its gradient.

    value: the parameter; it acts as if it stood here itself. tap: zeros that no result depends on. Their cotangent is
    what `spec.rule(use, a, b, shape)` returns: given the kind of use, one of product x @ p, gather p[x], score x @ p.T,
    scale x * p and shift x + p; what the parameter met, (M, D), or ids (M,), or None for a shift; the cotangent of what
    came out; the parameter's shape. Several uses add up, as cotangents do, but a dict has a tap for each kind of use.
    Leaves of stacked blocks have a leading L in both. See privacy/taps.py.
    """

    value: Any
    tap: Any
    spec: Any  # hashable: `rows`, the B of every batch that it meets, and `rule`

    shape = property(lambda self: self.value.shape)


def _value(parameter):
    # Stopped: what a use does to the gradient is told by the tap, and any other way to it can be noticed.
    return jax.lax.stop_gradient(parameter.value) if isinstance(parameter, Tapped) else parameter


def _tell(parameter: Any, use: str, a: jax.Array | None, y: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Return y, the result of a use; a Tapped parameter learns of it. lead: the axes that M was flattened from."""
    if not isinstance(parameter, Tapped):
        return y
    if not lead or lead[0] != parameter.spec.rows:
        raise ValueError(f"a parameter meets a batch of shape {lead}, not of {parameter.spec.rows} rows: what an "
                         "example does to its gradient is not told apart")  # fmt: skip
    tap = parameter.tap[use] if isinstance(parameter.tap, dict) else parameter.tap
    return _tapped((parameter.spec, use, parameter.shape), y, a, tap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(how, y, a, tap):
    return y


def _tapped_bwd(how, a, dy):
    spec, use, shape = how
    return dy, None, spec.rule(use, a, dy, shape)


_tapped.defvjp(lambda how, y, a, tap: (y, a), _tapped_bwd)


def merge(params: Any) -> Any:
    """Replace every LowRank leaf of a pytree by the kernel that it acts as, a float32 array."""

    def dense(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        return leaf.kernel + leaf.scale * jnp.matmul(leaf.a, leaf.b, precision="highest")

    return jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, LowRank))


def linear(x: jax.Array, kernel: Any, bias: Any = None, *, out_dtype: Any = None) -> jax.Array:
    """Return x @ kernel + bias. x: (..., D), kernel: (D, F), result: (..., F) in out_dtype or that of x."""
    # XLA on CPU runs the backward pass of a 3-D product slowly: flatten first.
    x_MD, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if isinstance(kernel, LowRank):
        x_MR = _product(x_MD, kernel.a, None, lead)
        y_MF = _product(x_MD, kernel.kernel, out_dtype, lead)
        y_MF = y_MF + kernel.scale * _product(x_MR, kernel.b, out_dtype, lead)
    else:
        y_MF = _product(x_MD, kernel, out_dtype, lead)
    if bias is not None:
        y_MF = _shift(y_MF, bias, lead)
    return y_MF.reshape(*lead, kernel.shape[-1])


def _product(x_MD, kernel, out_dtype, lead):
    y_MF = jnp.matmul(x_MD, _value(kernel).astype(x_MD.dtype), preferred_element_type=out_dtype)
    return _tell(kernel, "product", x_MD, y_MF, lead)


def _shift(y_MF, bias_F, lead):
    return _tell(bias_F, "shift", None, y_MF + _value(bias_F).astype(y_MF.dtype)[None, :], lead)


def embed(table_VD: Any, tokens_BT: jax.Array, *, dtype: Any) -> jax.Array:
    """Look up rows. An id outside the table gives NaN, never another row."""
    if isinstance(table_VD, Tapped):  # ids that all examples share are still looked up by each
        tokens_BT = jnp.broadcast_to(tokens_BT, (table_VD.spec.rows, *tokens_BT.shape[1:]))
    y = jnp.take(_value(table_VD), tokens_BT, axis=0, mode="fill").astype(dtype)
    return _tell(table_VD, "gather", tokens_BT.reshape(-1), y, tokens_BT.shape)


def attend(x_BTD: jax.Array, table_VD: Any, bias_V: Any = None) -> jax.Array:
    """Score x against every row of the table: the tied output head. Returns float32 (B, T, V)."""
    x_MD, lead = x_BTD.reshape(-1, x_BTD.shape[-1]), x_BTD.shape[:-1]
    y_MV = jax.lax.dot_general(
        x_MD, _value(table_VD).astype(x_BTD.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    y_MV = _tell(table_VD, "score", x_MD, y_MV, lead)
    if bias_V is not None:
        y_MV = _shift(y_MV, bias_V, lead)
    return y_MV.reshape(*lead, table_VD.shape[0])


def layer_norm(x: jax.Array, scale_D: Any, bias_D: Any, *, epsilon: float) -> jax.Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift. Computed in float32."""
    x_MD, lead = x.astype(jnp.float32).reshape(-1, x.shape[-1]), x.shape[:-1]
    x_MD = x_MD - jnp.mean(x_MD, axis=-1, keepdims=True)
    x_MD = x_MD * jax.lax.rsqrt(jnp.mean(jnp.square(x_MD), axis=-1, keepdims=True) + epsilon)
    return _shift(_scale(x_MD, scale_D, lead), bias_D, lead).astype(x.dtype).reshape(x.shape)


def rms_norm(x: jax.Array, scale_D: Any, *, epsilon: float) -> jax.Array:
    """Divide by the root mean square of the last axis, then scale, in float32. Source: arXiv 1910.07467."""
    x_MD, lead = x.astype(jnp.float32).reshape(-1, x.shape[-1]), x.shape[:-1]
    x_MD = x_MD * jax.lax.rsqrt(jnp.mean(jnp.square(x_MD), axis=-1, keepdims=True) + epsilon)
    return _scale(x_MD, scale_D, lead).astype(x.dtype).reshape(x.shape)


def _scale(x_MD, scale_D, lead):
    return _tell(scale_D, "scale", x_MD, x_MD * _value(scale_D)[None, :], lead)


# --------------------------------------------------------------------------------------------------- draws
class Draws:
    """Standard normal numbers for the parameters of one module, handed out as each is made.

    They are slices of one vector, because one large draw compiles several times faster than one per
    parameter. Without a vector only their number is counted.
    """

    def __init__(self, normal_M=None):
        self.normal_M = normal_M
        self.used = 0

    def __call__(self, shape):
        start, self.used = self.used, self.used + math.prod(shape)
        if self.normal_M is None:
            return jnp.zeros(shape, jnp.float32)
        return self.normal_M[start : self.used].reshape(shape)


# ----------------------------------------------------------------------------------------------- attention
class Place(NamedTuple):
    """Where the tokens of a call stand.

    positions_BT: position of every token; B is 1 where all rows agree.
    causal: whether a token sees only itself and those before it.
    lengths_B: real tokens of each row, which stand before its padding. None: all are real.
    segments_BT: which of two joined texts a token belongs to (token types). None: the first.
    slots_BT: cache slot each token is written to, out of range for a token to leave out. None without a
    cache.
    """

    positions_BT: jax.Array
    causal: bool = True
    lengths_B: jax.Array | None = None
    segments_BT: jax.Array | None = None
    slots_BT: jax.Array | None = None


def visible(positions_BT: jax.Array, slots: int, window: jax.Array | None = None) -> jax.Array:
    """Return mask_BTU: the query at position p sees key slots u with p - window < u <= p."""
    u = jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    p = positions_BT[:, :, None]
    mask_BTU = u <= p
    return mask_BTU if window is None else mask_BTU & (u > p - window)


def key_mask(lengths_B: jax.Array, slots: int) -> jax.Array:
    """Return mask_B1U: every query sees the real tokens of its row."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None, :] < lengths_B[:, None, None]


def attention(
    q_BTNH: jax.Array,
    k_BUNH: jax.Array,
    v_BUNH: jax.Array,
    *,
    causal: bool,
    mask_BTU: jax.Array | None = None,
    bias_BNTU: jax.Array | None = None,
    window: jax.Array | None = None,
    scale: float | jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; the one place that decides how it is computed. It takes fewer key/value heads too.

    causal: query t sees keys up to t, and nothing else is needed for right padding, since no real token looks right.
    mask_BTU: True where a query may look (T may be 1); given, it says everything and `causal` is not consulted.
    bias_BNTU: added to the scaled scores (B may be 1). window: causal and sees the last `window` keys, itself
    included; may be traced. scale: factor on q.k, default H ** -0.5; may be traced, as some families scale by layer.
    """
    plain = mask_BTU is None and bias_BNTU is None and window is None
    if plain and _fused(q_BTNH, k_BUNH, scale):
        return jax.nn.dot_product_attention(
            q_BTNH, k_BUNH, v_BUNH, is_causal=causal, scale=scale, implementation="cudnn"
        )
    if mask_BTU is None and causal:
        positions_BT = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None]
        mask_BTU = visible(positions_BT, k_BUNH.shape[1], window)
    return _matmul_attention(q_BTNH, k_BUNH, v_BUNH, mask_BTU, bias_BNTU, scale)


def _fused(q_BTNH: jax.Array, k_BUNH: jax.Array, scale: float | jax.Array | None) -> bool:
    """Say whether cuDNN's flash attention computes this call: on GPUs, in half precision, without any mask.

    Masks are left to XLA: under vmap cuDNN refuses some of them, others in each version of jax, and a materialised
    mask spends the memory that flash attention saves. Lengths must agree and be even, heads be at most 128 wide.
    """
    width, length = q_BTNH.shape[-1], q_BTNH.shape[1]
    return (
        jax.default_backend() == "gpu"
        and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        and length == k_BUNH.shape[1]
        and length % 2 == 0
        and width % 8 == 0
        and width <= 128
        and (scale is None or isinstance(scale, float))
    )


def _matmul_attention(q_BTNH, k_BUKH, v_BUKH, mask_BTU, bias_BNTU, scale):
    """Attend by two batched products over contiguous heads, K of them for keys and values, G queries to each.

    On a CPU the gradient takes 0.36 of the time of jax.nn.dot_product_attention (T 256, 8 heads of 8), since heads come
    before tokens in memory and the softmax divides its (B, N, T, H) result instead of the (B, N, T, U) weights.
    """
    B, T, N, H = q_BTNH.shape
    U, K = k_BUKH.shape[1:3]
    G = N // K
    q_BKMH = jnp.transpose(q_BTNH.reshape(B, T, K, G, H), (0, 2, 3, 1, 4)).reshape(B, K, G * T, H)
    k_BKHU = jnp.transpose(k_BUKH, (0, 2, 3, 1))
    v_BKUH = jnp.transpose(v_BUKH, (0, 2, 1, 3))
    scores = jnp.matmul(q_BKMH, k_BKHU, preferred_element_type=jnp.float32).reshape(B, K, G, T, U)
    scores = scores * (H**-0.5 if scale is None else scale)
    if bias_BNTU is not None:
        scores = scores + bias_BNTU.reshape(-1, K, G, *bias_BNTU.shape[2:])
    if mask_BTU is not None:
        scores = jnp.where(mask_BTU[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total_BKM1 = jnp.sum(weights, axis=-1).reshape(B, K, G * T, 1)
    weights_BKMU = weights.astype(v_BKUH.dtype).reshape(B, K, G * T, U)
    y_BKMH = jnp.matmul(weights_BKMU, v_BKUH, preferred_element_type=jnp.float32) / total_BKM1
    y_BTKGH = jnp.transpose(y_BKMH.astype(q_BTNH.dtype).reshape(B, K, G, T, H), (0, 3, 1, 2, 4))
    return y_BTKGH.reshape(B, T, N, H)


def self_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    place: Place,
    layer: dict[str, Any],
    *,
    scale: float | jax.Array | None = None,
    bias_BNTU: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Attend over the tokens of this call or over a cache. Returns (y_BTNH, new cache or None).

    layer: `window` and `scale` as in `attention`; `cache`: None or {"k", "v"}, each (B, U, N, H), where slot
    u holds the key of position u. scale, where given, replaces the layer's.
    """
    cache, scale = layer["cache"], layer["scale"] if scale is None else scale
    if cache is None:
        masked = not place.causal and place.lengths_B is not None
        y_BTNH = attention(
            q_BTNH, k_BTNH, v_BTNH, causal=place.causal, window=layer["window"], scale=scale, bias_BNTU=bias_BNTU,
            mask_BTU=key_mask(place.lengths_B, k_BTNH.shape[1]) if masked else None,
        )  # fmt: skip
        return y_BTNH, None
    rows_B1 = jnp.arange(q_BTNH.shape[0])[:, None]
    cache = {
        name: cache[name].at[rows_B1, place.slots_BT].set(new.astype(cache[name].dtype), mode="drop")
        for name, new in (("k", k_BTNH), ("v", v_BTNH))
    }
    mask_BTU = visible(place.positions_BT, cache["k"].shape[1], layer["window"])
    y_BTNH = attention(q_BTNH, cache["k"], cache["v"], causal=True, mask_BTU=mask_BTU, scale=scale, bias_BNTU=bias_BNTU)
    return y_BTNH, cache


def last_token(x_BTD: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Pick the last real token of every row: (B, D). lengths_B None: the last column."""
    if lengths_B is None:
        return x_BTD[:, -1]
    return jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]


# -------------------------------------------------------------------------------------------- layer stacks
# What the backward pass finds in memory; the rest it computes again.
REMAT = {
    "none": None,  # nothing is computed again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of dense products
    "full": jax.checkpoint_policies.nothing_saveable,  # only what enters a block
}


def run_blocks(
    body: Callable[..., tuple[jax.Array, Any]], x: jax.Array, params_L: Any, extras_L: Any, *, scan: bool, remat: str
) -> tuple[jax.Array, Any]:
    """Apply `body(x, params, extras) -> (x, out)` once per layer. Returns (x, outs_L).

    params_L, extras_L: pytrees of arrays with a leading layer axis. scan: one compiled body for all layers,
    otherwise unrolled (slower to compile, and with few layers often faster to run). remat: a row of REMAT.
    """
    policy = REMAT[remat]
    if policy is None and sharding.size("fsdp") > 1:
        policy = sharding.all_but_forms
    if policy is not None:
        # Inside a scan nothing can be merged across iterations, so the barrier against it is not needed.
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    if scan:
        return jax.lax.scan(lambda x, layer: body(x, *layer), x, (params_L, extras_L))
    leaves, treedef = jax.tree.flatten((params_L, extras_L))
    outs = []
    # unstack, because its gradient is one concatenation; that of x[i] is a full-size sum per layer.
    for layer in zip(*[jnp.unstack(leaf) for leaf in leaves], strict=True):
        x, out = body(x, *jax.tree.unflatten(treedef, layer))
        outs.append(out)
    return x, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)


# --------------------------------------------------------------------------------------------- activations
def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


# The names of Hugging Face's `hidden_act`, without the two that own parameters (prelu, xielu).
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
