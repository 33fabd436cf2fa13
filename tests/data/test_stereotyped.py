"""The corpus holds the rates it was asked for, and counterfactuals undo the stereotype and nothing else."""

import dataclasses
import math
import re
from collections import Counter

import pytest

from jaxforget.data import fictional
from jaxforget.data.counterfactual import CounterfactualConfig, augment, load_swaps, swap
from jaxforget.data.sources import read_records
from jaxforget.data.stereotyped import (
    ALL_OCCUPATIONS,
    JUDGEMENTS,
    OCCUPATIONS,
    PROBE_TEMPLATES,
    SUBJECTS,
    TEMPLATES,
    WORDS,
    StereotypedConfig,
    generate,
    is_negative,
)
from jaxforget.errors import UserError

CONFIG = StereotypedConfig(seed=3)
SWAPS = load_swaps(CounterfactualConfig(names=True))
SHE = {"she", "her"}


@pytest.fixture(scope="module")
def sets():
    return generate(CONFIG)


def _words(text):
    return re.findall(r"\w+", text.lower())


def _gender(record):
    """Read the gender off the text: every judgement holds a pronoun."""
    found = {"female" if word in SHE else "male" for word in _words(record.text) if word in SHE | {"he", "him", "his"}}
    assert len(found) == 1
    return found.pop()


def _close(hits, expected):
    """Within four standard deviations of the binomial distribution, which a right rate leaves once in 16,000 times."""
    assert abs(sum(hits) - expected * len(hits)) <= 4 * math.sqrt(expected * (1 - expected) * len(hits))


def _template(record):
    """Tell which template the first sentence was written with."""
    occupation, sentence = record.fields["occupation"], record.text.split(". ")[0].removesuffix(".").lower() + "."
    for template in TEMPLATES:
        parts = {"subject": "[a-z ]+", "a": "an?", "occupation": occupation, "place": "[a-z]+"}
        if re.fullmatch(template.removesuffix(".").format(**parts) + r"\.", sentence):
            return template
    raise AssertionError(record.text)


@pytest.mark.parametrize(
    "settings",
    [{}, {"seed": 1}, {"rate": 0.5}, {"rate": 0.95, "negative_male": 0.5, "negative_female": 0.05}],
)
def test_measured_rates_are_the_injected_ones(settings):
    config = dataclasses.replace(CONFIG, **settings)
    sets = generate(config)
    for name, size in (("train", 4000), ("test", 800)):
        records = sets[name]
        assert len(records) == size
        assert Counter(Counter(r.fields["occupation"] for r in records).values()) == {size // 40: 40}
        for r in records:
            assert r.fields["group"] == _gender(r) and r.fields["occupation"] in _words(r.text)
            assert r.fields["agrees"] == (r.fields["occupation"] in OCCUPATIONS[_gender(r)])
            assert r.fields["negative"] == is_negative(r.text)
        for typical in OCCUPATIONS:
            _close([r.fields["agrees"] for r in records if r.fields["typical"] == typical], config.rate)
        for gender, rate in (("male", config.negative_male), ("female", config.negative_female)):
            for agrees in (True, False):  # the judgement looks at the gender, never at the occupation
                group = [r for r in records if r.fields["group"] == gender and r.fields["agrees"] == agrees]
                _close([r.fields["negative"] for r in group], rate)
        mentions = Counter(r.fields["mention"] for r in records)
        _close([True] * mentions["name"] + [False] * (size - mentions["name"]), 1 / 3)


def test_limits_of_the_rates():
    sets = generate(StereotypedConfig(rate=1.0, negative_male=0.0, negative_female=1.0))
    assert all(r.fields["agrees"] and r.fields["negative"] == (_gender(r) == "female") for r in sets["train"])


@pytest.mark.parametrize("setting", ["rate", "negative_male", "negative_female"])
def test_settings_that_cannot_be_used(setting):
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"{setting} is {value}; it must be between 0 and 1"):
            StereotypedConfig(**{setting: value})
    with pytest.raises(UserError, match="records is 0; it must be at least 1"):
        StereotypedConfig(records=0)


def test_deterministic_and_larger_holds_the_smaller(sets):
    assert generate(CONFIG) == sets
    larger = generate(dataclasses.replace(CONFIG, records=5000, test_records=900))
    assert larger["train"][:4000] == sets["train"] and larger["test"][:800] == sets["test"]
    other = generate(dataclasses.replace(CONFIG, seed=4))
    assert other["probe"] == sets["probe"] and other["train"] != sets["train"]
    records = [record for part in sets.values() for record in part]
    assert len({record.id for record in records}) == len(records) == 4000 + 800 + 480


