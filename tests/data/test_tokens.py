"""Tokens: labels are the next token where scored, and nowhere else."""

import copy
from pathlib import Path

import numpy as np
import pytest

from jaxforget.data.fictional import FictionalConfig, generate, tokenizer_texts
from jaxforget.data.sampling import id_keys
from jaxforget.data.sources import Record, read_records
from jaxforget.data.tokens import check_vocabulary, concatenate, load_tokenizer, tokenize, train_tokenizer
from jaxforget.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MODES = ("truncate", "split", "pack")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tokenizer_texts(generate(FictionalConfig(people=10))["general"]))


@pytest.fixture(scope="module")
def people():
    return generate(FictionalConfig(people=10, facts_per_person=4))["retain"]


def _with_specials(tokenizer, pattern: str):
    """Copy a tokenizer so that its default encoding adds the special tokens of the pattern."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=specials)
    return changed


def _texts(*lengths: int) -> list[Record]:
    """Plain texts of exactly so many tokens: digits stay single."""
    return [Record(f"t{n}", ("1234567890" * 20)[n : n + length]) for n, length in enumerate(lengths)]


def _check(examples) -> None:
    """Assert what holds for all examples."""
    tokens, labels, lengths = examples.columns["tokens"], examples.columns["labels"], examples.lengths
    assert tokens.dtype == labels.dtype == lengths.dtype == np.int32
    assert np.array_equal(examples.columns["key"], id_keys(examples.ids))
    scored = examples.scored
    assert not scored[:, -1].any()
    assert np.array_equal(labels[:, :-1][scored[:, :-1]], tokens[:, 1:][scored[:, :-1]])
    assert (labels[~scored] == -100).all()
    position = np.arange(tokens.shape[1])
    assert not scored[position[None] >= lengths[:, None] - 1].any()
    assert (tokens[position[None] >= lengths[:, None]] == examples.pad_id).all()
    assert scored.any(1).all()


# ---------------------------------------------------------------- question and answer


def test_question_answer_boundary(tokenizer):
    record = Record("x", "In Tovbune.", "Where was {answer} born?")  # braces of a question are left alone
    examples = tokenize([record], tokenizer, max_length=64)
    _check(examples)
    prompt = tokenizer("Question: Where was {answer} born?\nAnswer:")["input_ids"]
    answer = tokenizer(" In Tovbune.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    length = len(prompt) + len(answer)
    assert examples.columns["tokens"][0, :length].tolist() == prompt + answer
    assert examples.lengths.tolist() == [length]
    # The last prompt position predicts the first answer token; the last answer token predicts EOS.
    assert np.flatnonzero(examples.scored[0]).tolist() == list(range(len(prompt) - 1, length - 1))
    assert examples.columns["labels"][0, examples.scored[0]].tolist() == answer


def test_template_and_prefix(tokenizer):
    examples = tokenize(
        [Record("x", "b", "a")],
        tokenizer,
        max_length=64,
        prompt_template="<{question}>",
        answer_prefix="=",
        add_eos=False,
    )
    assert tokenizer.decode(examples.columns["tokens"][0, : examples.lengths[0]]) == "<a>=b"
    assert tokenizer.decode(examples.columns["labels"][0, examples.scored[0]]) == "=b"


@pytest.mark.parametrize("pattern", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens_of_the_default_encoding(tokenizer, pattern):
    special = _with_specials(tokenizer, pattern)
    bos, eos = special.bos_token_id, special.eos_token_id

    def row(records, **flags):
        return tokenize(records, special, max_length=64, pad_to_multiple=1, **flags).columns["tokens"][0]

    plain, question = [Record("t", "12345")], [Record("q", "7", "6")]
    assert row(plain).tolist() == special("12345")["input_ids"]
    for add_eos in (None, True, False):
        tokens = row(question, add_eos=add_eos).tolist()
        assert tokens.count(bos) == pattern.startswith("<s>")
        # EOS never stands between question and answer, and never twice.
        assert [n for n, token in enumerate(tokens) if token == eos] == ([] if add_eos is False else [len(tokens) - 1])
        text = row(plain, add_eos=add_eos).tolist()
        assert text.count(eos) == (pattern.endswith("</s>") if add_eos is None else add_eos)


def test_cutting_answers(tokenizer):
    records = [Record("a", "123", "9" * 20), Record("b", "123", "9"), Record("c", "123", "9" * 23)]
    template = "{question}"
    whole = tokenize(records, tokenizer, max_length=64, prompt_template=template)
    assert whole.lengths.tolist() == [25, 6, 28]  # question + space + 3 digits + EOS
    cut = tokenize(records, tokenizer, max_length=23, prompt_template=template)
    _check(cut)
    assert cut.ids == ("a", "b") and (cut.truncated, cut.dropped) == (1, 1)
    assert cut.lengths.tolist() == [23, 6] and cut.scored.sum(1).tolist() == [3, 5]
    assert np.array_equal(cut.columns["tokens"][0], whole.columns["tokens"][0, :23])


def test_fictional_people(tokenizer, people):
    examples = tokenize(people, tokenizer, max_length=64)
    _check(examples)
    assert examples.ids == tuple(record.id for record in people)
    assert examples.columns["tokens"].shape[1] % 8 == 0
    for n, record in enumerate(people):
        assert tokenizer.decode(examples.columns["labels"][n, examples.scored[n]]) == f" {record.text}</s>"


# ---------------------------------------------------------------- plain text


def test_truncate(tokenizer):
    examples = tokenize(_texts(3, 40, 1, 17), tokenizer, max_length=30)
    _check(examples)
    assert examples.ids == ("t0", "t1", "t3") and (examples.truncated, examples.dropped) == (1, 1)
    assert examples.lengths.tolist() == [3, 30, 17] and examples.scored.sum(1).tolist() == [2, 29, 16]
    assert examples.columns["tokens"].shape == (3, 30)  # 32 would pass max_length
    assert tokenize(_texts(3, 9), tokenizer, max_length=30).columns["tokens"].shape == (2, 16)


def test_split(tokenizer):
    examples = tokenize(_texts(10, 24, 4, 26), tokenizer, max_length=10, text_mode="split")
    _check(examples)
    assert examples.ids == ("t0", "t1#0", "t1#1", "t3#0", "t3#1", "t3#2")
    assert examples.lengths.tolist() == [10, 10, 10, 10, 10, 6] and (
        examples.truncated,
        examples.dropped,
    ) == (0, 2)
    whole = tokenizer(_texts(10, 24)[1].text)["input_ids"]
    assert examples.columns["tokens"][1:3].ravel().tolist() == whole[:20]


def test_pack(tokenizer):
    eos = tokenizer.eos_token_id
    texts = _texts(10, 24, 4)
    stream = [token for text in texts for token in (*tokenizer(text.text)["input_ids"], eos)][:-1]
    examples = tokenize(texts, tokenizer, max_length=16, text_mode="pack")
    _check(examples)
    assert examples.lengths.tolist() == [16, 16, 8] and examples.scored.sum() == len(stream) - 3
    packed = [token for row, n in zip(examples.columns["tokens"], examples.lengths) for token in row[:n]]
    assert packed == stream
    assert len(set(examples.ids)) == 3
    again = tokenize(texts, tokenizer, max_length=16, text_mode="pack")
    assert again.ids == examples.ids
    repeated = tokenize([Record("a", "12" * 20)], tokenizer, max_length=4, text_mode="pack")
    assert len(repeated) == 10 and len(set(repeated.ids)) == 10
    assert tokenize(texts, tokenizer, max_length=16, text_mode="pack", add_eos=True).lengths.tolist() == [
        16,
        16,
        9,
    ]


def test_pack_with_bos_between(tokenizer):
    special = _with_specials(tokenizer, "<s> $A")
    special.eos_token = None
    examples = tokenize(_texts(3, 3), special, max_length=16, text_mode="pack")
    bos = special.bos_token_id
    assert examples.columns["tokens"][0, :8].tolist().count(bos) == 2 and examples.lengths.tolist() == [8]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_tokenize(tokenizer, mode):
    for records in ([], [Record("x", "")]):
        examples = tokenize(records, tokenizer, max_length=16, text_mode=mode)
        assert len(examples) == 0 and examples.columns["tokens"].shape == (0, 8)
        assert examples.columns["key"].shape == (0,)


# ---------------------------------------------------------------- sets of examples


def test_neighbours_and_order_change_nothing(tokenizer, people):
    together = tokenize(people, tokenizer, max_length=64)
    for n in (0, 5):
        alone = tokenize([people[n]], tokenizer, max_length=64)
        width = alone.columns["tokens"].shape[1]
        for name in ("tokens", "labels"):
            assert np.array_equal(alone.columns[name][0], together.columns[name][n, :width])


def test_take_and_concatenate(tokenizer, people):
    examples = tokenize(people + _texts(40), tokenizer, max_length=64)
    short, long = tokenize(people, tokenizer, max_length=64), tokenize(_texts(40), tokenizer, max_length=64)
    joined = concatenate([short, long])
    _check(joined)
    assert joined.ids == examples.ids
    for name, column in examples.columns.items():
        assert np.array_equal(column, joined.columns[name])
    assert joined.take([3, 1]).ids == (examples.ids[3], examples.ids[1])
    mask = np.arange(len(examples)) % 3 == 0
    assert np.array_equal(examples.take(mask).columns["tokens"], examples.columns["tokens"][mask])
    assert len(examples.take([])) == 0


# ---------------------------------------------------------------- settings and tokenizers


def test_bad_settings(tokenizer):
    question = [Record("q7", "a", "q")]
    for flags, part in (
        ({"text_mode": "chop"}, "'chop'"),
        ({"text_mode": "pack"}, "'q7'"),
        ({"prompt_template": "Question:"}, "{question}"),
        ({"max_length": 1}, "max_length is 1"),
    ):
        with pytest.raises(UserError, match=part.replace("{", r"\{")):
            tokenize(question, tokenizer, **{"max_length": 8, **flags})
    special = _with_specials(tokenizer, "$A")
    special.eos_token = None
    assert tokenize(question, special, max_length=32).scored.sum() > 0
    with pytest.raises(UserError, match="EOS"):
        tokenize(question, special, max_length=8, add_eos=True)


def test_vocabulary_must_fit(tokenizer):
    size = len(tokenizer)
    check_vocabulary(tokenizer, size, "model")
    with pytest.raises(UserError, match=rf"some/model.*{size}.*{size - 1}"):
        check_vocabulary(tokenizer, size - 1, "some/model")


def test_tokenizer_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name in (tmp_path, tmp_path / "config.json", tmp_path / "gone"):
        with pytest.raises(UserError, match=str(name)):
            load_tokenizer(name)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no development data beside the checkout")
def test_real_tokenizers():
    stories = read_records(SHARED / "data/corpora/stories.jsonl.gz", limit=20)
    questions = read_records(SHARED / "data/tofu/forget01.json")
    for name, size, starts_with_bos in (("stories260k", 512, True), ("gpt2_tokenizer", 50257, False)):
        tokenizer = load_tokenizer(SHARED / "models" / name)
        check_vocabulary(tokenizer, size, name)
        with pytest.raises(UserError):
            check_vocabulary(tokenizer, size - 1, name)
        examples = tokenize(stories, tokenizer, max_length=2048)
        _check(examples)
        for n, story in enumerate(stories):
            expected = tokenizer(story.text)["input_ids"]
            assert examples.columns["tokens"][n, : examples.lengths[n]].tolist() == expected
            assert (expected[0] == tokenizer.bos_token_id) == starts_with_bos
        asked = tokenize(questions, tokenizer, max_length=512)
        _check(asked)
        assert asked.columns["labels"][0, asked.scored[0]][-1] == tokenizer.eos_token_id
        assert questions[0].text in tokenizer.decode(asked.columns["labels"][0, asked.scored[0]])
