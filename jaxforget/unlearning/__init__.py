"""Approximate unlearning: one file a method, one row in METHODS.

The rows named `_indist` and `_general` differ only in the set that supplies the retain text.
"""

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
    if names == ("all",):
        return dict(METHODS)
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}; valid methods are all, {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


__all__ = ["METHODS", "Method", "Recipe", "Setting", "choose"]
