"""Memory a device needs for one step of each method, from the compiled program alone: no weight is ever made.

    python -m benchmarks.memory --model-config llama-3-8b --mesh fsdp=8
    python -m benchmarks.memory --preset table

Each step is compiled as the training loop runs it, for as many virtual CPU devices as the mesh has, and the compiler
says what it keeps: arguments (parameters, optimizer, batch), results, how much of these lies where arguments lay, and
temporary memory (gradients, activations, gathered weights). Sizes of arguments are exact on any hardware. Temporary
memory is that of the CPU's compiler: it computes bfloat16 products in float32, attends without a fused kernel and sums
gradients whole where others scatter them, so that a GPU or TPU needs less. With JAX_PLATFORMS=cuda (or tpu) the
compiler of the devices that are there is asked instead.

Beside it: bytes sent between devices, counted in the program, and what training/cost.py predicts of them, of FLOPs and
of the time of a step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxforget import command
from jaxforget.debiasing.differences import fixed, gated, layout_of
from jaxforget.debiasing.gates import GateConfig
from jaxforget.debiasing.objective import switched_on
from jaxforget.debiasing.optimizer import grouped, module_groups
from jaxforget.errors import UserError
from jaxforget.models import Model, sharding
from jaxforget.models.model import build, family_of
from jaxforget.privacy.clipping import Clipping
from jaxforget.privacy.noise import gaussian_noise, private_gradient
from jaxforget.report.page import cell, table, write_page
from jaxforget.report.run import Run
from jaxforget.training import cost
from jaxforget.training.collectives import collectives
from jaxforget.training.ensemble import Members, members
from jaxforget.training.gradients import mean_gradient
from jaxforget.training.lora import LoraConfig, lora
from jaxforget.training.objectives import next_token, next_token_with_kl
from jaxforget.training.optimizer import OptimizerConfig, adamw
from jaxforget.training.sparse import budget
from jaxforget.training.start import ComputeConfig
from jaxforget.training.step import Step, make_run, make_step
from jaxforget.training.trainable import everything

# The public config.json of well-known models: what decides their shapes.
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "hidden_size": 4096,
          "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}  # fmt: skip
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
             "vocab_size": 50257},
    "yi-6b": _LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 4, "vocab_size": 64000,
                       "max_position_embeddings": 4096, "rope_theta": 5e6},
    "llama-3-8b": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
                            "max_position_embeddings": 8192, "rope_theta": 5e5},
}  # fmt: skip
VIRTUAL = 64  # CPU devices
# What the time of a step is predicted for besides: more devices than are compiled for, and the tensor axis.
BEYOND = ({"fsdp": 64}, {"fsdp": 512}, {"data": 8, "fsdp": 8}, {"data": 64, "fsdp": 8},
          {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"tensor": 8})  # fmt: skip
FIELDS = ("parameters_gb", "beside_gb", "optimizer_gb", "gradients_gb", "temporary_gb", "peak_gb", "sent_gb",
          "predicted_sent_gb", "h200_seconds", "v5p_seconds", "fits")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Say what memory a step needs on each device."""

    out: Path | None = None
    """Directory for everything the run leaves. Must be empty."""
    model_config: tuple[str, ...] = ("gpt2",)
    """Names from CONFIGS in benchmarks/memory.py, or config.json files."""
    meshes: tuple[str, ...] = ()
    """Several meshes, compared in one run, instead of --mesh."""
    methods: tuple[str, ...] = tuple(cost.METHODS)
    """Rows of METHODS in training/cost.py."""
    rows: int = 1
    """Rows of a batch for each device of data and fsdp; of an ensemble, of every member."""
    length: int = 1024
    """Tokens of a row."""
    members: int = 4
    """Members of the ensemble. Their mesh has as many of the devices of data and fsdp on its member axis as divide
    them, and the others on fsdp, unless the mesh has a member axis itself."""
    how: Members = "vmap"
    """Members of one device: side by side (vmap), or one after the other (map)."""
    density: float = 0.01
    """Share of the parameters at --differs that a sparse difference changes."""
    differs: tuple[str, ...] = ("blocks/attn/(q|k|v|qkv|o)/.*",)
    """Patterns of what a sparse difference may change. More than 2**31 parameters cannot be numbered."""
    lora: LoraConfig = LoraConfig()
    compute: ComputeConfig = ComputeConfig(dtype="bfloat16", remat="full", layers="scan")


