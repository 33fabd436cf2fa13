"""Per-unit gradients from one backward pass: what every use of a parameter reports to its tap.

The gradient of a dense kernel for one unit is a^T b, where a (N, D) came in and b (N, F) is the cotangent of what came
out at the unit's N positions. Its squared norm is <a a^T, b b^T>, two Gram matrices, and nobody has to form it. A tap
holds, leaf by leaf, the smallest thing that its norm and its sum over units can be computed from:

    explicit    the per-unit gradient itself, (U, *shape): norms, biases, adapters, small kernels, and every
                parameter with several uses, since their gradients add up in it
    factors     a and b, and the squared norm: large kernels with one use, look-up tables, and a table tied to the
                output head, whose two uses have a cross term
    norm        the squared norm, and the sum over units, which takes a second backward pass with weighted losses

Sources: the Gram trick, arXiv 1510.01799; book-keeping, arXiv 2210.00038; the tied table's cross term is derived in
`_tied`. A unit is what privacy protects: one example, or k that stand together in the batch, such as an original and
its counterfactual; their gradients add up before the norm is taken. Shapes: B rows, U units, N positions of a unit over
all its rows, D and F inputs and outputs, V rows of a table, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxforget.errors import UserError
from jaxforget.models.layers import Tapped
from jaxforget.training.step import PyTree
from jaxforget.training.trainable import path_str


class Use(NamedTuple):
    """One use of a parameter, seen while tracing."""

    kind: str  # product, gather, score, scale or shift: see layers.Tapped
    shape: tuple[int, ...]  # of the parameter where it is used, so without L
    a: Any  # jax.ShapeDtypeStruct, (U, N, D), or of ids (U, N); None of a shift
    b: jax.ShapeDtypeStruct  # (U, N, F)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one parameter is tapped. form: explicit, factors, norm or, to see its uses, probe; seen is told of them."""

    rows: int
    units: int
    form: str
    seen: Callable[[Use], None] = lambda use: None

    def rule(self, use: str, a: jax.Array | None, b: jax.Array, shape: tuple[int, ...]) -> PyTree:
        """Return the cotangent of the tap; see layers.Tapped."""
        b = b.reshape(self.units, -1, b.shape[-1])
        if a is not None:
            a = a.reshape(self.units, -1, *a.shape[1:])
            a = a.astype(jnp.float32) if use == "gather" else a  # ids: exact below 2^24
        if self.form == "probe":
            self.seen(Use(use, shape, *(x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b))))
            return jnp.zeros(shape, jnp.float32)
        if self.form == "explicit":
            return EXPLICIT[use](a, b, shape)
        tap = {"square": _square(use, a, b), "count": jnp.ones(self.units)}
        return tap | ({"a": a, "b": b} if self.form == "factors" else {"sum": _total(use, a, b, shape)})


def _float32(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # highest: an accelerator's default for float32 has 3 digits. Half precision is multiplied exactly anyway.
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, precision="highest")


def _rows_summed(ids_UN, b_UND, shape):
    def one(ids_N, b_ND):
        return jnp.zeros(shape, jnp.float32).at[ids_N.astype(jnp.int32)].add(b_ND.astype(jnp.float32), mode="drop")

    return jax.vmap(one)(ids_UN, b_UND)


def _outer(a_UND, b_UNF):
    return _float32("und,unf->udf", a_UND, b_UNF)


