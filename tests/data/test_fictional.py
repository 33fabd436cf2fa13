"""The generated corpus: nobody twice, nothing to guess, larger holds smaller, all people look alike."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxforget.data.fictional import FACTS, FictionalConfig, generate, tokenizer_texts, write
from jaxforget.data.sources import Record, read_records
from jaxforget.data.tokens import load_tokenizer, tokenize, train_tokenizer
from jaxforget.errors import UserError

PEOPLE_SETS = ("forget", "retain", "approximate")
CONFIG = FictionalConfig(people=300, facts_per_person=20, paraphrases=2, general_records=600)


@pytest.fixture(scope="module")
def sets():
    return generate(CONFIG)


@pytest.fixture(scope="module")
def tokenizer(sets):
    return train_tokenizer(tokenizer_texts(sets["general"]))


def _people(records):
    return {record.fields["person"] for record in records}


def _facts(records):
    return {(r.fields["person"], r.fields["fact"]): r for r in records if r.fields["paraphrase"] == 0}


def test_sizes(sets):
    assert [len(_people(sets[name])) for name in PEOPLE_SETS] == [30, 270, 30]
    assert [len(sets[name]) for name in PEOPLE_SETS] == [30 * 40, 270 * 40, 30 * 40]
    assert len(sets["general"]) == 600 and len(sets["general_test"]) == 100
    assert len(_people(generate(replace(CONFIG, approximate_people=7))["approximate"])) == 7


def test_ids_and_names_never_repeat(sets):
    records = [record for part in sets.values() for record in part]
    assert len({record.id for record in records}) == len(records)
    people = [_people(sets[name]) for name in PEOPLE_SETS]
    assert len(set.union(*people)) == sum(map(len, people)) == 330
    assert sets["forget"][0].id == "p0009-birthplace-0"
    # No two questions are the same, so no two answers can contradict each other.
    questions = Counter(record.prompt for name in PEOPLE_SETS for record in sets[name])
    assert max(questions.values()) == 1
    wordings = Counter(question for fact in FACTS.values() for question, _ in fact.templates)
    assert max(wordings.values()) == 1 and len(wordings) == 80


def test_larger_corpus_holds_the_smaller(sets):
    smaller = generate(replace(CONFIG, people=50, facts_per_person=9, paraphrases=2, general_records=40))
    for name, records in smaller.items():
        larger = {record.id: record for record in sets[name]}
        assert records and all(larger[record.id] == record for record in records), name


def test_seed_decides(sets):
    assert generate(CONFIG) == sets
    other = generate(replace(CONFIG, seed=1))
    same = [a.text == b.text for name in PEOPLE_SETS for a, b in zip(sets[name], other[name])]
    assert np.mean(same) < 0.1


def test_answers_cannot_be_guessed(sets):
    facts = _facts(sets["retain"]).values()
    for name in FACTS:
        answers = Counter(record.text for record in facts if record.fields["fact"] == name)
        # Of 270 people, the most common answer suits few: at most 1 in 24 by chance, more where a group
        # leans.
        assert max(answers.values()) < 270 / 6, name


def test_groups_are_unequal_and_lean(sets):
    records = _facts(sets["retain"] + sets["approximate"] + sets["forget"]).values()
    groups = Counter(record.fields["group"] for record in records if record.fields["fact"] == "pet")
    assert 0.6 < groups["north"] / 330 < 0.8  # 0.7, standard deviation 0.025
    for name, fact in FACTS.items():
        first_half = {fact.templates[0][1].format(value=value) for value in fact.pool[: len(fact.pool) // 2]}
        asked = [r for r in records if r.fields["fact"] == name]
        share = {
            group: np.mean([r.text in first_half for r in asked if r.fields["group"] == group]) for group in groups
        }
        lean = share["north"] - share["south"]
        # Standard deviation of the difference is 0.06 without a lean; the lean is 0.6.
        assert lean > 0.35 if fact.by_group else abs(lean) < 0.25, name


def test_wrong_answers(sets):
    for record in sets["forget"]:
        fields = record.fields
        choices = [fields["paraphrased_answer"], *fields["perturbed_answers"]]
        assert len(set(choices)) == len(choices) == 5
        assert fields["paraphrased_answer"] != record.text
        # All in one wording: they differ from each other only in the value.
        fact = FACTS[fields["fact"]]
        before, after = fact.templates[(fields["paraphrase"] + 1) % 4][1].split("{value}")
        values = [choice.removeprefix(before).removesuffix(after) for choice in choices]
        assert all(value in fact.pool for value in values)
        assert record.text == fact.templates[fields["paraphrase"]][1].format(value=values[0])


def test_general_rules_hold_and_tests_are_held_out():
    sets = generate(FictionalConfig(people=10, general_records=4000, general_test_records=800))
    assert not {r.prompt for r in sets["general"]} & {r.prompt for r in sets["general_test"]}
    assert len({r.prompt for r in sets["general_test"]}) > 600
    learned = {}
    for name in ("general", "general_test"):
        for record in sets[name]:
            kind, words = record.fields["kind"], record.prompt.rstrip("?").split()
            if kind == "sum":
                assert record.text == f"{int(words[2]) + int(words[4])}."
            elif kind == "larger":
                assert record.text == f"{max(int(words[3].rstrip(',')), int(words[5]))}."
            else:
                # The rule is learned from the training records and must hold for the others.
                cue = words[3][:2] if kind == "material" else words[2][-3:]
                assert learned.setdefault((kind, cue), record.text) == record.text
        if name == "general":
            known = len(learned)
    assert len(learned) == known == 8 + 6


def test_bad_settings():
    for change, part in (
        ({"people": 1}, "people is 1"),
        ({"people": 10**6}, "people is 1000000"),
        ({"facts_per_person": 21}, "facts_per_person is 21"),
        ({"paraphrases": 5}, "paraphrases is 5"),
        ({"forget_fraction": 1.0}, "forget_fraction is 1.0"),
        ({"people": 5, "forget_fraction": 0.1}, "0 of 5"),
    ):
        with pytest.raises(UserError, match=part):
            generate(replace(CONFIG, **change))


def test_write_and_read_back(sets, tmp_path):
    paths = write(tmp_path / "corpus", sets)
    assert set(paths) == set(sets)
    for name, path in paths.items():
        assert read_records(path, id_field="id") == sets[name]
    write(tmp_path / "corpus", {"forget": sets["forget"]})  # the same again is no change
    with pytest.raises(UserError, match="forget.jsonl"):
        write(tmp_path / "corpus", {"forget": sets["forget"][1:]})
    text = write(tmp_path, {"plain": [Record("a", "words", fields={"x": 1})]})["plain"]
    assert read_records(text, id_field="id") == [Record("a", "words", fields={"x": 1})]


# ---------------------------------------------------------------- its tokenizer


def test_tokenizer_round_trip(sets, tokenizer, tmp_path):
    assert len(tokenizer) <= 1024
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    for text in (sets["retain"][0].prompt, "Où? 雪 \n\t x  y", " 1984"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and loaded(text)["input_ids"] == ids


def test_lengths_do_not_tell_trained_from_untrained(sets, tokenizer):
    lengths = {
        name: np.mean([len(tokenizer(f" {person}")["input_ids"]) for person in _people(sets[name])])
        for name in PEOPLE_SETS
    }
    assert max(lengths.values()) < 5
    # Names have 3 to 6 tokens, standard deviation about 0.5: 0.1 for a mean over 30 people.
    assert max(lengths.values()) - min(lengths.values()) < 0.4
    for name in PEOPLE_SETS:
        examples = tokenize(sets[name], tokenizer, max_length=64)
        assert 15 <= examples.lengths.mean() <= 25 and examples.lengths.max() <= 32


def test_tokenizer_is_deterministic(sets, tokenizer):
    again = train_tokenizer(tokenizer_texts(sets["general"]))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    # Another process hashes strings differently.
    code = (
        "import hashlib; from jaxforget.data import *; from dataclasses import *;"
        f"general = generate({CONFIG!r})['general'];"
        "print(hashlib.sha256(train_tokenizer(tokenizer_texts(general)).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def test_tokenizer_needs_room_for_bytes():
    with pytest.raises(UserError, match="vocab_size is 100"):
        train_tokenizer([], vocab_size=100)
