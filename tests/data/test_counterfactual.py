"""Counterfactuals change the listed words and nothing else; a record and its counterfactual are one unit."""

import gzip
import json
import re
from importlib.resources import files

import pytest

from jaxforget.data.counterfactual import CounterfactualConfig, augment, load_swaps, swap
from jaxforget.data.sources import Record
from jaxforget.errors import UserError

SWAPS = load_swaps(CounterfactualConfig())
NAMED = load_swaps(CounterfactualConfig(names=True))

# Written for this test, hard on purpose: a sentence and what it should become.
SENTENCES = """
    She lost her keys. | He lost his keys.
    I saw her. | I saw him.
    I saw her yesterday. | I saw him yesterday.
    They gave her a book. | They gave him a book.
    They gave her money. | They gave him money.
    We asked her to wait. | We asked him to wait.
    The letter is from her, not from me. | The letter is from him, not from me.
    Her brother called. | His sister called.
    Her own car broke down. | His own car broke down.
    That car is hers. | That car is his.
    Hers was the loudest voice. | His was the loudest voice.
    He painted his house. | She painted her house.
    The house is his. | The house is hers.
    The idea was his, she said. | The idea was hers, he said.
    A friend of his came by. | A friend of hers came by.
    A cousin of his is here. | A cousin of hers is here.
    His was the best answer. | Hers was the best answer.
    I told him the truth. | I told her the truth.
    I know him well. | I know her well.
    Nobody believed him. | Nobody believed her.
    "Leave him alone," he said. | "Leave her alone," she said.
    He hurt himself. | She hurt herself.
    She taught herself French. | He taught himself French.
    He's late and he'll miss it. | She's late and she'll miss it.
    The boy's mother waved. | The girl's father waved.
    Mr. Hill greeted the waiter. | Ms. Hill greeted the waitress.
    The dog followed her home. | The dog followed him home.
    Her home is old. | His home is old.
    I saw her leave. | I saw him leave.
    Nobody heard her sing. | Nobody heard him sing.
    They made her laugh. | They made him laugh.
    Let her go. | Let him go.
    He helped her with her bags. | She helped him with his bags.
    He told her that her train was late. | She told him that his train was late.
    I met her when I was ten. | I met him when I was ten.
    I called her back. | I called him back.
    Her back hurts. | His back hurts.
    It was her who rang. | It was him who rang.
    She put on her very best coat. | He put on his very best coat.
    I love her very much. | I love him very much.
    Ask her about it. | Ask him about it.
    Give it to her! | Give it to him!
    Is it her? | Is it him?
    She shut her "new" laptop. | He shut his "new" laptop.
    Her 3 cats sleep. | His 3 cats sleep.
    I paid her 20 dollars. | I paid him 20 dollars.
    He took his time. | She took her time.
    His and her towels hung there. | Her and his towels hung there.
    His after-dinner speech was long. | Her after-dinner speech was long.
    The coat, not his but mine, is wet. | The coat, not hers but mine, is wet.
    Both his parents and his wife came. | Both her parents and her husband came.
    All his life he had waited. | All her life she had waited.
    His most recent film failed. | Her most recent film failed.
    His not coming was odd. | Her not coming was odd.
    She saw his and went pale. | He saw hers and went pale.
    The queen raised her hand; her guests rose. | The king raised his hand; his guests rose.
    My aunt told her sons. | My uncle told his daughters.
    Everyone likes her (she is kind). | Everyone likes him (he is kind).
    They found her asleep. | They found him asleep.
    We wish her luck. | We wish him luck.
    The judge found her guilty. | The judge found him guilty.
    They elected her in May. | They elected him in May.
    She said her then boss lied. | He said his then boss lied.
    His father was a salesman. | Her mother was a saleswoman.
"""
CASES = [tuple(part.strip() for part in line.split("|")) for line in SENTENCES.strip().splitlines()]


def test_errors_on_the_hand_made_set():
    wrong = [source for source, target in CASES if swap(source, SWAPS)[0] != target]
    assert len(CASES) == 64 and len(wrong) == 16


def test_lists_hold_no_accident():
    for words in (SWAPS, NAMED):
        assert all(word != other for word, other in words.items())
    irreversible = {word for word, other in NAMED.items() if NAMED.get(other) != word}
    assert irreversible == {"him", "hers", "ma'am", "Mrs", "mum", "mums", "mummy", "auntie", "bridegroom"}
    assert len(SWAPS) == 249 and len(NAMED) == 249 + 124
    shipped = {entry.name for entry in files("jaxforget.data").iterdir()}
    assert {"gender_pairs.tsv", "first_names.tsv"} <= shipped


def test_twice_is_the_identity_where_words_have_a_reverse():
    for word, other in NAMED.items():
        if NAMED.get(other) == word and word not in ("his", "her"):
            for text in (word, word[0].upper() + word[1:], word.upper()):
                once, hits = swap(f"<{text}> 7", NAMED)
                assert hits == 1 and once != f"<{text}> 7"
                assert swap(once, NAMED) == (f"<{text}> 7", 1)
    for text in ("Her mother saw her.", "his hat, HIS own", "I saw him", "It is his."):
        assert swap(swap(text, SWAPS)[0], SWAPS)[0] == text
    assert swap(swap("gave him money", SWAPS)[0], SWAPS)[0] == "gave his money"  # the exception


