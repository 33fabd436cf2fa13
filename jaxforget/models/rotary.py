"""Rotary position embeddings and the scalings that stretch them. Source: arXiv 2104.09864.

Shapes: B batch (1 where all rows agree), T tokens, N heads, H head width, R rotated pairs: H / 2, or fewer where only
the first part of each head is rotated.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.errors import UserError
from jaxforget.models import configs

_USED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
ROPE_TYPES = tuple(_USED)
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Hugging Face's rope parameters. Fields that the type does not use keep their defaults."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # the share of each head that is rotated
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # default: the model's max_position_embeddings
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        configs.choose("rope_type", self.rope_type, ROPE_TYPES)
        configs.positive(self, "rope_theta")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(
                f"config field partial_rotary_factor is {self.partial_rotary_factor}; it must be above 0 and at most 1"
            )
        for name in _USED[self.rope_type]:
            if name in _REQUIRED:
                self.needed(name)

    def needed(self, name: str) -> float:
        """Return a field that the type needs. Raises UserError where it is missing."""
        if (value := getattr(self, name)) is None:
            raise UserError(f"config field {name} is missing; rope type {self.rope_type} needs it")
        return value

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, partial: bool = False) -> Rope:
        """Read `rope_scaling` (older files) or `rope_parameters` (newer), rope_theta inside or not.

        partial: whether the family can rotate less than whole heads; otherwise a file that asks for it is refused.
        """
        found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise UserError(f"config field rope_parameters is {found!r}; supported: one flat object")
        found = dict(found)
        found["rope_type"] = found.pop("rope_type", None) or found.pop("type", None) or "default"
        found.pop("type", None)
        for name in ("rope_theta", "partial_rotary_factor"):
            if found.get(name) is None:
                found[name] = raw.get(name)
        outer = raw.get("original_max_position_embeddings")
        if outer is not None:
            found["original_max_position_embeddings"] = outer
        configs.choose("rope_type", found["rope_type"], ROPE_TYPES)
        if found["partial_rotary_factor"] not in (None, 1.0) and not partial:
            raise UserError(f"config field partial_rotary_factor is {found['partial_rotary_factor']!r}; supported: 1.0")
        if (section := found.pop("mrope_section", raw.get("mrope_section"))) is not None:
            raise UserError(f"config field mrope_section is {section!r}; supported: None")
        used = {"rope_type", "rope_theta", "partial_rotary_factor", *_USED[found["rope_type"]]}
        unused = sorted(set(found) - used - {"original_max_position_embeddings"})
        if unused:
            warnings.warn(f"rope type {found['rope_type']} ignores {', '.join(unused)}", stacklevel=2)
        return configs.read(cls, {name: found[name] for name in used if name in found})

    def to_hf(self) -> dict[str, Any]:
        """Write both spellings: transformers 4 reads the first two keys, transformers 5 any."""
        names = [name for name in _USED[self.rope_type] if getattr(self, name) is not None]
        inner = {"rope_type": self.rope_type} | {name: getattr(self, name) for name in names}
        partial = {} if self.partial_rotary_factor == 1 else {"partial_rotary_factor": self.partial_rotary_factor}
        return {
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_type == "default" else inner,
            "rope_parameters": inner | {"rope_theta": self.rope_theta} | partial,
        }

    def rotated(self, width: int) -> int:
        """Return how many of the `width` dimensions of a head are rotated: the first ones."""
        return int(width * self.partial_rotary_factor)


def tables(config: Any, positions_BT: jax.Array, length: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, each (B, T, 1, R), for the heads of a config with `rope` and `max_position_embeddings`.

    length: tokens in the sequence, an int or (B, 1, 1); only the dynamic type looks at it, so with that type a logit
    depends on how long its (padded) sequence is.
    """
    rope = config.rope
    inverse_R, gain = _frequencies(rope, rope.rotated(config.heads[2]), config.max_position_embeddings, length)
    inverse_R = jnp.asarray(inverse_R, jnp.float32)
    if inverse_R.ndim == 1:
        inverse_R = inverse_R[None, None]
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * inverse_R
    return (jnp.cos(angles_BTR) * gain)[:, :, None], (jnp.sin(angles_BTR) * gain)[:, :, None]


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + R}), the pairing of Hugging Face checkpoints. Computed in float32."""
    R = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (R, 2 * R), axis=-1)
    turned_BTNH = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned_BTNH.astype(x_BTNH.dtype)


def _frequencies(
    rope: Rope, width: int, max_positions: int, length: int | jax.Array
) -> tuple[np.ndarray | jax.Array, float]:
    """Return the inverse frequencies, (R,) or (B, 1, R), and the factor on cos and sin."""
    exponents_R = np.arange(0, width, 2) / width
    inverse_R = rope.rope_theta**-exponents_R
    original = rope.original_max_position_embeddings or max_positions
    if rope.rope_type == "default":
        return inverse_R, 1.0
    factor = rope.needed("factor")
    if rope.rope_type == "linear":
        return inverse_R / factor, 1.0
    if rope.rope_type == "dynamic":
        # Beyond the trained length the base grows with the sequence (NTK-aware scaling).
        length = jnp.maximum(jnp.asarray(length, jnp.float32), max_positions)
        growth = factor * length / max_positions - (factor - 1)
        base = rope.rope_theta * growth ** (width / (width - 2))
        if base.ndim == 0:
            return base**-exponents_R, 1.0
        return base ** -jnp.asarray(exponents_R, jnp.float32)[None, None], 1.0
    if rope.rope_type == "llama3":
        # Long waves are slowed by the factor, short ones kept, those between interpolated.
        turns_R = original * inverse_R / (2 * math.pi)
        low, high = rope.needed("low_freq_factor"), rope.needed("high_freq_factor")
        smooth_R = np.clip((turns_R - low) / (high - low), 0.0, 1.0)
        return inverse_R * ((1 - smooth_R) / factor + smooth_R), 1.0
    return _yarn(rope, factor, width, original, inverse_R)


def _yarn(
    rope: Rope, factor: float, width: int, original: int, inverse_R: np.ndarray
) -> tuple[np.ndarray, float]:
    """Scale by parts, with a gain on cos and sin. Source: arXiv 2309.00071."""

    def pair_after(turns):
        """Index of the pair that makes `turns` rotations over the original length."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_after(rope.beta_fast or 32.0), pair_after(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp_R = (np.arange(width // 2) - low) / (high - low if high != low else 0.001)
    slowed_R = np.clip(ramp_R, 0.0, 1.0)
    inverse_R = inverse_R * (slowed_R / factor + 1 - slowed_R)

    def gain(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return inverse_R, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inverse_R, gain(rope.mscale) / gain(rope.mscale_all_dim)
    return inverse_R, gain(1.0)
