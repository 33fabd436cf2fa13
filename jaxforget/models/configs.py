"""Read, check and write the fields of a Hugging Face config.json. Family configs keep its names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from jaxforget.errors import UserError

_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}
SOURCE = "source"


def source_field():
    """Declare the field that keeps the original config.json as text, so that saving loses no key.

    It takes no part in equality or hashing: two models that compute the same are the same to jit.
    """
    return dataclasses.field(default="{}", compare=False, repr=False)


def read(cls, raw: dict[str, Any], *, defaults: dict[str, Any] | None = None, ignore: Iterable[str] = (), **given):
    """Build the dataclass `cls` from the keys of `raw` that it declares.

    given: fields that the caller has read. defaults: values of absent keys, before those of the class.
    ignore: keys that mean nothing here. Raises UserError naming a field whose value has the wrong type.
    """
    found = {name: value for name, value in raw.items() if name not in ignore}
    found = (defaults or {}) | found
    values = {}
    for field in dataclasses.fields(cls):
        # The annotations are text such as "int | None". Other types are read by their family, and come in
        # `given`.
        kind, _, optional = str(field.type).partition(" | ")
        if field.name in given or field.name not in found or field.name == SOURCE:
            continue
        value = found[field.name]
        if value is None:
            if optional:
                values[field.name] = None
            continue
        if not isinstance(value, _TYPES[kind]) or (kind != "bool" and isinstance(value, bool)):
            raise UserError(f"config field {field.name} is {value!r}; expected {field.type}")
        values[field.name] = float(value) if kind == "float" else value
    if any(field.name == SOURCE for field in dataclasses.fields(cls)):
        values[SOURCE] = json.dumps(raw)
    return cls(**values, **given)


def write(config, *, drop: Iterable[str] = ()) -> dict[str, Any]:
    """Return config.json: the keys it was read from, updated by the fields of `config` except `drop`."""
    skip = {SOURCE, *drop}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in skip}
    return json.loads(config.source) | fields


def choose(name: str, value, allowed: Iterable) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"config field {name} is {value!r}; supported: {', '.join(map(str, allowed))}")


def positive(config, *names: str) -> None:
    """Raise UserError unless every named field is above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"config field {name} is {getattr(config, name)!r}; it must be above 0")


def divides(config, whole: str, part: str) -> None:
    """Raise UserError unless field `whole` is a multiple of field `part`."""
    if getattr(config, whole) % getattr(config, part):
        raise UserError(
            f"config field {whole} is {getattr(config, whole)}; it must be a multiple of {part}, "
            f"which is {getattr(config, part)}"
        )