def one() -> Config:
    """one model on one mesh: seconds for each method"""
    return Config()


def everyone() -> Config:
    """GPT-2, Yi-6B and Llama-3-8B on 1, 4 and 8 devices: about half an hour on two CPU cores"""
    return Config(model_config=tuple(CONFIGS), meshes=("data=1", "fsdp=4", "fsdp=8"))


PRESETS = {"one": one, "table": everyone}


def run(config: Config) -> None:
    """Compile every method for every model and mesh, and write the table."""
    models = {Path(name).stem: read_model(name, config) for name in config.model_config}
    meshes = meshes_of(config)
    for model in models.values():
        for method in config.methods:  # raises UserError, as for more parameters than a sparse difference can number
            program(config, model, method, 1)
    out = Run("benchmarks.memory", config, config.out, None)
    out.begin()
    rows, beyond = [], []
    for name, model in models.items():
        beyond += [{"model": name, "mesh": text_of(mesh)} | predicted(
            cost.Work(model=model, method="plain", rows=config.rows * mesh.get("data", 1) * mesh.get("fsdp", 1),
                      length=config.length, mesh=mesh)) for mesh in BEYOND]  # fmt: skip
        for mesh in meshes:
            for method in config.methods:
                rows.append({"name": f"{name}, {method}", "model": name, "method": method})
                rows[-1] |= measure(config, model, method, mesh)
                command.say(f"{rows[-1]['name']} on {rows[-1]['mesh']}: {rows[-1]['peak_gb']:.1f} GB")
    document = out.finish(rows, beyond=beyond, hardware=cost.HARDWARE)
    shown = ("name", "mesh", *FIELDS)
    most, least = (pick(rows, key=lambda row: row["peak_gb"]) for pick in (max, min))
    found = [f"{what}: {row['name']} on {row['mesh']}, {cell(row['peak_gb'])} GB on each device."
             for what, row in (("Least", least), ("Most", most))]  # fmt: skip
    lead = ("How much memory does a step of each method need on each device of a mesh? Read from the compiled program, "
            f"nothing is run. Compiled for {jax.default_backend()}.")  # fmt: skip
    note = ("GB (10^9 bytes) on each device: the model's parameters, what else is kept beside them, the optimizer, "
            "gradients, temporary memory, and the peak of all; what the step sends, and what was predicted of it.")
    write_page(out.directory / "report.html", "Memory of a step", lead, [("Steps", note, table(rows, shown))],
               document["config"], found)  # fmt: skip
    command.print_table(rows, shown, f"benchmarks.memory · {out.directory}")


def read_model(name: str, config: Config) -> Model:
    """Return the model of a name in CONFIGS or of a config.json file. Raises UserError for another."""
    raw: Any = CONFIGS.get(name)
    if raw is None:
        try:
            raw = json.loads(Path(name).read_text(encoding="utf-8"))
            assert isinstance(raw, dict)
        except (OSError, ValueError, AssertionError):
            raise UserError(f"--model-config {name} is no config.json, and none of {', '.join(CONFIGS)}") from None
    family = family_of(raw.get("model_type"))
    model = config.compute.apply(build(family.Config.from_hf(raw)))
    if model.config.head != "causal" or len(model.config.stacks) > 1:
        raise UserError(f"--model-config {name} is {raw['model_type']} with a {model.config.head} head; a causal model "
                        "of one stack is needed")  # fmt: skip
    if config.length > (model.config.position_limit or config.length):
        raise UserError(f"--length is {config.length}; {name} has {model.config.position_limit} positions")
    return model


