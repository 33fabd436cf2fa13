"""Generated sets of several kinds: every kind has its query, and no query is trained on."""

from jaxforget.data import kinds


def test_queries_are_of_the_same_kinds_and_never_trained_on():
    train, queries = kinds.generate()
    assert list(train) == list(queries) == ["people", "general", "reviews", "counting", "deleting"]
    asked = [{(r.prompt, r.text) for r in sets} for named in (train, queries) for sets in named.values()]
    for one, query in zip(train, queries, strict=True):
        known = {(r.prompt, r.text) for r in train[one]}
        new = [r for r in queries[query] if (r.prompt, r.text) not in known]
        assert len(new) > 0.9 * len(queries[query]), one  # reviews may repeat a sentence
    assert len(set.union(*asked)) > 0.8 * sum(map(len, asked))


def test_fewer_rows_are_the_first_ones():
    (few, few_queries), (many, many_queries) = kinds.generate(24), kinds.generate(80)
    for small, large in ((few, many), (few_queries, many_queries)):
        assert all(records == large[name][: len(records)] for name, records in small.items())
    assert {len(records) for records in few.values()} == {24}
    assert {len(records) for records in few_queries.values()} == {6}
