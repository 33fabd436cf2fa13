"""Generated training sets of different kinds, each with a query of the same kind whose cause is therefore known.

| set | what |
| --- | --- |
| people | questions about fictional people; the query is about other people |
| general | general questions; the query has others |
| reviews | judgements of people at work; the query has others of the same distribution |
| counting | n spelled, n + 1 in digits |
| deleting | the letter beside digits that are struck |
"""

from __future__ import annotations

from jaxforget import checks
from jaxforget.data import fictional, skills, stereotyped
from jaxforget.data.sources import Record

HELD_OUT = 5  # every fifth record of a skill is of its query


def generate(rows: int = skills.ROWS) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return (training sets by name, queries by the same names). rows: of a set, at most; a query has a quarter."""
    checks.between(1, skills.ROWS, rows=rows)
    people = fictional.generate(fictional.FictionalConfig(approximate_people=20))
    reviews = stereotyped.generate(stereotyped.StereotypedConfig(records=rows, test_records=rows))
    sets = {
        "people": (people["retain"], people["approximate"]),
        "general": (people["general"], people["general_test"]),
        "reviews": (reviews["train"], reviews["test"]),
    }
    for name, corpus in (("counting", "A"), ("deleting", "B")):
        records = skills.generate(corpus)[0]["sim_same"]
        split = [[r for i, r in enumerate(records) if (i % HELD_OUT == 0) == held] for held in (False, True)]
        sets[name] = (split[0], split[1])
    query_rows = max(1, rows // 4)
    return ({name: train[:rows] for name, (train, _) in sets.items()},
            {name: query[:query_rows] for name, (_, query) in sets.items()})  # fmt: skip
