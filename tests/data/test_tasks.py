"""Classes, masked tokens, source and target pairs: what each column says. N examples, T tokens."""

import jax
import numpy as np
import pytest

from jaxforget.data.sources import Record, read_records
from jaxforget.data.tasks import class_names, classify, maskable, pairs
from jaxforget.data.tokens import IGNORED, concatenate, train_tokenizer
from jaxforget.errors import UserError
from jaxforget.training.objectives import mask_tokens

TEXTS = ["the film is good", "bad", "a long and slow film that nobody will remember for long"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 300, wrap=True, segments=True)


def labelled(labels, texts=TEXTS):
    return [Record(str(i), text, fields={"label": label}) for i, (text, label) in enumerate(zip(texts, labels))]


def test_classes_are_sorted_as_numbers_or_as_names():
    assert class_names(labelled([10, 9, 10]), "x") == ("9", "10")
    assert class_names(labelled(["b", "a", "10"]), "x") == ("10", "a", "b")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1], "all 3 records have the label '1'"),
        ([1, None, 2], "record '1' has the label None"),
        ([1, 0.5, 2], "record '1' has the label 0.5"),
    ],
)
def test_unusable_labels_are_named(labels, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        class_names(labelled(labels), "x")


def test_classification_columns(tokenizer):
    examples = classify(labelled(["neg", "pos", "neg"]), tokenizer, ("neg", "pos"), max_length=12)
    assert examples.columns["label"].tolist() == [0, 1, 0]
    for row, length, text in zip(examples.columns["tokens"], examples.lengths, TEXTS, strict=True):
        assert row[0] == tokenizer.cls_token_id and row[length - 1] == tokenizer.sep_token_id
        assert tokenizer.decode(row[1 : length - 1]) in text
        assert np.all(row[length:] == tokenizer.pad_token_id)
    # The longest is cut to 12 and keeps its end token.
    assert examples.truncated == 1 and examples.lengths.max() == 12
    with pytest.raises(UserError, match="label 'pos'; known are neg, other"):
        classify(labelled(["neg", "pos", "neg"]), tokenizer, ("neg", "other"), max_length=12)


def test_pairs_of_texts_get_segments(tokenizer):
    records = [Record("a", "bad", "the film", {"label": 1})]
    columns = classify(records, tokenizer, ("0", "1"), max_length=20).columns
    length, first = columns["length"][0], len(tokenizer("the film")["input_ids"])
    assert columns["segments"][0, :length].tolist() == [0] * first + [1] * (length - first)
    with pytest.raises(UserError, match="one kind"):
        classify(records + labelled([1], ["x"]), tokenizer, ("0", "1"), max_length=20)


def test_masks_hide_a_share_and_never_a_special_token(tokenizer):
    examples = maskable([Record(str(i), TEXTS[2]) for i in range(400)], tokenizer, max_length=64)
    tokens_NT, labels_NT = examples.columns["tokens"], examples.columns["labels"]
    assert np.array_equal(labels_NT != IGNORED, ~np.isin(tokens_NT, tokenizer.all_special_ids))
    draw_N = np.arange(400, dtype=np.uint32)
    hidden_NT, chosen_NT = jax.jit(mask_tokens, static_argnums=(3, 4))(
        tokens_NT, labels_NT, draw_N, tokenizer.mask_token_id, 300
    )
    chosen_NT, hidden_NT = np.asarray(chosen_NT) != IGNORED, np.asarray(hidden_NT)
    assert np.all(chosen_NT.any(axis=1)) and not np.any(chosen_NT & (labels_NT == IGNORED))
    assert np.all(hidden_NT[~chosen_NT] == tokens_NT[~chosen_NT])
    total, chosen = (labels_NT != IGNORED).sum(), chosen_NT.sum()
    masked = (hidden_NT[chosen_NT] == tokenizer.mask_token_id).mean()
    kept = (hidden_NT[chosen_NT] == tokens_NT[chosen_NT]).mean()
    # Binomial with some 12,000 and 1,800 trials: four standard deviations. One a row at least adds a little.
    assert 0.14 < chosen / total < 0.18 and abs(masked - 0.8) < 0.04 and abs(kept - 0.1) < 0.03
    # A function of each row's draw alone, wherever the row stands.
    again, _ = mask_tokens(tokens_NT[7:9], labels_NT[7:9], draw_N[7:9], tokenizer.mask_token_id, 300)
    np.testing.assert_array_equal(again, hidden_NT[7:9])
    assert not np.array_equal(hidden_NT[7], hidden_NT[8])


def test_source_and_target(tokenizer):
    records = [Record("a", "bad", "the film is"), Record("b", "a long and slow film", "good")]
    examples = pairs(records, tokenizer, max_length=16, start_id=2)
    eos = tokenizer.eos_token_id
    for n, record in enumerate(records):
        target = examples.columns["labels"][n]
        target = target[target != IGNORED]
        assert target[-1] == eos and tokenizer.decode(target, skip_special_tokens=True) == record.text
        assert examples.columns["decoder_tokens"][n, : len(target)].tolist() == [2, *target[:-1]]
        source = examples.columns["tokens"][n, : examples.lengths[n]]
        assert source[-1] == eos and tokenizer.decode(source, skip_special_tokens=True) == record.prompt
    joined = concatenate([examples, pairs(records[:1], tokenizer, max_length=16, start_id=2)])
    assert joined.columns["labels"].shape == (3, examples.columns["labels"].shape[1])
    with pytest.raises(UserError, match="'c' is plain text"):
        pairs([Record("c", "x")], tokenizer, max_length=16, start_id=2)


def test_a_source_can_select_by_field(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [("a", "train"), ("b", "test"), ("c", "train")]
    path.write_text("".join(f'{{"text": "{text}", "split": "{split}"}}\n' for text, split in rows))
    assert [record.text for record in read_records(f"{path}::split=train")] == ["a", "c"]
    assert [record.text for record in read_records(f"{path}::split=test", limit=1)] == ["b"]
    with pytest.raises(UserError, match="holds no records whose 'split' is 'dev'"):
        read_records(f"{path}::split=dev")
    with pytest.raises(UserError, match="field 'part' is missing; present are 'text', 'split'"):
        read_records(f"{path}::part=dev")
