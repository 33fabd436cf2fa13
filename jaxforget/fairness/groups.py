"""Which group a record belongs to. Shapes: N records, A groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxforget.data.sources import Record
from jaxforget.errors import UserError

NAMED = ("not named", "named")


def groups_of(
    records: Sequence[Record], field: str, names: Sequence[str] | None = None, where: str = "records"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the group of every record, int32 (N,), and the names of the groups.

    field: a column with one value a record, or `COLUMN=value,value,…` for a column with a list of values: its two
    groups are the records that name one of these and those that do not. Groups that overlap, such as communities that
    one text may name together, are no partition; ask for one of them against the rest, one after the other.
    names: the known groups. Raises UserError for a missing column, a list without `=`, a group that is not known.
    """
    column, listed, wanted = field.partition("=")
    members = {value.strip() for value in wanted.split(",") if value.strip()}
    if listed and not members:
        raise UserError(f"--groups {field}: no value after '='; write COLUMN=value,value")
    values = []
    for record in records:
        if column not in record.fields:
            raise UserError(f"{where}: record {record.id!r} has no field {column!r}; "
                            f"it has {', '.join(record.fields) or 'none'}")  # fmt: skip
        value = record.fields[column]
        if listed:
            named = value if isinstance(value, (list, tuple)) else [value]
            values.append(NAMED[any(str(one) in members for one in named)])
        elif isinstance(value, (str, int, float)):
            values.append(str(value))
        else:
            raise UserError(f"{where}: record {record.id!r} has {value!r} in {column!r}; groups need one value a "
                            f"record, or --groups {column}=value,value for a list")  # fmt: skip
    known = tuple(names or (NAMED if listed else sorted(set(values))))
    place = {name: index for index, name in enumerate(known)}
    for record, value in zip(records, values, strict=True):
        if value not in place:
            raise UserError(f"{where}: record {record.id!r} is of group {value!r}, which the fit set does not have; "
                            f"known groups are {', '.join(known)}")  # fmt: skip
    if len(known) < 2:
        raise UserError(f"{where}: all records are of group {known[0]!r}; fairness compares two groups or more")
    return np.asarray([place[value] for value in values], np.int32), known
