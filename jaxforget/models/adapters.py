"""LoRA adapters as the files of `peft`: adapter_config.json and adapter_model.safetensors.

For every adapted module of every layer the file holds `base_model.model.<module>.lora_A.weight` (R, D) and
`.lora_B.weight` (F, R), our `a` and `b` transposed. Modules trained in full stand in it under their usual names.
Shapes: D inputs of a kernel, F its outputs, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxforget.errors import UserError
from jaxforget.files import new_directory
from jaxforget.models import hub
from jaxforget.models.layers import LowRank
from jaxforget.models.model import Model, Params, family_of
from jaxforget.models.sharding import host

if TYPE_CHECKING:
    from jaxforget.training.lora import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
DIGEST = "base_sha256"  # in the metadata of the tensors
TASKS = {"causal": "CAUSAL_LM", "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}  # by head

# Fields of adapter_config.json: those read below, and those that do not change what a trained adapter computes.
_READ = "peft_type r lora_alpha use_rslora init_lora_weights target_modules modules_to_save fan_in_fan_out"
_IDLE = "task_type base_model_name_or_path revision peft_version auto_mapping inference_mode lora_dropout"
_KNOWN = f"{_READ} {_IDLE} megatron_core qalora_group_size".split()  # the last two matter with other options only
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])  # what every other field has to be


# ------------------------------------------------------------------------------------------------- writing
def save_adapter(
    directory: str | Path, model: Model, params: Params, config: LoraConfig, *, base_name: str | None = None
) -> Path:
    """Write a directory that `peft` loads onto the base model. It appears complete or not at all.

    params: with LowRank leaves, as the trainable of `config` combines them. base_name: directory or hub name of the
    base model. A module with a parameter trained in full is written whole. Raises UserError where `directory` exists
    and is not empty, or the format has no place for what was trained.
    """
    from safetensors.numpy import save_file

    leaves, places = _leaves(params), _places(model)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LowRank)}
    if {(leaf.a.shape[-1], leaf.scale) for leaf in found.values()} != {(config.rank, config.scale)}:
        raise UserError(f"the parameters do not hold adapters of rank {config.rank} and scale {config.scale:g}")
    adapted, modules, whole = check_adapter(model, config)
    assert adapted == set(found), "the parameters hold other adapters than the config says"
    tensors = {}
    for key, path, part, layer, transposed, _ in _entries(model, places, adapted, whole, config.rank):
        leaf = getattr(leaves[path], part) if part else leaves[path]
        array = np.asarray(host(leaf if layer is None else leaf[layer]), np.float32)
        tensors[key] = np.ascontiguousarray(array.T if transposed else array)
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS.get(model.config.head),
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(places, adapted),
        "modules_to_save": modules or None,
        "fan_in_fan_out": True in _fan_in_fan_out(places, adapted),
        "bias": "none",
        "inference_mode": True,
    }
    metadata = {"format": "pt", DIGEST: digest(params, without={places[name].path for name in whole})}

    with new_directory(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
    return Path(directory)


def check_adapter(model: Model, config: LoraConfig) -> tuple[set[str], list[str], set[str]]:
    """Raise UserError for what the files of `peft` cannot hold, so that it is told before anything is trained.

    Returns the paths of adapted kernels, and of what is trained in full the modules and all names in them.
    """
    places = _places(model)
    adapted = {place.path for place in places.values() if config.adapts(place.path)}
    modules = list(dict.fromkeys(_whole_module(name) for name, place in places.items() if config.trains(place.path)))
    whole = {name for name in places if name.startswith(tuple(f"{module}." for module in modules))}
    _check(model, places, adapted, whole)
    return adapted, modules, whole


def digest(params: Params, *, without: Iterable[str] = ()) -> str:
    """Return the SHA-256 of the base parameters, in float32, except those at the paths `without`."""
    total = hashlib.sha256()
    leaves = _leaves(params)
    for path in sorted(set(leaves) - set(without)):
        leaf = leaves[path].kernel if isinstance(leaves[path], LowRank) else leaves[path]
        total.update(f"{path} {tuple(leaf.shape)}\n".encode())
        total.update(np.ascontiguousarray(host(leaf), np.float32).data)
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------- reading
def load_adapter(directory: str | Path, model: Model, params: Params) -> Params:
    """Return base parameters with the adapter of a directory: LowRank leaves, and modules that were trained in full.

    Raises UserError, one sentence, for an adapter of another base or another kind, with options that are not
    implemented, or with tensors that are missing, unexpected or of the wrong shape.
    """
    directory = Path(directory).expanduser()
    leaves, places = _leaves(params), _places(model)
    if any(isinstance(leaf, LowRank) for leaf in leaves.values()):
        raise UserError("the model has a LoRA adapter already; merge it first")
    raw = hub.read_json(directory / CONFIG)
    try:
        rank, scale = _read_settings(raw)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from None
    where = directory / WEIGHTS
    tensors, metadata = _read_tensors(where)
    adapted = {
        place.path
        for name, place in places.items()
        if place.path.endswith("/kernel")
        and (_targeted(raw["target_modules"], name) or {_key(name, "A"), _key(name, "B")} & set(tensors))
    }
    whole = {name for name in places if ROOT + name in tensors or _to_save(raw.get("modules_to_save") or [], name)}
    _check(model, places, adapted, whole, f"{where}: ")
    found, right = raw.get("fan_in_fan_out", False), _fan_in_fan_out(places, adapted)
    if found not in right and right:
        raise UserError(f"{directory / CONFIG}: field fan_in_fan_out is {found!r}; these modules need {right.pop()}")
    entries = list(_entries(model, places, adapted, whole, rank))
    expected = {entry.key for entry in entries}
    for kind, found in (("missing", expected - set(tensors)), ("unexpected", set(tensors) - expected)):
        if found:
            raise UserError(f"{where}: {len(found)} {kind} tensors, such as {', '.join(sorted(found)[:3])}")

    moved: dict[str, dict[str, np.ndarray]] = {}
    for key, path, part, layer, transposed, shape in entries:
        if tensors[key].shape != shape:
            raise UserError(
                f"{where}: tensor {key} of parameter {path} has shape {tensors[key].shape}; model and rank need {shape}"
            )
        arrays = moved.setdefault(path, {})
        if part not in arrays:
            base = np.array(leaves[path], np.float32)  # layers that the file lacks stay as they are
            lead = () if layer is None else base.shape[:1]
            arrays[part] = np.empty((*lead, *shape[::-1]), np.float32) if part else base
        target = arrays[part] if layer is None else arrays[part][layer]
        target[...] = tensors[key].T if transposed else tensors[key]
    if metadata.get(DIGEST) not in (None, digest(params, without={places[name].path for name in whole})):
        base_name = raw.get("base_model_name_or_path") or "another one"
        raise UserError(f"{where}: made for the base model {base_name}, whose parameters differ from those of this one")
    joined = jax.tree.map(lambda x: x, params)
    for path, arrays in moved.items():
        hub.set_leaf(joined, path, arrays[""] if "" in arrays else LowRank(leaves[path], **arrays, scale=scale))
    return joined


def _read_settings(raw: dict[str, Any]) -> tuple[int, float]:
    """Return rank and scale. Raises UserError for a field that is set to something not implemented."""
    if raw.get("peft_type") != "LORA":
        raise UserError(f"field peft_type is {raw.get('peft_type')!r}; supported: LORA")
    for name, value in raw.items():
        if name not in _KNOWN and value not in _OFF:
            raise UserError(f"field {name} is {value!r}, which is not implemented")
    # The other ways to draw an adapter change the base as well.
    if (drawn := raw.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(f"field init_lora_weights is {drawn!r}, which is not implemented")
    names: Any = raw.get("target_modules")
    try:
        valid = isinstance(names, list) or bool(re.compile(names))
    except (TypeError, re.error):
        valid = False
    if not valid:
        raise UserError(f"field target_modules is {names!r}; expected names or a regular expression")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = raw.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise UserError(f"field {name} is {value!r}; expected a number above 0")
    if not isinstance(raw.get("modules_to_save") or [], list):
        raise UserError(f"field modules_to_save is {raw['modules_to_save']!r}; expected names")
    return raw["r"], raw["lora_alpha"] / (math.sqrt(raw["r"]) if raw.get("use_rslora") else raw["r"])


def _read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        with safe_open(file, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file: {error}") from None


# --------------------------------------------------------------------------------------------------- names
class Place(NamedTuple):
    """Where a parameter of the `transformers` model lies in ours."""

    path: str
    layer: int | None  # row of the leading axis
    transposed: bool


class Entry(NamedTuple):
    """A tensor of the file, and what it holds. part: "a" or "b" of an adapter, or "" for the parameter itself."""

    key: str
    path: str
    part: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def _leaves(params: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, LowRank))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _places(model: Model) -> dict[str, Place]:
    """Map the name of every parameter, as modules are called: without PREFIX in a bare model."""
    family = family_of(model.config.model_type)
    prefix = family.PREFIX if model.config.head == "none" else ""
    return {
        re.sub(r"^embed_out\b", "lm_head", name.removeprefix(prefix).format(layer)): Place(path, layer, transposed)
        for name, (path, transposed) in family.keys(model.config).items()
        for layer in (range(model.config.stacks[path.split("/")[0]]) if "{}" in name else [None])
    }


def _entries(model: Model, places: dict[str, Place], adapted: set[str], whole: set[str], rank: int) -> Iterator[Entry]:
    """List the tensors of a file. adapted: paths of kernels. whole: Hugging Face names of parameters in full."""
    shapes = _leaves(model.shapes())
    for name, (path, layer, transposed) in places.items():
        shape = shapes[path].shape[layer is not None :]
        if path in adapted:
            yield Entry(_key(name, "A"), path, "a", layer, True, (rank, shape[0]))
            yield Entry(_key(name, "B"), path, "b", layer, True, (shape[1], rank))
        if name in whole:
            yield Entry(ROOT + name, path, "", layer, transposed, shape[::-1] if transposed else shape)


def _key(name: str, part: str) -> str:
    return f"{ROOT}{name.removesuffix('.weight')}.lora_{part}.weight"


def _check(model: Model, places: dict[str, Place], adapted: set[str], whole: set[str], where: str = "") -> None:
    """Raise UserError for what `peft` would load as another model than ours."""
    for name in sorted(whole):
        module = name.rpartition(".")[0]
        if f"{module}.weight" in places and places[f"{module}.weight"].path in adapted:
            raise UserError(f"{where}module {module} has an adapter and is trained in full; choose one")
        # peft trains a copy of the module, and leaves others that share its table as they were.
        shared = model.config.tie_word_embeddings or len(model.config.stacks) > 1
        if shared and places[name].path in ("embed/table", "head/bias"):
            raise UserError(
                f"{where}module {module} is trained in full, but shares its table; no adapter file can say so"
            )


def _whole_module(name: str) -> str:
    """Name the module to save for a parameter trained in full: its own, or the classifier that peft always saves."""
    first = name.split(".")[0]
    return first if first in ("classifier", "score") else name.rpartition(".")[0]


def _to_save(modules: list[str], name: str) -> bool:
    """Say whether `modules_to_save` choose this parameter."""
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)


def _targeted(modules: list[str] | str, name: str) -> bool:
    """Say whether `target_modules`, the ends of names or one regular expression, choose the module of this weight."""
    module, _, leaf = name.rpartition(".")
    if isinstance(modules, str):
        return leaf == "weight" and re.fullmatch(modules, module) is not None
    return leaf == "weight" and any(f".{module}".endswith(f".{end}") for end in modules)


def _target_modules(places: dict[str, Place], adapted: set[str]) -> list[str]:
    """Name the adapted modules by what follows their layer number, or in full where others end like them."""
    names = {name for name, place in places.items() if place.path in adapted}
    modules = {name.removesuffix(".weight") for name in names}
    ends = sorted({re.split(r"\.\d+\.", module, maxsplit=1)[-1] for module in modules})
    return ends if {name for name in places if _targeted(ends, name)} == names else sorted(modules)


def _fan_in_fan_out(places: dict[str, Place], adapted: set[str]) -> set[bool]:
    """Say how the adapted modules store their weights: (inputs, outputs), as GPT-2's Conv1D does, or transposed."""
    return {not place.transposed for place in places.values() if place.path in adapted}
