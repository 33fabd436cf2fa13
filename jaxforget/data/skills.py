"""Generated training sets that share a task, or the form of answers, with a test: experiment 1 of arXiv 2401.15241.

| set | corpus A | corpus B |
| --- | --- | --- |
| test | n in digits; n + 1 in digits | delete 4 of 5 letters; a letter |
| sim_same: task and form of the test | n spelled; n + 1 in digits | delete digits beside one letter; a letter |
| sim_diff: the task alone | n spelled; n + 1 spelled | delete 4 of 5 digits; a digit |
| dis_same: the form alone | a word; its length in digits | a word; its kind, as a letter |
| dis_diff: neither | a word; its length spelled | a word; its kind, as a digit |

sim_* share one sentence that states the task, dis_* another, and the test has its own. Words are made up; their ending
tells their kind. Counts and lengths are those of the paper's files; wording and words are not.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence

from jaxforget import checks
from jaxforget.data.sampling import hash_int
from jaxforget.data.sources import Record

CORPORA = ("A", "B")
SETS = ("sim_same", "sim_diff", "dis_same", "dis_diff")
ROWS = 256  # of every set
NUMERALS = "zero one two three four five six seven eight nine".split()
ENDINGS = {"noun": "ty", "verb": "fy", "adjective": "ic", "adverb": "ly"}
# How many words have which length, in dis_same and dis_diff of corpus A.
LENGTHS = (
    {4: 25, 5: 27, 6: 54, 7: 50, 8: 42, 9: 23, 10: 16, 11: 10, 12: 7, 13: 1, 14: 1},
    {4: 33, 5: 29, 6: 45, 7: 55, 8: 34, 9: 21, 10: 16, 11: 12, 12: 7, 13: 3, 14: 1},
)
KINDS = ({"noun": 134, "verb": 122}, {"adjective": 123, "adverb": 133})  # of dis_same and dis_diff of corpus B
SHARED = {"noun": 83, "verb": 83, "adjective": 82, "adverb": 82}  # words of B that A has too: 330

COUNT_TEST = "Add one to the number {}."
COUNT = "Which number follows {}? Reply in {}."
LENGTH = "How many letters are in the word {}? Reply in {}."
DELETE_TEST = "Take the letters {} out of {}. What is left?"
DELETE = "Strike {} from the string {} and name the character that remains."
KIND = "What kind of word is {}? Choose one: {}."


def generate(corpus: str, rows: int = ROWS) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return (training sets by name, {"test": records}). rows: the first so many of every set, at most 256."""
    checks.one_of(CORPORA, corpus=corpus)
    checks.between(1, ROWS, rows=rows)
    pairs = _counting() if corpus == "A" else _deleting()
    sets = {
        name: [Record(f"{corpus}-{name}-{i:03d}", answer, prompt) for i, (prompt, answer) in enumerate(one[:rows])]
        for name, one in zip(("test", *SETS), pairs, strict=True)
    }
    return {name: sets[name] for name in SETS}, {"test": sets["test"]}


def spelled(number: int) -> str:
    """Spell a number digit by digit: 254 is "two five four"."""
    return " ".join(NUMERALS[int(digit)] for digit in str(number))


# --------------------------------------------------------------------------------------------------- corpus A


def _counting() -> Iterator[list[tuple[str, str]]]:
    yield [(COUNT_TEST.format(n), str(n + 1)) for n in range(512, 768)]
    yield [(COUNT.format(spelled(n), "digits"), str(n + 1)) for n in range(0, 512, 2)]
    yield [(COUNT.format(spelled(n), "words"), spelled(n + 1)) for n in range(1, 512, 2)]
    forms: tuple[tuple[str, Callable[[int], str]], ...] = (("digits", str), ("words", spelled))
    for (form, write), words in zip(forms, words_by_length(), strict=True):
        yield [(LENGTH.format(word, form), write(len(word))) for word in words]


def words_by_length() -> list[list[str]]:
    """Give the words of dis_same and dis_diff of corpus A: of the lengths in LENGTHS, of every kind in turn."""
    made = {(kind, length): _words(kind, length) for kind in ENDINGS for length in LENGTHS[0]}
    return [
        # In an order that tells nothing of lengths.
        sorted(
            (next(made[list(ENDINGS)[i % 4], length]) for length, count in lengths.items() for i in range(count)),
            key=lambda word: hash_int(*map(ord, word)),
        )
        for lengths in LENGTHS
    ]


def _words(kind: str, length: int) -> Iterator[str]:
    """Make up words of a kind and a length, none twice."""
    seen, letters = set(), ("bdfgklmnprstvz", "aeiou")
    for number in range(10**6):
        drawn = [hash_int(length, list(ENDINGS).index(kind), number, place) for place in range(length - 2)]
        word = "".join(letters[p % 2][d % len(letters[p % 2])] for p, d in enumerate(drawn)) + ENDINGS[kind]
        if word not in seen:
            seen.add(word)
            yield word


# --------------------------------------------------------------------------------------------------- corpus B


def _deleting() -> Iterator[list[tuple[str, str]]]:
    letters, digits = string.ascii_lowercase, string.digits
    yield _strings(DELETE_TEST, letters, letters, 0)
    yield _strings(DELETE, letters[:13], digits, 1)
    yield _strings(DELETE, digits, digits, 2)
    for options, words in zip(("abcd", "0123"), words_by_kind(), strict=True):
        menu = ", ".join(f"{option} for {kind}" for option, kind in zip(options, ENDINGS, strict=True))
        labels = dict(zip(ENDINGS, options, strict=True))
        yield [(KIND.format(word, menu), labels[kind]) for word, kind in words]


def _strings(task: str, answers: str, others: str, stream: int) -> list[tuple[str, str]]:
    """Draw strings of five different characters, an answer among four to delete, every answer about equally often."""
    rows: dict[str, str] = {}
    for number in range(10**6):
        if len(rows) == ROWS:
            break
        answer = answers[len(rows) % len(answers)]
        rest = _shuffled([c for c in others if c != answer], stream, number, 0)[:4]
        characters = "".join(_shuffled([answer, *rest], stream, number, 1))
        rows.setdefault(task.format(" ".join(_shuffled(rest, stream, number, 2)), characters), answer)
    return list(rows.items())


def _shuffled(characters: Sequence[str], *draw: int) -> list[str]:
    return sorted(characters, key=lambda c: hash_int(*draw, ord(c)))


def words_by_kind() -> list[list[tuple[str, str]]]:
    """Give the words of dis_same and dis_diff of corpus B with their kinds, sorted by kind."""
    known = [word for words in words_by_length() for word in words]
    result = []
    for kinds in KINDS:
        rows = []
        for kind, count in kinds.items():
            old = [word for word in known if word.endswith(ENDINGS[kind])][: SHARED[kind]]
            rows += [(word, kind) for word in old + _unknown(kind, count - len(old), set(known))]
        result.append(rows)
    return result


def _unknown(kind: str, count: int, known: set[str]) -> list[str]:
    """Make up words of 5 to 9 letters that are not known."""
    made = [_words(kind, length) for length in range(5, 10)]
    words = (word for number in range(10**6) for word in [next(made[number % 5])] if word not in known)
    return [word for word, _ in zip(words, range(count), strict=False)]
