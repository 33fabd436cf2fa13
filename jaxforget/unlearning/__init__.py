"""Approximate unlearning: one file a method, one row in METHODS.

The rows named `_indist` and `_general` differ only in the set that supplies the retain text.
"""

import ast
import dataclasses

from jaxforget.errors import UserError
from jaxforget.unlearning.adversarial_samples import AdversarialSamples
from jaxforget.unlearning.ascent_descent import AscentDescent
from jaxforget.unlearning.ascent_kl import AscentKL
from jaxforget.unlearning.gradient_ascent import GradientAscent
from jaxforget.unlearning.random_labels import RandomLabels
from jaxforget.unlearning.recipe import Method, Recipe, Setting

METHODS: dict[str, Method] = {
    "gradient_ascent": GradientAscent(),
    "random_labels": RandomLabels(),
    "adversarial_samples": AdversarialSamples(),
    "ascent_descent_indist": AscentDescent(retain_set="retain"),
    "ascent_descent_general": AscentDescent(retain_set="general"),
    "ascent_kl_indist": AscentKL(retain_set="retain"),
    "ascent_kl_general": AscentKL(retain_set="general"),
}


def choose(names: tuple[str, ...]) -> dict[str, Method]:
    """Look up methods by name, in the order given; `all` is every row. Raises UserError listing the valid names."""
    if "all" in names:
        return dict(METHODS)
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}; valid methods are all, {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def adjust(methods: dict[str, Method], settings: tuple[str, ...]) -> dict[str, Method]:
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
        try:
            value = type(before)(ast.literal_eval(text)) if not isinstance(before, str) else text
        except (ValueError, SyntaxError, TypeError):
            raise UserError(f"--settings {setting}: give {field} a {type(before).__name__}, such as {before}") from None
        methods[name] = dataclasses.replace(methods[name], **{field: value})
    return methods


__all__ = ["METHODS", "Method", "Recipe", "Setting", "adjust", "choose"]
