"""Groups come from a column; lists become named and not named; what is unknown is refused by name."""

import numpy as np
import pytest

from jaxforget.data.sources import Record
from jaxforget.errors import UserError
from jaxforget.fairness.groups import groups_of


def records(**columns):
    length = len(next(iter(columns.values())))
    return [Record(str(n), "text", fields={name: values[n] for name, values in columns.items()}) for n in range(length)]


def test_values_are_sorted_and_numbers_are_text():
    group_N, names = groups_of(records(age=[30, "20", 30]), "age")
    assert names == ("20", "30")
    np.testing.assert_array_equal(group_N, [1, 0, 1])
    group_N, _ = groups_of(records(age=["20"]), "age", names)
    np.testing.assert_array_equal(group_N, [0])


def test_a_list_is_named_when_any_member_is():
    group_N, names = groups_of(records(targets=[["a"], [], ["c", "b"], ["c"], "a"]), "targets=a, b")
    assert names == ("not named", "named")
    np.testing.assert_array_equal(group_N, [1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("columns", "field", "names", "message"),
    [
        ({"x": [1, 2]}, "y", None, "record '0' has no field 'y'; it has x"),
        ({"x": [["a"], ["b"]]}, "x", None, r"record '0' has \['a'\] in 'x'; groups need one value"),
        ({"x": ["a", "a"]}, "x", None, "all records are of group 'a'"),
        ({"x": ["a", "z"]}, "x", ("a", "b"), "record '1' is of group 'z', which the fit.*; known.* a, b"),
        ({"x": ["a", "b"]}, "x=", None, "no value after '='"),
        ({"x": [None, "b"]}, "x", None, "record '0' has None in 'x'"),
    ],
)
def test_refusals(columns, field, names, message):
    with pytest.raises(UserError, match=message):
        groups_of(records(**columns), field, names)