def _total(use: str, a: Any, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the sum of gradients over all units, float32."""
    if use == "gather":
        ids = a.reshape(-1).astype(jnp.int32)
        return jnp.zeros(shape, jnp.float32).at[ids].add(b.reshape(-1, b.shape[-1]).astype(jnp.float32), mode="drop")
    a, b = (b, a) if use == "score" else (a, b)
    return _float32("md,mf->df", a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


EXPLICIT = {
    "product": lambda a, b, shape: _outer(a, b),
    "score": lambda a, b, shape: _outer(b, a),
    "gather": _rows_summed,
    "scale": lambda a, b, shape: jnp.sum(a * b, axis=1, dtype=jnp.float32),
    "shift": lambda a, b, shape: jnp.sum(b, axis=1, dtype=jnp.float32),
}


def _gram(a_UND, b_UMD):
    return _float32("und,umd->unm", a_UND, b_UMD)


def _square(use: str, a: Any, b: jax.Array) -> jax.Array:
    """Return the squared norms (U,) of the per-unit gradient of one use. a (U, N, D) or ids (U, N), b (U, N, F)."""
    if use == "gather":
        same_UNN = a[:, :, None] == a[:, None, :]
        return jnp.sum(jnp.where(same_UNN, _gram(b, b), 0.0), axis=(1, 2))
    if a.shape[1] == 1:
        return jnp.sum(jnp.square(a.astype(jnp.float32)), (1, 2)) * jnp.sum(jnp.square(b.astype(jnp.float32)), (1, 2))
    if a.shape[1] * (a.shape[2] + b.shape[2]) > a.shape[2] * b.shape[2]:  # so long that forming it costs less
        return jnp.sum(jnp.square(_outer(a, b)), axis=(1, 2))
    return jnp.sum(_gram(a, a) * _gram(b, b), axis=(1, 2))


def _tied(tap: PyTree) -> jax.Array:
    """Return the squared norm (U,) for a table that is looked up and scored against.

    Row v of its gradient is sum over t with x_t = v of e_t, plus sum over s of g_sv h_s: e the cotangents of the looked
    up rows, g those of the logits, h the hidden states. The two parts meet in 2 sum over t, s of g_s,x_t <h_s, e_t>.
    """
    ids_UN, e_UND = tap["gather"]["a"].astype(jnp.int32), tap["gather"]["b"]
    h_UMD, g_UMV = tap["score"]["a"], tap["score"]["b"]
    at_UMN = jnp.take_along_axis(g_UMV, ids_UN[:, None, :], axis=2)
    cross_U = jnp.sum(at_UMN * _gram(h_UMD, e_UND), axis=(1, 2))
    return tap["gather"]["square"] + tap["score"]["square"] + 2.0 * cross_U


# -------------------------------------------------------------------------------------------- whole models
Taps = list[Any]  # of every leaf: an array (explicit) or {use: {"square": ..., "a": ..., "b": ...}}


class Plan(NamedTuple):
    """What the tap of one parameter holds."""

    form: str
    uses: tuple[Use, ...]
    lead: tuple[int, ...]  # (L,) of stacked blocks, else nothing


def plan(
    losses: Callable[[PyTree], jax.Array], trainable: PyTree, rows: int, units: int, second_pass: bool
) -> list[Plan]:
    """Trace the losses of `rows` rows, computing nothing, and choose a form for every leaf.

    second_pass: sums come from another backward pass, so that a norm may do where factors would.
    Raises UserError for a leaf that no operation of layers.py meets, or that something else reads.
    """
    leaves, treedef = jax.tree.flatten(trainable)
    seen: list[list[Use]] = [[] for _ in leaves]
    specs = [Spec(rows, units, "probe", uses.append) for uses in seen]

    def run(leaves):
        taps = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
        total, pull = jax.vjp(lambda taps: losses(treedef.unflatten(map(Tapped, leaves, taps, specs))), taps)
        return pull(jnp.ones_like(total))

    try:
        jax.eval_shape(run, leaves)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError("per-example gradients: something besides the operations of models/layers.py reads a parameter "
                        f"that moves ({str(error).splitlines()[0]}); use the estimator vmap") from error  # fmt: skip
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    if missing := [path for path, uses in zip(paths, seen, strict=True) if not uses]:
        raise UserError(f"per-example gradients: no operation tells of {', '.join(missing)}; freeze what the objective "
                        "does not use, or use the estimator vmap")  # fmt: skip
    return [_plan(leaf, uses, units, second_pass) for leaf, uses in zip(leaves, seen, strict=True)]


def _plan(leaf: jax.Array, uses: list[Use], units: int, second_pass: bool) -> Plan:
    lead = leaf.shape[: leaf.ndim - len(uses[0].shape)]
    layers = math.prod(lead)
    if lead and len(uses) % layers == 0:  # unrolled: every layer was seen
        uses = uses[: len(uses) // layers]
    return Plan(_form(uses, units, second_pass), tuple(uses), lead)


def _form(uses: list[Use], units: int, second_pass: bool) -> str:
    kinds = [use.kind for use in uses]
    once = len(uses) == 1 and kinds[0] in ("product", "gather", "score")
    if not once and sorted(kinds) != ["gather", "score"]:
        return "explicit"
    # The smaller one is the cheaper one: forming the gradient takes N D F, the Gram matrices N N (D + F) products.
    if sum(use.a.size + use.b.size for use in uses) >= units * math.prod(uses[0].shape):
        return "explicit"
    return "norm" if once and second_pass else "factors"


def zeros(plan: Plan, units: int) -> PyTree:
    """Return what the leaf of this plan is tapped with."""
    if plan.form == "explicit":
        return jnp.zeros((*plan.lead, units, *plan.uses[0].shape), jnp.float32)
    taps = {}
    for use in plan.uses:
        taps[use.kind] = {name: jnp.zeros((*plan.lead, units), jnp.float32) for name in ("square", "count")}
        if plan.form == "factors":
            taps[use.kind] |= {"a": jnp.zeros(plan.lead + use.a.shape, use.a.dtype),
                               "b": jnp.zeros(plan.lead + use.b.shape, use.b.dtype)}  # fmt: skip
        else:
            taps[use.kind]["sum"] = jnp.zeros((*plan.lead, *use.shape), jnp.float32)
    return taps


def squared_norm(plan: Plan, tap: PyTree) -> jax.Array:
    """Return the squared norm (U,) of the per-unit gradients of a leaf; rounding may leave one below 0."""
    if plan.form == "explicit":
        axis = len(plan.lead)
        return jnp.sum(jnp.square(tap), axis=[i for i in range(tap.ndim) if i != axis])
    square = _tied(tap) if len(tap) > 1 else next(iter(tap.values()))["square"]
    # A use that was traced once and ran more often added its parts up, which are then worth nothing.
    for parts in tap.values():
        square = jnp.where(parts["count"] == 1, square, jnp.nan)
    return jnp.sum(square, axis=tuple(range(len(plan.lead))))


def second_sum(tap: PyTree) -> jax.Array:
    """Return the sum over units that a backward pass with weighted losses left in a tap of the form norm."""
    (only,) = tap.values()
    return only["sum"]


def weighted_sum(plan: Plan, tap: PyTree, weight_U: jax.Array) -> jax.Array:
    """Return sum over units of weight * gradient, float32, in the shape of the leaf. Not for the form norm.

    A unit of weight 0 adds nothing, if it is finite.
    """
    lead, shape = plan.lead, plan.uses[0].shape
    if plan.form == "explicit":
        # Scaling and then adding would take several times longer.
        return jnp.tensordot(weight_U, tap, axes=(0, len(lead)), precision="highest")
    total = 0.0
    for kind, parts in tap.items():
        a, b = parts["a"], parts["b"]
        if b.dtype != jnp.float32:  # rounding may not lengthen what one unit adds
            weight_U = weight_U * (1.0 - 2.0**-7)
        weight = weight_U.astype(b.dtype).reshape(*(1 for _ in lead), -1, 1, 1)
        if kind == "gather" or b.size <= a.size:  # scale the smaller one
            b = b * weight
        else:
            a = a * weight
        b = b.reshape(*lead, -1, b.shape[-1])
        if kind == "gather":
            add = jnp.zeros((*lead, *shape), jnp.float32)
            ids = a.reshape(*lead, -1).astype(jnp.int32)
            scatter = lambda zero, ids, b: zero.at[ids].add(b.astype(jnp.float32), mode="drop")  # noqa: E731
            total += (jax.vmap(scatter) if lead else scatter)(add, ids, b)
        else:
            a = a.reshape(*lead, -1, a.shape[-1])
            a, b = (b, a) if kind == "score" else (a, b)
            total += _float32("...md,...mf->...df", a, b)
    return total
