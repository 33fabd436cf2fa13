"""Other answers to the forget questions, and what the starting model says, kept on disk."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import toys
from toys import MODEL, OTHER, PARAMS, RECORDS, SETS, SETTING

from jaxforget import models
from jaxforget.data.tokens import IGNORED
from jaxforget.errors import UserError
from jaxforget.unlearning import METHODS, answers
from jaxforget.unlearning.dpo import paired
from jaxforget.unlearning.reference import reference_logp, stored


# --------------------------------------------------------------------------------------------------- refusals
def test_the_built_in_refusals():
    sentences = answers.refusals()
    assert 20 <= len(sentences) == len(set(sentences)) <= 30
    assert all(re.fullmatch(r"[A-Z][\w ,]+\.", one) and len(one.split()) <= 12 for one in sentences)


def test_a_refusal_depends_on_seed_and_id_alone():
    refused = {record.id: record.text for record in answers.refused(SETTING)}
    few = SETTING._replace(sets={"forget": SETS["forget"].take([6, 2, 3])}, records=RECORDS[::-1])
    assert [record.id for record in answers.refused(few)] == ["f6", "f2", "f3"]
    assert all(refused[record.id] == record.text for record in answers.refused(few))
    assert {record.id: record.text for record in answers.refused(SETTING._replace(seed=1))} != refused
    many = toys.question_answers(2000, seed=0, prefix="m")
    drawn = [record.text for record in answers.refused(SETTING._replace(sets={"forget": toys.encode(many)},
                                                                        records=many))]  # fmt: skip
    count = np.array([drawn.count(sentence) for sentence in answers.refusals()])
    expected = len(drawn) / len(count)
    assert ((count - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001


def test_answers_of_a_field():
    texts = [record.text for record in answers.from_field(SETTING, "alternative_answer")]
    assert texts == [record.fields["alternative_answer"] for record in RECORDS]
    texts = [record.text for record in answers.from_field(SETTING, "perturbed_answer")]  # a list
    assert texts == [record.fields["perturbed_answer"][0] for record in RECORDS]
    plural = [dataclasses.replace(record, fields={"perturbed_answers": ["x", "y"]}) for record in RECORDS]
    assert {record.text for record in answers.from_field(SETTING._replace(records=plural), "perturbed_answer")} == {"x"}
    some = [*RECORDS[:3], dataclasses.replace(RECORDS[3], fields={"alternative_answer": " "}), *RECORDS[4:]]
    with pytest.raises(UserError, match="forget record 'f3' has no text in field 'alternative_answer'$"):
        answers.from_field(SETTING._replace(records=some), "alternative_answer")


def test_a_pair_holds_both_sequences():
    forget = SETS["forget"]
    preferred = toys.encode(answers.refused(SETTING))
    pairs = paired(SETTING, forget, preferred)
    np.testing.assert_array_equal(pairs.lengths, forget.lengths + preferred.lengths)  # tokens that a pass reads
    for column, examples in (("reference_logp", forget), ("preferred_reference_logp", preferred)):
        logits = np.asarray(MODEL.batch_logits(PARAMS, examples.columns), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        labels = examples.columns["labels"]
        picked = np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(pairs.columns[column], (picked * (labels != IGNORED)).sum(1), rtol=1e-5)
    with pytest.raises(ValueError, match="not those of the forget examples"):
        paired(SETTING, forget, preferred.take(np.arange(7, -1, -1)))


# ------------------------------------------------------------------------------------------------ alternatives
class Words:
    """Tokens as numbers."""

    eos_token_id = 11  # none of the toy

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(one)) for one in ids if one != self.eos_token_id)


@pytest.fixture
def sampler(monkeypatch):
    """Stand in for generation: gives the true answers below a temperature. Keeps what it was asked."""
    asked = []

    def install(until):
        def generate(model, params, tokens_BT, mask_BT, *, temperature, row_ids, max_new_tokens, wanted_B, **rest):
            asked.append((temperature, list(map(int, row_ids[wanted_B]))))
            assert tokens_BT.shape == (9, 8) and mask_BT[-1].sum() == 3  # one shape, whoever is asked
            drawn_BN = np.zeros((len(tokens_BT), max_new_tokens), np.int32)
            for n, (row, mask) in enumerate(zip(tokens_BT, mask_BT, strict=True)):
                record = next(record for record in RECORDS if toys.encode([record]).columns["tokens"][0].tolist()
                              == list(map(int, row)))  # fmt: skip
                assert " ".join(map(str, row[mask])) == record.prompt
                answer = [int(word) for word in record.text.split()]
                hot = temperature >= until or int(row_ids[n]) % 2
                new = ([9, *answer] if hot else answer)[:max_new_tokens]
                drawn_BN[n, : len(new)] = new
            return drawn_BN

        monkeypatch.setattr(models, "generate", generate)
        return asked

    return install


def test_sampling_goes_on_until_another_answer_comes_out(sampler):
    setting = SETTING._replace(tokenizer=Words())
    asked = sampler(1.5)
    found = answers.generated(setting, 1.0, 6)
    assert [record.text for record in found] == [f"9 {record.text}" for record in RECORDS]
    assert [temperature for temperature, _ in asked] == [1.0, 1.25, 1.5]
    keys = (SETS["forget"].columns["key"] >> np.uint64(32)).tolist()
    assert asked[0][1] == keys and asked[1][1] == asked[2][1] == [key for key in keys if key % 2 == 0]


def test_a_model_that_gives_nothing_else_is_refused(sampler):
    sampler(1e9)
    with pytest.raises(UserError, match="nothing but the answer to forget record 'f.' in 16 tries; raise temperature"):
        answers.generated(SETTING._replace(tokenizer=Words()), 1.0, 5)


def test_alternatives_are_sampled_once(sampler, tmp_path):
    records = [dataclasses.replace(record, fields={}) for record in RECORDS]
    setting = SETTING._replace(tokenizer=Words(), records=records, cache=tmp_path)
    asked = sampler(0.0)
    first = METHODS["alt_po"].recipe(setting).streams[0].examples
    assert len(asked) == 1
    again = METHODS["alt_po"].recipe(setting).streams[0].examples
    assert len(asked) == 1
    np.testing.assert_array_equal(first.columns["preferred_tokens"], again.columns["preferred_tokens"])
    METHODS["alt_po"].recipe(setting._replace(seed=1))
    assert len(asked) == 2
    METHODS["alt_po"].recipe(SETTING)  # these records have alternatives
    assert len(asked) == 2


@pytest.mark.slow  # for the programs of generation
def test_alternatives_of_a_real_model():
    """They depend on (seed, id), not on the other records."""
    import formula

    model, params = formula.model("llama")
    setting = SETTING._replace(model=model, params=jax.tree.map(np.asarray, params), tokenizer=Words())
    texts = {record.id: record.text for record in answers.generated(setting, 1.0, 5)}
    assert all(text and text != record.text for text, record in zip(texts.values(), RECORDS, strict=True))
    few = setting._replace(sets={"forget": SETS["forget"].take([5, 1])})
    assert {record.id: record.text for record in answers.generated(few, 1.0, 5)} == {n: texts[n] for n in ("f5", "f1")}


# -------------------------------------------------------------------------------------------------- kept on disk
def test_what_the_starting_model_says_is_computed_once(tmp_path):
    setting, forget = SETTING._replace(cache=tmp_path / "seed0" / "reference"), SETS["forget"]
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.arange(3.0)}

    def ask(setting=setting, examples=forget, **settings):
        np.testing.assert_array_equal(stored(setting, "some", examples, compute, **settings)["x"], [0.0, 1.0, 2.0])
        return len(calls)

    assert (ask(), ask()) == (1, 1)
    assert ask(setting._replace(params=OTHER)) == 2
    assert ask(examples=forget.take([0, 1])) == 3
    relabelled = {**forget.columns, "labels": np.where(forget.scored, 3, IGNORED)}
    assert ask(examples=dataclasses.replace(forget, columns=relabelled)) == 4
    assert ask(beta=0.5) == 5 and ask(beta=0.5) == 5
    assert ask(setting._replace(model=dataclasses.replace(MODEL, width=7))) == 6
    assert ask() == 6  # others replaced nothing
    assert ask(setting._replace(cache=None)) == 7  # nowhere to look
    files = sorted(setting.cache.iterdir())
    assert len(files) == 6 and not [path for path in files if path.name.startswith(".")]


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"no archive",
    lambda content: content.replace(b"\x00\x00\x80?", b"\x00\x00\x00?"),
], ids=["cut", "empty", "foreign", "flipped"])  # fmt: skip
def test_a_damaged_file_is_computed_again(damage, tmp_path):
    setting = SETTING._replace(cache=tmp_path)
    columns = {"x": np.ones(4, np.float32)}
    stored(setting, "some", SETS["forget"], lambda: columns)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    np.testing.assert_array_equal(stored(setting, "some", SETS["forget"], lambda: columns)["x"], columns["x"])
    assert path.read_bytes() == content


def test_methods_read_what_was_kept(tmp_path):
    """A changed file shows in the columns, so it is what is read; npo and dpo share the forget set's."""
    setting = SETTING._replace(cache=tmp_path)
    first = METHODS["npo"].recipe(setting).streams[0].examples.columns["reference_logp"]
    (path,) = tmp_path.iterdir()
    with np.load(path) as file:
        np.savez(path, key=file["key"], logp=file["logp"] + 1)
    np.testing.assert_allclose(reference_logp(setting, SETS["forget"]), first + 1)
    pairs = METHODS["dpo"].recipe(setting).streams[0].examples.columns
    np.testing.assert_allclose(pairs["reference_logp"], first + 1)
    assert len(list(tmp_path.iterdir())) == 2  # and the preferred answers'


def test_retain_rows_have_the_same_columns():
    """What a retain row lacks says nothing: no label."""
    forget, retain = METHODS["idk_dpo"].recipe(SETTING).streams
    assert forget.examples.columns.keys() == retain.examples.columns.keys()
    assert (retain.examples.columns["preferred_labels"] == IGNORED).all()
    assert not retain.examples.columns["reference_logp"].any()
