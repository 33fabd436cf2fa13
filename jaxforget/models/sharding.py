"""Which device holds what: a mesh, and one rule for every parameter. XLA derives everything else from that.

    member   each device has members of an ensemble for itself, and they never talk
    data     each device has rows of a batch
    fsdp     rows as well, and a part of every large parameter, which is gathered when it is used
    tensor   a part of every product: columns of the first of two, rows of the second

The mesh is the one that `jax.set_mesh` has set; without one everything is on the default device, and all functions
here do nothing but move arrays there. A sharded program computes what the same program does on one device, up to the
order of sums.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxforget.errors import UserError

PyTree = Any
AXES = ("member", "data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are spread over

FORMS = ("sharding_constraint", "convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim")

# The end of a parameter's path, and the mesh axis of each of its last axes. The first rule that fits counts. Axes
# before these (layers) are whole on every device. An axis of the mesh that does not divide is left out.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(attn|cross)/(q|k|v|qkv)/kernel", ("fsdp", "tensor")),
    (r"(attn|cross)/o/kernel", ("tensor", "fsdp")),
    (r"mlp/(up|gate)/kernel", ("fsdp", "tensor")),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"(attn|cross)/(q|k|v|qkv)/bias", ("tensor",)),
    (r"mlp/(up|gate)/bias", ("tensor",)),
    (r"embed/table", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"head/bias", ("tensor",)),
    (r"(positions|segments)/table", (None, "fsdp")),
    (r"(encoder|decoder)_bias/table", (None, "tensor")),
    (r"(transform|pool|score|project_in|project_out)/kernel", ("fsdp", None)),
    (r"(o|down|transform|pool|score)/bias", (None,)),
    (r"\w*norm/(scale|bias)", (None,)),
)


# -------------------------------------------------------------------------------------------------- meshes
def make_mesh(text: str) -> Mesh:
    """Make the mesh that a text such as `data=2,fsdp=4` describes, of the first so many devices.

    Raises UserError for an unknown axis, and for a number of devices that does not divide those there are, or is not
    all of them where several processes run.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh has {part.strip()!r}; write axis=devices such as data=2,fsdp=4, the axes being "
                            f"{', '.join(AXES)}")  # fmt: skip
        sizes[axis] = int(size)
    if min(sizes["member"], sizes["tensor"], sizes["data"] * sizes["fsdp"]) > 1:  # XLA ends the process on some of them
        raise UserError(f"--mesh {text}: member goes together with data and fsdp, or with tensor alone")
    needed, there = math.prod(sizes.values()), jax.device_count()
    if needed > there or there % needed or (jax.process_count() > 1 and needed != there):
        every = "of several processes must have all" if jax.process_count() > 1 else "must divide"
        raise UserError(f"--mesh {text} has {needed} devices, but it {every} the {there} there are")
    devices = np.asarray(jax.devices()[:needed]).reshape(tuple(sizes.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def current() -> Mesh | None:
    """Return the mesh that is set, or None. Not to be called while a program is traced; `size` may be."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def size(*axes: str) -> int:
    """Return how many devices stand along these axes of the mesh that is set: 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


# --------------------------------------------------------------------------------------------------- rules
def rule_of(path: str) -> tuple[str | None, ...] | None:
    """Return the axes of the rule that fits a path such as `model/blocks/attn/q/kernel`, or None."""
    # What stands for a kernel (layers.LowRank, layers.Tapped) holds it as its own kernel or value.
    return next((axes for end, axes in RULES if re.search(rf"(^|/){end}(/kernel|/value)?$", path)), None)


def spec_of(path: str, shape: tuple[int, ...], lead: int = 0) -> PartitionSpec:
    """Return how a leaf is cut. lead: 1 where it has a leading axis of members.

    What no rule fits (counters, adversary heads, adapters) is whole on every device.
    """
    axes = rule_of(path) or ()
    if len(axes) > len(shape) - lead:  # of another form than the parameter, such as factored moments
        axes = ()
    inner = (None,) * (len(shape) - lead - len(axes)) + axes
    inner = tuple(axis if axis and length % size(axis) == 0 else None
                  for axis, length in zip(inner, shape[lead:], strict=True))  # fmt: skip
    return PartitionSpec(*("member",) * lead, *inner)


def check_rules(shapes: PyTree) -> None:
    """Raise UserError for a parameter of a model that no rule covers: it would be whole on every device."""
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        if rule_of(_name(path)) is None:
            raise UserError(f"no rule in models/sharding.py covers the parameter {_name(path)}; add one to RULES")


# ------------------------------------------------------------------------------------------------- placing
def place(tree: PyTree, lead: int = 0) -> PyTree:
    """Put a pytree of arrays, numpy or on a device, where the rules say."""
    mesh = current()
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def put(path, leaf):
        return _put(leaf, NamedSharding(mesh, spec_of(_name(path), np.shape(leaf), lead)))

    return jax.tree_util.tree_map_with_path(put, tree)


def place_whole(tree: PyTree, lead: int = 0) -> PyTree:
    """Put arrays on every device, members' (lead 1) on those of each."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec(*("member",) * lead))), tree)


def place_rows(batch: PyTree) -> PyTree:
    """Spread the rows of a batch over the devices; if their number does not divide, every device has all."""
    mesh = current()
    if mesh is None:
        return batch
    spec = PartitionSpec(ROWS) if jax.tree.leaves(batch)[0].shape[0] % size(*ROWS) == 0 else PartitionSpec()
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, spec)), batch)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # device_put moves none between processes
            return jax.jit(lambda key: key, out_shardings=sharding)(leaf)
        return jax.device_put(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return from_parts(np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index])


def from_parts(shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple], np.ndarray]) -> jax.Array:
    """Make an array of what `read(index)` gives for the part of each device of this process, one part at a time."""
    parts: list[jax.Array] = []
    last: tuple[Any, Any] = (None, None)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if last[0] != index:  # devices that hold the same part follow each other as a rule
            jax.block_until_ready(parts)  # a part on its way to a device is still on the host
            last = index, read(index)
        parts.append(jax.device_put(last[1], device))
    jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def parameter_sharding(path: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """Return where a parameter that is being read belongs, or None without a mesh."""
    mesh = current()
    return None if mesh is None else NamedSharding(mesh, spec_of(path, shape))


def resting(tree: PyTree) -> PyTree:
    """Keep parameters between runs: on the host, or with a mesh on its devices."""
    return host(tree) if current() is None else place(tree)


def host(tree: PyTree) -> PyTree:
    """Fetch a pytree to numpy arrays, parts held by other processes included; all processes must take part.

    Typed keys stay where they are.
    """

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


# ------------------------------------------------------------------------------------- inside of programs
def pin(tree: PyTree, lead: int = 0) -> PyTree:
    """Keep a pytree where the rules say while a program is traced, so that what it returns lies as what it took."""
    if size(*AXES) == 1:
        return tree
    pinned = jax.lax.with_sharding_constraint
    return jax.tree_util.tree_map_with_path(lambda path, x: pinned(x, spec_of(_name(path), x.shape, lead)), tree)


def gather(params: PyTree, dtype: str) -> PyTree:
    """Join over fsdp the parameters that a block is about to use, where a program is traced.

    Without it XLA would rather cut the activations as the parameters are. Their parts are kept for the backward pass,
    not the whole: see `all_but_forms`. Kernels travel in the dtype of the activations, as which a product reads them.
    """
    if size("fsdp") == 1:
        return params

    def whole(path, leaf):
        name = _name(path)
        cut = spec_of(name, leaf.shape)
        if re.search(r"(^|/)kernel(/kernel|/value)?$", name):
            leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), cut)
        return _join(cut, PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut)), leaf)

    return jax.tree_util.tree_map_with_path(whole, params)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _join(cut: PartitionSpec, whole: PartitionSpec, leaf: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, whole)


@_join.defjvp
def _join_jvp(cut, whole, leaves, tangents):
    # Cut as the parameter is, and so is the gradient: it is summed where it belongs and nowhere held whole.
    # Not by _join, of whose result all_but_forms could not tell that it is a form.
    return jax.lax.with_sharding_constraint(*leaves, whole), jax.lax.with_sharding_constraint(*tangents, cut)


def all_but_forms(primitive: Any, *_: Any, **__: Any) -> bool:
    """Let the backward pass find all results in memory but those that are an array in another place, type or shape.

    A policy for jax.checkpoint. What is gathered, or cast after that, is made again: to keep it would be to keep all
    parameters whole.
    """
    return primitive.name not in FORMS


def pin_rows(batch: PyTree, axis: int = 0) -> PyTree:
    """Spread rows, which stand on this axis, over the devices while a program is traced.

    Raises UserError where they do not divide.
    """
    if size(*ROWS) == 1:
        return batch
    check_rows(jax.tree.leaves(batch)[0].shape[axis])
    spec = PartitionSpec(*(None,) * axis, ROWS)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), batch)


def check_rows(rows: int) -> None:
    """Raise UserError for a number of rows at a time that does not divide over the devices."""
    devices = size(*ROWS)
    if rows % devices:
        near = [n for n in (rows - rows % devices, rows - rows % devices + devices) if n]
        raise UserError(f"{rows} rows at a time do not divide over the {devices} devices of data and fsdp; take "
                        f"{' or '.join(map(str, near))} (batch size and microbatch)")  # fmt: skip


def apart(function: Callable, mine_K: PyTree, *rest: PyTree) -> Any:
    """Call function(mine_K, *rest) with the members of each device for itself; what returns has the members' axis.

    Nothing can pass between members, whatever the function does with its own. `rest` is the same for all. Raises
    UserError where the members do not divide over the devices.
    """
    if size("member") == 1:
        return function(mine_K, *rest)
    check_members(jax.tree.leaves(mine_K)[0].shape[0])
    member, same = PartitionSpec("member"), PartitionSpec()
    return jax.shard_map(
        function, in_specs=(member, *(same,) * len(rest)), out_specs=member, axis_names={"member"}, check_vma=False
    )(mine_K, *rest)


def check_members(count: int) -> None:
    """Raise UserError for a number of members that does not divide over the devices."""
    devices = size("member")
    if count % devices:
        near = [n for n in (count - count % devices, count - count % devices + devices) if n]
        raise UserError(f"{count} members do not divide over the {devices} devices of the member axis; train "
                        f"{' or '.join(map(str, near))} together")  # fmt: skip


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
