"""Approximate unlearning: one file a method, one row in METHODS.

The rows named `_indist` and `_general` differ only in the set that supplies the retain text.
"""

from jaxforget import choice
from jaxforget.choice import adjust
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
    """Look up methods by name; see `jaxforget.choice`."""
    return choice.choose(METHODS, names)


__all__ = ["METHODS", "Method", "Recipe", "Setting", "adjust", "choose"]
