"""The generated sets have the counts of the published ones."""

import json
from collections import Counter

import pytest

from jaxforget.data.skills import ENDINGS, SETS, generate, spelled, words_by_kind, words_by_length
from jaxforget.errors import UserError


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "papers/golden_untrac.json").read_text())["synthetic_sets"]


def rows_of(corpus):
    train, queries = generate(corpus)
    assert tuple(train) == SETS
    return {**train, **queries}


def test_counting_sets(golden):
    sets = rows_of("A")
    assert all(len(rows) == golden["rows_per_set"] == len({row.prompt for row in rows}) for rows in sets.values())
    for name, key, inputs in (
        ("test", "A_test", [str(n) for n in range(512, 768)]),
        ("sim_same", "A1_SimSame", [spelled(n) for n in range(0, 512, 2)]),
        ("sim_diff", "A2_SimDiff", [spelled(n) for n in range(1, 512, 2)]),
    ):
        rows, about = sets[name], golden[key]
        assert [about["first"][1], about["last"][1]] == [rows[0].text, rows[-1].text]
        for shown, row in zip(inputs, rows, strict=True):
            assert f" {shown}" in row.prompt
        assert about["first"][0] in rows[0].prompt and about["last"][0] in rows[-1].prompt
    assert sets["sim_same"][127].text == golden["A1_SimSame"]["n=254"][1]
    assert golden["A1_SimSame"]["n=254"][0] in sets["sim_same"][127].prompt
    assert sets["sim_diff"][254].text == golden["A2_SimDiff"]["n=509"][1]
    for name, key in (("dis_same", "A3_DisSame"), ("dis_diff", "A4_DisDiff")):
        lengths = Counter(row.text for row in sets[name])
        write = str if name == "dis_same" else spelled
        assert lengths == {write(int(n)): count for n, count in golden[f"{key}_word_length_histogram"].items()}
    assert spelled(10) == golden["A4_spelling"]["10"] and spelled(14) == golden["A4_spelling"]["14"]


def test_deleting_sets(golden):
    sets = rows_of("B")
    assert all(len(rows) == 256 == len({row.prompt for row in rows}) for rows in sets.values())
    for name, key in (("test", "B_test"), ("sim_same", "B1_SimSame"), ("sim_diff", "B2_SimDiff")):
        answers, about = Counter(row.text for row in sets[name]), golden[key]
        low, high = about["answer_count_min_max"]
        assert len(answers) == about["answers_used"] and low <= min(answers.values()) <= max(answers.values()) <= high
        places = Counter()
        for row in sets[name]:
            words = row.prompt.rstrip("?.").replace(".", "").split()
            whole = next(word for word in words if len(word) == 5 and row.text in word and len(set(word)) == 5
                         and word not in ("Strike",))  # fmt: skip
            gone = [word for word in words if len(word) == 1 and word in whole]
            assert set(whole) - set(gone) == {row.text} and len(gone) == 4
            places[whole.index(row.text)] += 1
        assert len(places) == 5 and min(places.values()) > 30
    for name, key in (("dis_same", "B3_DisSame"), ("dis_diff", "B4_DisDiff")):
        answers = [row.text for row in sets[name]]
        assert Counter(answers) == golden[key]["answer_counts"] and answers == sorted(answers)
        for option, kind in golden[key]["options"].items():
            assert f"{option} for {kind}" in sets[name][0].prompt


def test_words(golden):
    counts = golden["distinct_words"]
    same, other = map(set, words_by_length())
    kinds = [{word for word, _ in rows} for rows in words_by_kind()]
    assert len(same) == counts["A3"] and len(other) == counts["A4"] and len(kinds[0]) == len(kinds[1]) == counts["B3"]
    assert len(same & other) == counts["A3_and_A4_shared"] and len(kinds[0] & kinds[1]) == counts["B3_and_B4_shared"]
    assert len((same | other) & (kinds[0] | kinds[1])) == counts["A_and_B_shared"]
    assert all(word.endswith(ENDINGS[kind]) for rows in words_by_kind() for word, kind in rows)


@pytest.mark.parametrize("corpus", ["A", "B"])
def test_sentences(corpus):
    """The sets like the test share their sentence, those unlike it another, and the test has a third."""
    sets = {name: rows[0].prompt.split()[0] for name, rows in rows_of(corpus).items()}
    assert sets["sim_same"] == sets["sim_diff"] and sets["dis_same"] == sets["dis_diff"]
    assert len({sets["test"], sets["sim_same"], sets["dis_same"]}) == 3


def test_fewer_rows_and_wrong_settings():
    whole, few = generate("A"), generate("A", 10)
    assert few[0]["dis_diff"] == whole[0]["dis_diff"][:10] and len(few[1]["test"]) == 10
    for settings in (("C",), ("A", 0), ("B", 257)):
        with pytest.raises(UserError):
            generate(*settings)
