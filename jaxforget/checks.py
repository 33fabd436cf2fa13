"""Checks of settings: each raises UserError, one sentence with the setting's name and what is allowed.

named: what stands before a name, such as `--retrain.`; names of flags are spelt with dashes. None is a setting not
given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxforget.errors import UserError

T = TypeVar("T")


def positive(*, named: str = "", **settings: float | None) -> None:
    """Refuse what is not above 0, or not finite."""
    _check(lambda value: 0 < value < math.inf, "it must be above 0", named, settings)


def at_least(low: float, *, named: str = "", **settings: float | None) -> None:
    """Refuse what is below `low`, or not finite."""
    _check(lambda value: low <= value < math.inf, f"it must be at least {low}", named, settings)


def between(low: float, high: float, *, named: str = "", **settings: float | None) -> None:
    """Refuse what is outside of an interval; its ends are allowed."""
    _check(lambda value: low <= value <= high, f"it must be between {low} and {high}", named, settings)


def one_of(allowed: Sequence[str], *, named: str = "", **settings: str | None) -> None:
    """Refuse what is not in a list."""
    _check(lambda value: value in allowed, f"use one of {', '.join(allowed)}", named, settings)


def given(flag: str, value: T | None) -> T:
    """Return a setting that has no default; refuse one that was not given, or is empty."""
    if not value:
        raise UserError(f"{flag} is missing; see --help")
    return value


def _check(fits: Callable[[Any], bool], wanted: str, named: str, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if value is not None and not fits(value):
            spelt = name.replace("_", "-") if named.startswith("--") else name
            finite = " and finite" if isinstance(value, float) and not math.isfinite(value) else ""
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{named}{spelt} is {shown}; {wanted}{finite}")
