"""Choosing rows of a table of methods by name, and changing their settings."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxforget.errors import UserError


def choose(
    table: Mapping[str, Any], names: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Look up methods by name, in the order given; `all` is every row, a group is several.

    Raises UserError listing the valid names.
    """
    groups = {"all": tuple(table), **(groups or {})}
    if "all" in names:
        return dict(table)
    chosen = [one for name in names for one in groups.get(name, (name,))]
    for name in chosen:
        if name not in table:
            raise UserError(f"unknown method {name!r}; valid methods are {', '.join((*groups, *table))}")
    return {name: table[name] for name in chosen}


def adjust(methods: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply settings spelt `method.field=value`, such as `ascent_kl_indist.retain_weight=2`.

    Raises UserError naming the fields a method has.
    """
    methods = dict(methods)
    for setting in settings:
        target, _, text = setting.partition("=")
        name, _, field = target.partition(".")
        if name not in methods:
            raise UserError(f"--settings {setting}: no such method in this run; its methods are {', '.join(methods)}")
        fields = [f.name for f in dataclasses.fields(methods[name])]
        if field not in fields:
            raise UserError(
                f"--settings {setting}: {name} has no {field!r}; it has {', '.join(fields) or 'no settings'}"
            )
        before = getattr(methods[name], field)
        kind = int if before is None else type(before)
        try:
            value = kind(ast.literal_eval(text)) if kind is not str else text
        except (ValueError, SyntaxError, TypeError):
            raise UserError(f"--settings {setting}: give {field} a {kind.__name__}, such as {before}") from None
        try:
            methods[name] = dataclasses.replace(methods[name], **{field: value})
        except UserError as error:
            raise UserError(f"--settings {setting}: {error}") from None
    return methods