def meshes_of(config: Config) -> list[dict[str, int]]:
    """Check the settings and return the devices along each axis of every mesh."""
    command.at_least(1, rows=config.rows, length=config.length, members=config.members)
    for method in config.methods:
        cost.Work(model=None, method=method, rows=1, length=1)
    given = sharding.current()
    if given is not None and config.meshes:
        raise UserError("--mesh and --meshes exclude each other")
    if given is not None:
        return [dict(given.shape)]
    return [dict(sharding.make_mesh(text).shape) for text in config.meshes or ("data=1",)]


def text_of(mesh: dict[str, int]) -> str:
    """Spell a mesh as --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def for_members(mesh: dict[str, int], count: int) -> dict[str, int]:
    """Return the mesh of an ensemble of so many members; see Config.members."""
    if mesh["member"] > 1:
        return mesh
    devices = mesh["data"] * mesh["fsdp"]
    own = math.gcd(devices, count)
    return mesh | {"member": own, "data": 1, "fsdp": devices // own}


# ---------------------------------------------------------------------------------------------- programs
class Program(NamedTuple):
    """A step, and the shapes of the parts it starts from."""

    step: Step
    parts: dict[str, Any]
    work: dict[str, int]  # fields of cost.Work


def program(config: Config, model: Model, method: str, rows: int) -> Program:
    """Compose the step of a method as its command does."""
    how, adam = cost.METHODS[method], adamw(OptimizerConfig())
    parts, shapes = {"model": model.shapes()}, model.shapes()
    objective, mean = next_token(model), mean_gradient(None)
    if how.private:
        gradient = private_gradient(Clipping(how.private), float(rows))
        noisy = optax.chain(gaussian_noise(), adamw(OptimizerConfig(max_grad_norm=0.0)))
        return Program(make_step(objective, everything(), gradient, noisy), parts, {})
    if how.moves == "adapters":
        step = make_step(objective, lora(config.lora), mean, adam)
        adapters = jax.eval_shape(lambda parts: lora(config.lora).init(jax.random.key(0), parts)[0], parts)
        return Program(step, parts, {"moving": sum(leaf.size for leaf in jax.tree.leaves(adapters))})
    if how.moves in ("values", "gates"):
        layout = layout_of(model, config.differs)
        count = budget(config.density, layout.size)
        first = how.moves == "gates"
        trainable = gated(layout, GateConfig()) if first else fixed(layout)
        module = {"place": jnp.uint32, "value": jnp.float32}
        module = {name: jax.ShapeDtypeStruct((count,), dtype) for name, dtype in module.items()}
        groups = module_groups(1, gate_rate=1.0, adversary_rate=1.0, core_rate=1.0)
        step = make_step(switched_on(objective), trainable, mean, grouped(groups, OptimizerConfig()))
        moving = 2 * layout.size if first else count
        return Program(step, parts if first else parts | {"modules": [module]},
                       {"moving": moving, "differing": layout.size})  # fmt: skip
    if method == "ascent_kl":
        parts, objective = parts | {"reference": shapes}, next_token_with_kl(model)
    step = make_step(objective, everything(), mean, adam)
    return Program(members(step, config.how) if method == "sisa" else step, parts, {})


def batch_of(config: Config, rows: int, lead: tuple[int, ...], put) -> dict[str, Any]:
    """Return the columns of a batch that these objectives read; lead: members and steps before the rows."""
    tokens, row = (*lead, rows, config.length), (*lead, rows)
    shapes = {"tokens": (tokens, jnp.int32), "labels": (tokens, jnp.int32), "length": (row, jnp.int32),
              "stream": (row, jnp.int32), "weight": (row, jnp.float32), "factor": (row, jnp.float32)}  # fmt: skip
    return {name: put(jax.ShapeDtypeStruct(*one)) for name, one in shapes.items()}


def measure(config: Config, model: Model, method: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Compile one method on one mesh, and say what it needs."""
    several = method == "sisa"
    sizes = for_members(sizes, config.members) if several else sizes
    rows, count = config.rows * sizes["data"] * sizes["fsdp"], config.members if several else 1
    mesh = sharding.make_mesh(text_of(sizes))
    with jax.set_mesh(mesh):
        built = program(config, model, method, rows)
        row = {"mesh": text_of(sizes), "devices": mesh.devices.size, "rows": rows * count}
        row |= predicted(cost.Work(model=model, method=method, rows=rows, length=config.length, mesh=sizes,
                                   members=count, **built.work))  # fmt: skip
        row |= compiled(config, built, mesh, rows, count if several else 0)
    fits = [hardware.name for hardware in cost.HARDWARE.values() if row["peak_gb"] * 1e9 <= hardware.memory]
    return row | {"fits": ", ".join(fits)}