@pytest.mark.parametrize(
    "text, expected, hits",
    [
        ("HE He he hE", "SHE She she she", 4),
        ("He's, he’d; HE'LL", "She's, she’d; SHE'LL", 3),
        ("my mother-in-law, an ex-wife", "my father-in-law, an ex-husband", 2),
        ("Yes, ma'am. Yes, Sir!", "Yes, sir. Yes, Madam!", 2),
        ('"Is it his?" his "best" man', '"Is it hers?" her "best" woman', 3),
        ("the, there, hero_x, he2, sheep, HERself", "the, there, hero_x, he2, sheep, himself", 1),
        ("", "", 0),
    ],
)
def test_case_and_boundaries(text, expected, hits):
    assert swap(text, SWAPS) == (expected, hits)


def test_names_only_when_asked_and_only_with_a_capital():
    assert swap("John saw mr. Jack and MARY; will jack?", SWAPS) == ("John saw mr. Jack and MARY; will jack?", 0)
    assert swap("John saw Mary and MARY; jack up", NAMED) == ("Mary saw John and JOHN; jack up", 3)


def test_nothing_but_words_changes():
    text = "He,  she\t(his 3.5 kg)\r\n -- her: 1,000!\u00a0«Him»… “hers” ☺ aunt's\n\n"
    once, hits = swap(text, NAMED)
    assert hits == 7

    def frame(value):
        return re.sub(r"[^\W\d_]+", "w", value)

    assert frame(once) == frame(text)


# ---------------------------------------------------------------- records

RECORDS = [
    Record("a", "He is 30.", None, {"label": 1}),
    Record("b", "Nothing to see."),
    Record("c", "In Rome.", "Where does she live?"),
    Record("d", "The king slept."),
]


def _augment(records=RECORDS, seed=0, **settings):
    return augment(records, CounterfactualConfig(**settings), seed, SWAPS)


def test_two_sided():
    result = _augment(sides="two")
    assert [r.id for r in result.records] == ["a", "a#cda", "b", "c", "c#cda", "d", "d#cda"]
    assert result.unit_of == {"a": "a", "a#cda": "a", "b": "b", "c": "c", "c#cda": "c", "d": "d", "d#cda": "d"}
    assert (result.matched, result.dropped) == (3, 0)
    assert result.records[1] == Record("a#cda", "She is 30.", None, {"label": 1})
    assert result.records[4] == Record("c#cda", "In Rome.", "Where does he live?")
    without = _augment(sides="two", keep_unmatched=False)
    assert without.records == [r for r in result.records if r.id != "b"] and without.dropped == 1
    assert set(without.unit_of) == {r.id for r in without.records}


def test_one_sided_and_off():
    assert [r.id for r in _augment(sides="one").records] == ["a#cda", "b", "c#cda", "d#cda"]
    assert [r.id for r in _augment(sides="one", keep_unmatched=False).records] == ["a#cda", "c#cda", "d#cda"]
    off = _augment(keep_unmatched=False)
    assert off.records == RECORDS and off.unit_of == {r.id: r.id for r in RECORDS} and off.dropped == 0


def test_random_is_one_to_one_and_depends_on_seed_and_id_alone():
    records = [Record(f"r{i}", "He slept.") for i in range(2000)]
    result = _augment(records, sides="random")
    assert len(result.records) == 2000 and sorted(result.unit_of.values()) == sorted(r.id for r in records)
    swapped = {r.id for r in result.records if r.id.endswith("#cda")}
    assert all((r.text == "She slept.") == (r.id in swapped) for r in result.records)
    assert abs(len(swapped) - 1000) < 4 * 22.4  # four standard deviations
    some = {r.id for r in _augment(records[::-3], sides="random").records}
    assert some <= {r.id for r in result.records}
    assert swapped != {r.id for r in _augment(records, seed=1, sides="random").records if r.id.endswith("#cda")}


def test_augmenting_twice_is_refused():
    with pytest.raises(UserError, match="'a#cda' is there twice"):
        _augment(_augment(sides="two").records, sides="two")


# ---------------------------------------------------------------- lists of others


def _load(tmp_path, *contents, suffix=".txt"):
    names = []
    for number, content in enumerate(contents):
        path = tmp_path / f"list{number}{suffix}"
        path.write_bytes(content.encode())
        names.append(str(path))
    return load_swaps(CounterfactualConfig(pairs=tuple(names)))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
def test_columns(tmp_path, suffix):
    both = {"man": "woman", "woman": "man", "mr": "mrs", "mrs": "mr"}
    assert _load(tmp_path, "man\twoman\nmr.\tmrs.\n", suffix=suffix) == both
    assert _load(tmp_path, '\ufeffWord,Swap\r\n"man" , woman\r\n\r\nmr.,mrs.\r\n', suffix=suffix) == both


