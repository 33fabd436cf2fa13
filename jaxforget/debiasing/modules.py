"""Modules and their files: what a module changes, by tensor, and what it was made for.

A .safetensors file holds for every parameter that differs `PATH#idx`, uint32, its places in row-major order, sorted and
unique, and `PATH#val`, what is added there. Its metadata name the base model by digest; another base is refused.
Shapes: P places.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxforget.debiasing.differences import Layout
from jaxforget.errors import UserError
from jaxforget.files import write_atomic
from jaxforget.models.adapters import digest
from jaxforget.models.model import Params

FORMAT, VERSION = "jaxforget.module", 1  # the one key of the metadata: of several the order would vary
DTYPES = ("float32", "float16")


class Entry(NamedTuple):
    """What is added to a parameter, and where."""

    place_P: np.ndarray  # uint32, sorted, unique
    value_P: np.ndarray  # float32


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A sparse difference. about: what it is for and how it was made, JSON values; `attribute` among them."""

    base_sha256: str
    size: int  # parameters that might have differed: what the density is of
    shapes: dict[str, tuple[int, ...]]  # of the parameters in `entries`
    entries: dict[str, Entry]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nonzeros(self) -> int:
        return sum(len(entry.place_P) for entry in self.entries.values())

    @property
    def density(self) -> float:
        """Give the achieved density."""
        return self.nonzeros / self.size

    def scaled(self, strength: float) -> Module:
        """Return the module with its values times a strength; 0.5 is half of it."""
        entries = {path: Entry(e.place_P, np.float32(strength) * e.value_P) for path, e in self.entries.items()}
        return dataclasses.replace(self, entries=entries)


def from_places(layout: Layout, place_P: np.ndarray, value_P: np.ndarray, base: Params, **about: Any) -> Module:
    """Make a module of places in the layout's vector; padding and zeros are left out."""
    place_P, value_P = np.asarray(place_P, np.int64), np.asarray(value_P, np.float32)
    real = (place_P < layout.size) & (value_P != 0)
    place_P, value_P = place_P[real], value_P[real]
    ends = np.cumsum(layout.sizes)
    entries, shapes = {}, {}
    for path, shape, size, end in zip(layout.paths, layout.shapes, layout.sizes, ends, strict=True):
        start, stop = np.searchsorted(place_P, (end - size, end))
        if start < stop:
            entries[path] = Entry((place_P[start:stop] - (end - size)).astype(np.uint32), value_P[start:stop])
            shapes[path] = shape
    return Module(digest(base), layout.size, shapes, entries, about)


def to_places(module: Module, layout: Layout) -> dict[str, np.ndarray]:
    """Return {"place", "value"} in the layout's vector: what the trainable `fixed` starts from."""
    starts = dict(zip(layout.paths, np.cumsum(layout.sizes) - layout.sizes, strict=True))
    paths = sorted(module.entries)
    return {
        "place": np.concatenate([starts[path] + module.entries[path].place_P for path in paths]).astype(np.uint32),
        "value": np.concatenate([module.entries[path].value_P for path in paths]),
    }


# --------------------------------------------------------------------------------------------------- files
def save_module(file: str | Path, module: Module, dtype: str = "float32") -> Path:
    """Write a module; the file appears complete or not at all. dtype: of the values; float16 rounds them."""
    from safetensors.numpy import save

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    tensors = {}
    for path, entry in module.entries.items():
        tensors[f"{path}#idx"], tensors[f"{path}#val"] = entry.place_P, entry.value_P.astype(dtype)
    described = {
        "version": VERSION, "base_sha256": module.base_sha256, "size": module.size, "nonzeros": module.nonzeros,
        "shapes": module.shapes, "about": module.about,
    }  # fmt: skip
    file = Path(file)
    write_atomic(file, save(tensors, {FORMAT: json.dumps(described, sort_keys=True)}))
    return file


def load_module(file: str | Path, base_sha256: str | None = None) -> Module:
    """Read a module. base_sha256: of the base it must be made for, see `models.adapters.digest`.

    Raises UserError, one sentence, for a file that is no module or damaged, and for a module of another base.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise UserError(f"module {file} does not exist")
    try:
        with safe_open(file, framework="np") as handle:
            metadata, tensors = handle.metadata() or {}, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file: {error}") from None
    if FORMAT not in metadata:
        raise UserError(f"{file} is no module: its metadata lack {FORMAT!r}")
    try:
        said = json.loads(metadata[FORMAT])
        if said["version"] != VERSION:
            raise UserError(f"{file} is a module of version {said['version']}; version {VERSION} is supported")
        shapes = {path: tuple(shape) for path, shape in said["shapes"].items()}
        module = Module(said["base_sha256"], int(said["size"]), shapes, {}, dict(said["about"]))
        if tensors.keys() != {f"{path}#{part}" for path in shapes for part in ("idx", "val")}:
            raise ValueError("its tensors are not those that its metadata name")
        for path, shape in shapes.items():
            module.entries[path] = _checked(path, tensors[f"{path}#idx"], tensors[f"{path}#val"], shape)
        if module.nonzeros != said["nonzeros"]:
            raise ValueError(f"it holds {module.nonzeros} values; its metadata say {said['nonzeros']}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if base_sha256 is not None:
        check_base(module, base_sha256, str(file))
    return module


def load_modules(files: Sequence[Path], sha256: str) -> dict[str, Module]:
    """Load modules for a base by the names of their files."""
    found: dict[str, Module] = {}
    for file in files:
        name = Path(file).name.removesuffix(".safetensors")
        if name in found:
            raise UserError(f"two modules are called {name}; rename one of the files")
        found[name] = load_module(file, sha256)
    return found


def check_base(module: Module, base_sha256: str, name: str) -> None:
    """Raise UserError for a module of another base."""
    if module.base_sha256 != base_sha256:
        raise UserError(f"module {name} was made for the base {module.base_sha256[:12]}…, not for this one, "
                        f"{base_sha256[:12]}…")  # fmt: skip


def _checked(path: str, place_P: np.ndarray, value_P: np.ndarray, shape: tuple[int, ...]) -> Entry:
    if place_P.dtype != np.uint32 or value_P.dtype.name not in DTYPES or place_P.ndim != 1:
        raise ValueError(f"{path} holds {place_P.dtype} places and {value_P.dtype} values")
    if place_P.shape != value_P.shape:
        raise ValueError(f"{path} has {len(place_P)} places and {len(value_P)} values")
    if len(place_P) and (place_P[-1] >= np.prod(shape) or (place_P[1:] <= place_P[:-1]).any()):
        raise ValueError(f"the places of {path} are not sorted, not unique, or beyond its shape {list(shape)}")
    if not np.isfinite(value_P).all():
        raise ValueError(f"{path} holds a value that is not finite")
    return Entry(place_P, value_P.astype(np.float32))


def inspect(module: Module) -> dict[str, Any]:
    """Describe a module in a row: achieved density, bytes, the share of its places in each part of the model."""
    parts: dict[str, int] = {}
    for path, entry in module.entries.items():
        part = "/".join(path.split("/")[:2]) if path.startswith("blocks/") else path.split("/")[0]
        parts[part] = parts.get(part, 0) + len(entry.place_P)
    shares = {part: count / max(module.nonzeros, 1) for part, count in sorted(parts.items(), key=lambda p: -p[1])}
    return {
        **module.about, "nonzeros": module.nonzeros, "size": module.size, "achieved_density": module.density,
        "bytes": 8 * module.nonzeros, "base_sha256": module.base_sha256, "share_by_part": shares,
    }  # fmt: skip
