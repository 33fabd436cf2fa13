"""What a step computes, moves and sends on each device, and how long that takes at the least: formulas.

    flops   of dense products and attention, what the backward pass computes again included
    bytes   read from and written to the device's memory
    sent    bytes that a device sends along each axis of the mesh, by rings: (n - 1) / n of what is gathered or
            scattered over n devices, twice that of a sum that all get

They are those of models/sharding.py: weights are gathered for every pass, in the precision of the activations, and
gradients are summed where they are held. Members send nothing. collectives.py counts the same in a compiled program.

Shapes: T tokens of a row, D inputs and F outputs of a product, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax

from jaxforget.errors import UserError
from jaxforget.models import Model
from jaxforget.models.sharding import AXES, rule_of
from jaxforget.training.trainable import path_str


class Passes(NamedTuple):
    """How often a method goes over the model in a step."""

    forward: int = 1  # the reference model included
    backward: int = 1
    private: Literal["ghost", "bookkeep"] | None = None  # norms of single rows besides, and how
    moves: str = "model"  # or, beside a frozen one, adapters, or the values or gates of a sparse difference


METHODS = {
    "plain": Passes(),
    "ascent_kl": Passes(forward=2),
    "dp_ghost": Passes(backward=2, private="ghost"),
    "dp_bookkeep": Passes(private="bookkeep"),
    "sisa": Passes(),
    "sparse_gates": Passes(moves="gates"),
    "sparse": Passes(moves="values"),
    "lora": Passes(moves="adapters"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Peak numbers of one device, from the maker's public data sheet."""

    name: str
    flops: float  # dense bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # bytes of memory a second
    link: float  # bytes a second that a device sends along one axis of the mesh to its neighbours
    domain: int  # devices that such links join
    network: float  # bytes a second that a device sends beyond
    source: str


HARDWARE = {
    "h200": Hardware(
        name="H200", flops=989e12, memory=141e9, bandwidth=4.8e12, link=450e9, domain=8, network=50e9,
        source="NVIDIA H200 SXM data sheet: 989 TFLOP/s dense bf16, 141 GB at 4.8 TB/s, NVLink 900 GB/s, half of it in "
               "each direction, among 8; between nodes 400 Gbit/s a device is assumed",
    ),
    "v5p": Hardware(
        name="TPU v5p", flops=459e12, memory=95e9, bandwidth=2.765e12, link=200e9, domain=8960, network=200e9,
        source="Google Cloud TPU v5p: 459 TFLOP/s bf16, 95 GB at 2765 GB/s, interconnect 4800 Gbit/s a chip, of which "
               "an axis of the mesh is taken to have one of the torus's three dimensions; pods of 8960",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One step. rows: of a batch, over all devices; of an ensemble, of every member."""

    model: Any
    method: str  # a row of METHODS
    rows: int
    length: int
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)  # devices along each axis; 1 where absent
    members: int = 1
    moving: int = 0  # floats with optimizer state, where it is not the model that moves
    differing: int = 0  # parameters that a sparse difference may change

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}; valid names are {', '.join(METHODS)}")
        if unknown := set(self.mesh) - set(AXES):
            raise UserError(f"unknown mesh axis {min(unknown)!r}; the axes are {', '.join(AXES)}")

    def size(self, *axes: str) -> int:
        """Return how many devices stand along these axes."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def tokens(self) -> float:
        """Tokens of a step on one device."""
        return self.rows * self.length * self.members / self.size("member", "data", "fsdp")


class Cost(NamedTuple):
    """Of one step, on each device."""

    flops: float
    bytes: float
    sent: dict[str, float]  # by axis


class Product(NamedTuple):
    """A dense product of the model, in so many layers."""

    D: int
    F: int
    layers: int
    again: bool  # remat computes it again: it is in a block, and not the last there, of which nothing is needed
    axes: tuple[str | None, ...]  # of the mesh, that its kernel is cut along


def products(model: Model) -> list[Product]:
    """List the dense products of a model, output head included."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes()):
        name = path_str(path)
        if name.endswith("kernel"):
            *lead, D, F = leaf.shape
            again = name.split("/")[0] in model.config.stacks and not name.endswith("mlp/down/kernel")
            found.append(Product(D, F, math.prod(lead), again, rule_of(name) or (None, None)))
    if model.config.head in ("causal", "masked") and model.config.tie_word_embeddings:
        V, D = model.shapes()["embed"]["table"].shape
        found.append(Product(D, V, 1, False, ("fsdp", "tensor")))
    return found


def parameters(model: Model) -> int:
    """Count the parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.shapes()))


# ------------------------------------------------------------------------------------------------ one step
def cost(work: Work) -> Cost:
    """Predict what one step asks of each device."""
    return Cost(_flops(work), _bytes(work), _sent(work))


