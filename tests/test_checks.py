"""Checks of settings: what they allow, and the sentence for what they do not."""

import functools
import math

import pytest

from jaxforget import checks
from jaxforget.errors import UserError


@pytest.mark.parametrize("check, allowed, refused", [
    (checks.positive, (1, 1e-30), {0: "above 0", -1.5: "above 0", math.inf: "above 0 and finite"}),
    (functools.partial(checks.at_least, 2), (2, 2.0, 10**17), {1: "at least 2", math.nan: "at least 2 and finite"}),
    (functools.partial(checks.between, 0, 1), (0, 0.5, 1), {-0.1: "between 0 and 1", 1.1: "between 0 and 1"}),
])  # fmt: skip
def test_numbers(check, allowed, refused):
    for value in (*allowed, None):
        check(a_rate=value)
    for value, words in refused.items():
        for named, spelt in (("", "a_rate"), ("--x.", "--x.a-rate"), ("attack ", "attack a_rate")):
            with pytest.raises(UserError) as error:
                check(named=named, first=allowed[0], a_rate=value)
            assert str(error.value) == f"{spelt} is {value}; it must be {words}"


def test_names():
    checks.one_of(("left", "right"), side="left", other=None)
    with pytest.raises(UserError, match="^side is 'up'; use one of left, right$"):
        checks.one_of(("left", "right"), side="up")


def test_what_has_to_be_given():
    assert checks.given("--data", "file.jsonl") == "file.jsonl"
    for nothing in (None, "", ()):
        with pytest.raises(UserError, match="^--data is missing; see --help$"):
            checks.given("--data", nothing)