def compiled(config: Config, built: Program, mesh, rows: int, count: int) -> dict[str, Any]:
    """Compile the program of one step and read the compiler's account. count: members, 0 for one model."""
    lead = int(count > 0)
    key = jax.random.split(jax.random.key(0), count) if count else jax.random.key(0)
    state, frozen = jax.eval_shape(built.step.init, key, built.parts)
    put = functools.partial(_placed, mesh)
    whole = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*("member",) * lead))
    )
    state, frozen = put(state, lead), put(frozen)
    batches = batch_of(config, rows, (count, 1) if count else (1,), whole)
    steps = whole(jax.ShapeDtypeStruct((count,) if count else (), jnp.int32))
    began = time.perf_counter()
    lowered = make_run(built.step).lower(state, frozen, batches, steps)
    found = lowered.compile(compiler_options={"xla_backend_optimization_level": 0} if _virtual() else None)
    took = time.perf_counter() - began
    memory = found.memory_analysis()
    sent = collectives(found.as_text(), mesh)
    parameters = _held(state.trainable) + _held(frozen.get("model", ()))
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "parameters": parameters, "optimizer": _held((state.opt_state, state.memory)),
        "beside": _held({name: part for name, part in frozen.items() if name != "model"}),
        "gradients": _held(state.trainable), "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes, "donated": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes, "peak": peak + memory.temp_size_in_bytes, "sent": sum(sent.values()),
    }  # fmt: skip
    about = {f"{name}_gb": size / 1e9 for name, size in sizes.items()}
    return about | {"sent_by_axis_gb": {axis: size / 1e9 for axis, size in sent.items()}, "compile_seconds": took}


def predicted(work: cost.Work) -> dict[str, Any]:
    """Say what training/cost.py predicts of a step."""
    found = cost.cost(work)
    row = {"predicted_tflops": found.flops / 1e12, "predicted_moved_gb": found.bytes / 1e9,
           "predicted_sent_gb": sum(found.sent.values()) / 1e9,
           "predicted_sent_by_axis_gb": {axis: size / 1e9 for axis, size in found.sent.items() if size}}  # fmt: skip
    for name, hardware in cost.HARDWARE.items():
        time_ = cost.seconds(work, hardware)
        row |= {f"{name}_seconds": time_.least, f"{name}_seconds_most": time_.most,
                f"{name}_tokens_needed": cost.tokens_needed(work, hardware)}  # fmt: skip
    return row


def _placed(mesh, tree, lead: int = 0):
    """Give shapes the place that training gives the arrays."""
    def one(path, x):
        spec = sharding.spec_of(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, lead)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def _held(tree) -> int:
    """Return the bytes that one device holds of arrays that have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _virtual() -> bool:
    return jax.default_backend() == "cpu"


def main() -> None:
    """Start with virtual devices, which must be made before JAX starts."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", VIRTUAL)
    command.main(run, PRESETS)


if __name__ == "__main__":
    main()