def test_a_list_with_a_reverse_is_directed_and_the_first_match_wins(tmp_path):
    assert _load(tmp_path, "lord,lady\nlady,gentleman\n") == {"lord": "lady", "lady": "lord", "gentleman": "lady"}
    directed = "lord,lady\nman,woman\nwoman,man\nman,girl\n"
    assert _load(tmp_path, directed) == {"lord": "lady", "man": "woman", "woman": "man"}


def test_pronouns_come_together(tmp_path):
    words = {"he": "she", "she": "he", "her": "his", "hers": "his", "his": "her", "him": "her"}
    assert _load(tmp_path, "he,she\nhis,her\n") == words
    neutral = _load(tmp_path, "her\ttheir\n")
    assert neutral == {"her": "their", "their": "her"} and swap("Saw her.", neutral)[0] == "Saw their."


def test_lists_conflict_only_where_both_say_so(tmp_path):
    assert _load(tmp_path, "groom,bride\n", "bridegroom,bride\nhis,her\n", "her,him\n")["bride"] == "groom"
    with pytest.raises(UserError, match=r"list1\.txt, line 2: 'lord' becomes 'dame', but 'lady' at .*list0"):
        _load(tmp_path, "lord,lady\n", "he,she\nlord,dame\n")


def test_aligned_files(tmp_path):
    for name, content in {"m": "man\nmonk\n\nking\n", "f": "woman\nnun\n\nqueen", "short": "woman\nnun\n"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    swaps = load_swaps(CounterfactualConfig(pairs=(f"{tmp_path / 'm.txt'}:{tmp_path / 'f.txt'}",)))
    there = {"man": "woman", "monk": "nun", "king": "queen"}
    assert swaps == there | {right: left for left, right in there.items()}
    with pytest.raises(UserError, match="hold 3 and 2 words"):
        load_swaps(CounterfactualConfig(pairs=(f"{tmp_path / 'm.txt'}:{tmp_path / 'short.txt'}",)))


@pytest.mark.parametrize(
    "content, suffix, message",
    [
        ("he,she\nman\n", ".txt", r"line 2: holds 'man'; allowed are two words a line"),
        ("he,she,it\n", ".csv", r"line 1: holds 'he,she,it'"),
        ("he\tshe\nold man\told woman\n", ".tsv", r"line 2: holds"),
        ("he,\n", ".csv", r"line 1: holds 'he,'"),
        ("word,swap\n\n", ".csv", "holds no word pairs"),
        ('[["he", "she"]]', ".json", r"list0\.json: unknown format of a pair file; allowed are \.csv, \.tsv, \.txt"),
    ],
)
def test_unknown_formats(tmp_path, content, suffix, message):
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path, content, suffix=suffix)
    assert "list0" in str(caught.value) and "MALE.txt:FEMALE.txt" in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_swaps(CounterfactualConfig(pairs=(str(tmp_path / "absent.txt"),)))
    (tmp_path / "latin.txt").write_bytes("fiancé,fiancée".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        load_swaps(CounterfactualConfig(pairs=(str(tmp_path / "latin.txt"),)))


@pytest.mark.shared
def test_published_lists(shared):
    lists = shared / "data" / "word_lists"
    swaps, extra = (str(lists / "corefBias" / f"{name}.txt") for name in ("generalized_swaps", "extra_gendered_words"))
    male, female = (str(lists / "gn_glove" / f"{name}_word_file.txt") for name in ("male", "female"))
    loaded = {
        name: load_swaps(CounterfactualConfig(pairs=pairs))
        for name, pairs in {"directed": (swaps,), "both": (extra,), "all": (swaps, extra)}.items()
    }
    loaded["aligned"] = load_swaps(CounterfactualConfig(pairs=(f"{male}:{female}",)))
    assert {name: len(words) for name, words in loaded.items()} == {
        "directed": 106,  # 104 rows, and her and hers
        "both": 180,
        "all": 253,
        "aligned": 409,
    }
    assert "ladies" in loaded["directed"].values() and loaded["directed"]["him"] == "her"
    assert loaded["all"]["bride"] == "groom" and loaded["both"]["priest"] == "nun"
    for bad in (male, str(lists / "debiaswe" / "definitional_pairs.json")):
        with pytest.raises(UserError, match="MALE.txt:FEMALE.txt"):
            load_swaps(CounterfactualConfig(pairs=(bad,)))


@pytest.mark.shared
def test_errors_on_stories(shared):
    # Whoever wrote his or him has told us which of the two a "her" in its place would have to become.
    total = wrong = 0
    with gzip.open(shared / "data" / "corpora" / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            for match in re.finditer(r"\b(his|him)\b", text):
                total += 1
                wrong += not swap(f"her{text[match.end() : match.end() + 40]}", {"her": "his"})[0].startswith(match[0])
    assert (wrong, total) == (87, 2050)