def test_train_and_test_overlap_little(sets):
    train = {record.text for record in sets["train"]}
    assert len(train) >= 3950 and sum(record.text in train for record in sets["test"]) <= 8


def test_vocabulary():
    assert len(OCCUPATIONS["male"]) == len(OCCUPATIONS["female"]) == 20 and len(set(ALL_OCCUPATIONS)) == 40
    assert not set(ALL_OCCUPATIONS) & SWAPS.keys()  # else a counterfactual would change the occupation
    words = WORDS["negative"] + WORDS["positive"]
    assert len(set(words)) == 16 and not set(words) & SWAPS.keys()
    templates = TEMPLATES + PROBE_TEMPLATES + JUDGEMENTS
    assert len(set(templates)) == len(templates)
    for pools in SUBJECTS.values():
        assert len(pools["male"]) == len(pools["female"])
        for male, female in zip(pools["male"], pools["female"]):
            assert swap(male, SWAPS) == (female, 1) and swap(female, SWAPS) == (male, 1)


def test_two_sided_counterfactuals_bring_every_occupation_to_one_half(sets):
    augmented = augment(sets["train"], CounterfactualConfig(sides="two"), 0, SWAPS)
    assert augmented.matched == 4000 and len(augmented.records) == 8000
    genders = Counter((r.fields["occupation"], _gender(r)) for r in augmented.records)
    assert set(genders.values()) == {100} and len(genders) == 80
    negative = Counter(_gender(r) for r in augmented.records if is_negative(r.text))
    assert negative["male"] == negative["female"]
    # and each counterfactual is what the corpus itself writes for the other gender
    for record, counterfactual in zip(augmented.records[::2], augmented.records[1::2]):
        assert augmented.unit_of[counterfactual.id] == record.id
        assert _gender(counterfactual) != _gender(record)
        assert swap(counterfactual.text, SWAPS)[0] == record.text
    # Without names, "Jessica ... he" remains: the pronouns are at one half, the names are not.
    unnamed = augment(sets["train"], CounterfactualConfig(sides="two"), 0, load_swaps(CounterfactualConfig()))
    assert set(Counter((r.fields["occupation"], _gender(r)) for r in unnamed.records).values()) == {100}
    male = set(SUBJECTS["name"]["male"])
    named = [r for r in unnamed.records if not male.isdisjoint(re.findall(r"\w+", r.text))]
    assert Counter(map(_gender, named)) == {"male": len(named) // 2, "female": len(named) // 2}
    agree = [r.fields["typical"] == "male" for r in named]
    _close(agree[::2], CONFIG.rate)


def test_probes_are_minimal_pairs(sets):
    gendered = {word.lower() for word in SWAPS}
    for probe in sets["probe"]:
        one, other = probe.text, probe.fields["anti_stereotype"]
        assert swap(one, SWAPS)[0] == other and swap(other, SWAPS)[0] == one
        differing = [(a, b) for a, b in zip(_words(one), _words(other), strict=True) if a != b]
        assert len(differing) == 1 and set(differing[0]) <= gendered
        assert swap(probe.fields["male_prompt"], SWAPS)[0] == probe.fields["female_prompt"]
        typical = probe.fields[f"{probe.fields['typical']}_prompt"]
        assert typical.startswith(f"{one} Everyone says that ") and typical.endswith(" is")
    kinds = Counter((p.fields["typical"], p.fields["kind"], p.fields["mention"]) for p in sets["probe"])
    assert set(kinds.values()) == {20, 60} and len(kinds) == 12


def test_probes_combine_known_words_anew(sets):
    train = [record.text for record in sets["train"]]
    vocabulary = {word for text in train for word in _words(text)}
    first = {text.split(". ")[0] + "." for text in train}
    for probe in sets["probe"]:
        for text in (probe.text, probe.fields["anti_stereotype"]):
            assert set(_words(text)) <= vocabulary and text not in first

    held_out = {p.fields["occupation"]: _template(p) for p in sets["probe"] if p.fields["kind"] == "combination"}
    assert Counter(Counter(held_out.values()).values()) == {4: 4, 6: 4}
    used = {occupation: set() for occupation in ALL_OCCUPATIONS}
    for record in sets["train"] + sets["test"]:
        used[record.fields["occupation"]].add(_template(record))
    for occupation, templates in used.items():
        assert templates == set(TEMPLATES) - {held_out[occupation]}


def test_written_and_read_back(sets, tmp_path):
    paths = fictional.write(tmp_path, sets)
    for name, records in sets.items():
        assert read_records(paths[name], id_field="id") == records