def _flops(work: Work) -> float:
    how, model, T = METHODS[work.method], work.model, work.length
    of_all = products(model)
    dense = sum(2 * p.D * p.F * p.layers for p in of_all)
    attention = model.flops_per_token(T) - dense
    again = sum(2 * p.D * p.F * p.layers for p in of_all if p.again) * (model.remat == "full")
    again += attention * (model.remat != "none")
    learned = {"model": dense, "adapters": 0}.get(how.moves, min(2 * work.differing, dense))
    a_token = how.forward * (dense + attention) + how.backward * (again + dense + 2 * attention) + learned
    if how.private:
        a_token += sum(p.layers * _norm_flops(p, T) for p in of_all) + 2 * T * _width_of(model)  # 2 T D: looked up rows
    return work.tokens * a_token / work.size("tensor")


def _norm_flops(p: Product, T: int) -> float:
    """Return the FLOPs a token of norms by row, beyond the product that makes the sum. See privacy/taps.py."""
    # A gradient by row where it is smaller than what came in and went out, else two Gram matrices.
    return 2 * p.D * p.F / T if T * (p.D + p.F) >= p.D * p.F else 2 * T * (p.D + p.F)


def _bytes(work: Work) -> float:
    how, model = METHODS[work.method], work.model
    width, again = _width(model), model.remat == "full"
    W, cut = parameters(model), work.size("fsdp", "tensor")
    held = work.members / work.size("member")
    weights = held * W / work.size("tensor") * 2 * width * (how.forward + how.backward * (1 + again))
    moving = held * W / cut if how.moves == "model" else work.moving  # Adam reads 4 floats and writes 3
    passes = how.forward + how.backward * (2 + again)
    acts = sum((p.D + p.F) * p.layers for p in products(model)) * width * passes
    logits = 4 * model.vocab_size * (how.forward + how.backward) * 2
    difference = 24 * work.differing  # its places, itself, what it is added to, the sum, and the gradient twice
    return weights + 28 * moving + difference + work.tokens * (acts + logits) / work.size("tensor")


def _sent(work: Work) -> dict[str, float]:
    how, model = METHODS[work.method], work.model
    width, W = _width(model), parameters(model)
    held, tensor = work.members / work.size("member"), work.size("tensor")
    sent = dict.fromkeys(AXES, 0.0)
    data, fsdp = _ring(work.size("data")), _ring(work.size("fsdp"))
    blocks = sum(x.size for stack in model.config.stacks for x in jax.tree.leaves(model.shapes()[stack]))
    passed = blocks * (how.forward + how.backward) + (W - blocks) * how.forward  # tables and head stay gathered
    sent["fsdp"] = fsdp * held * passed / tensor * width
    if how.moves == "model":  # gradients, private ones in float32
        gradient = held * W / tensor * (4 if how.private else width)
        sent["fsdp"] += fsdp * gradient
        sent["data"] += 2 * data * gradient / work.size("fsdp")
    else:  # what moves is whole on every device
        gradient = 4 * (work.moving if how.moves == "adapters" else work.differing)
        sent["fsdp"] += 2 * fsdp * gradient
        sent["data"] += 2 * data * gradient
    # A product cut by rows gives a part of a sum, one cut by columns gives that of the cotangent of what came in.
    of_all = products(model)
    rows = sum(p.layers for p in of_all if p.axes[0] == "tensor")
    columns = sum(p.layers for p in of_all if p.axes[1] == "tensor")
    sums = how.forward * (rows + 1) + how.backward * (columns + rows * (model.remat == "full"))  # 1: looked up rows
    sent["tensor"] = 2 * _ring(tensor) * work.tokens * _width_of(model) * width * sums
    return sent


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def _width_of(model: Model) -> int:
    """Return D of the stream between blocks."""
    return model.shapes()["embed"]["table"].shape[1]


def _width(model: Model) -> int:
    """Return the bytes of a number in an activation."""
    return jax.numpy.dtype(model.dtype).itemsize


# ----------------------------------------------------------------------------------------------- hardware
class Seconds(NamedTuple):
    """How long a step takes at peak numbers: `least` if everything overlaps, `most` if sending overlaps nothing."""

    compute: float
    memory: float
    sent: dict[str, float]
    least: float
    most: float


def seconds(work: Work, hardware: Hardware) -> Seconds:
    """Predict the time of a step. No program reaches peak numbers: a bound from below."""
    found = cost(work)
    compute, memory = found.flops / hardware.flops, found.bytes / hardware.bandwidth
    sent = {axis: bytes_ / _link(work, axis, hardware) for axis, bytes_ in found.sent.items()}
    here, there = max(compute, memory), sum(sent.values())
    return Seconds(compute, memory, sent, max(here, there), here + there)


def _link(work: Work, axis: str, hardware: Hardware) -> float:
    """Return the bytes a second along an axis. Axes lie as in AXES, the last between nearest neighbours."""
    inner = AXES[AXES.index(axis) :]
    return hardware.link if work.size(*inner) <= hardware.domain else hardware.network


def tokens_needed(work: Work, hardware: Hardware) -> float:
    """Return the tokens a device at which computing takes as long as sending weights and gradients.

    With fewer, more devices make a step no faster. Both are of one step at peak numbers; inf where the sums of the
    tensor axis, which grow with the tokens, alone take longer.
    """
    found = seconds(work, hardware)
    spare = found.compute - found.sent["tensor"]
    fixed = found.sent["data"] + found.sent["fsdp"]
    return fixed * work.tokens / spare if spare > 0 else math.inf
