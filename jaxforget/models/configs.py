"""Read, check and write the fields of a Hugging Face config.json. Family configs keep its names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from jaxforget.errors import UserError

_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
SOURCE = "source"


def source_field() -> Any:
    """Declare the field that keeps the original config.json as text, so that saving loses no key.

    It takes no part in equality or hashing: two models that compute the same are the same to jit.
    """
    return dataclasses.field(default="{}", compare=False, repr=False)


def read(
    cls: Any, raw: dict[str, Any], *, defaults: dict[str, Any] | None = None, ignore: Iterable[str] = (), **given: Any
) -> Any:
    """Build the dataclass `cls` from the keys of `raw` that it declares.

    given: fields that the caller has read. defaults: values of absent keys, before those of the class.
    ignore: keys that mean nothing here. Raises UserError naming a field whose value has the wrong type.
    """
    found = {name: value for name, value in raw.items() if name not in ignore}
    found = (defaults or {}) | found
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        # The annotations are text such as "int | None". Other types are read by their family, and come in
        # `given`.
        kind, _, optional = str(field.type).partition(" | ")
        if field.name in given or field.name not in found or field.name == SOURCE:
            continue
        value: Any = found[field.name]
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


def write(config: Any, architectures: dict[str, dict[str, str]], *, drop: Iterable[str] = ()) -> dict[str, Any]:
    """Return config.json: the keys it was read from, updated by the fields of `config` except `drop`, and the head."""
    skip = {SOURCE, "head", "labels", *drop}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in skip}
    fields["architectures"] = [architectures[config.model_type][config.head]]
    if config.head == "classification":
        fields["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        fields["label2id"] = {label: i for i, label in enumerate(config.labels)}
        fields["problem_type"] = "single_label_classification"
    return json.loads(config.source) | fields


def head_from(raw: dict[str, Any], heads: dict[str, str]) -> dict[str, Any]:
    """Read the fields `head` and `labels`. heads: head -> Hugging Face architecture, the family's usual head first.

    A file that names no architecture gets the usual head; one of a bare model too if that is `causal`, which is most
    often tied and needs no parameters, and else none.
    """
    names = raw.get("architectures") or []
    named = {architecture: head for head, architecture in heads.items()}
    if not isinstance(names, list) or any(name not in named for name in names[:1]):
        raise UserError(f"config field architectures is {names!r}; supported: {', '.join(named)}")
    usual = next(iter(heads))
    head = named[names[0]] if names else usual
    if head == "none" and usual == "causal":
        head = usual
    if head != "classification":
        return {"head": head}
    if raw.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(f"config field problem_type is {raw['problem_type']!r}; supported: single_label_classification")
    found = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
    try:
        # transformers names classes without a name LABEL_0, LABEL_1, ...: data calls them 0, 1, ...
        labels = tuple(str(found[i]).removeprefix("LABEL_") for i in sorted(found, key=int))
    except (TypeError, ValueError):
        raise UserError(f"config field id2label is {found!r}; expected an object of numbers to names") from None
    return {"head": head, "labels": labels}


def check_head(config: Any, architectures: dict[str, dict[str, str]]) -> None:
    """Raise UserError unless the family has this head, and classification its labels."""
    choose("head", config.head, architectures[config.model_type])
    if config.head == "classification" and len(set(config.labels)) < max(2, len(config.labels)):
        raise UserError(f"config field labels is {config.labels!r}; classification needs two or more different names")


def only(raw: dict[str, Any], **allowed: Any) -> None:
    """Raise UserError for a field that is set to anything but the one value that is implemented."""
    for name, value in allowed.items():
        if raw.get(name, value) != value:
            raise UserError(f"config field {name} is {raw[name]!r}; supported: {value!r}")


def choose(name: str, value: Any, allowed: Iterable) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"config field {name} is {value!r}; supported: {', '.join(map(str, allowed))}")


def positive(config: Any, *names: str) -> None:
    """Raise UserError unless every named field is above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"config field {name} is {getattr(config, name)!r}; it must be above 0")


def divides(config: Any, whole: str, part: str) -> None:
    """Raise UserError unless field `whole` is a multiple of field `part`."""
    if getattr(config, whole) % getattr(config, part):
        raise UserError(
            f"config field {whole} is {getattr(config, whole)}; it must be a multiple of {part}, "
            f"which is {getattr(config, part)}"
        )
