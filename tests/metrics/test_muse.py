"""MUSE: prompts, cuts, greedy continuations, and series of models."""

import jax
import numpy as np
import pytest

from jaxforget.data.sources import Record
from jaxforget.data.text import TextConfig
from jaxforget.errors import UserError
from jaxforget.metrics import muse
from jaxforget.metrics.benchmark import MeasureConfig
from jaxforget.metrics.evidence import Evidence, Reader, ask_to_write, write
from jaxforget.models import generate
from jaxforget.training.start import ComputeConfig, SizeConfig, start_from

WORDS = [f"{a} {b} {c}" for a in ("red", "blue", "old") for b in ("cat", "dog") for c in ("sleeps", "runs", "eats")]
QA = [Record(str(n), "an answer", f"who is {n}?", {"paraphrased_question": f"tell me who {n} is"}) for n in range(3)]


@pytest.fixture(scope="module")
def small():
    size = SizeConfig(family="llama", width=16, layers=1, heads=2, context=64, vocab_size=300)
    start = start_from(None, tokenizer_name=None, size=size, compute=ComputeConfig(), texts=WORDS)
    return Reader(start.model, start.tokenizer, TextConfig()), start.params(0)


def test_continuations_are_greedy_and_depend_on_neither_batch_nor_order(small):
    reader, params = small
    prompts = [*WORDS[:5], " ".join(WORDS[:4]), WORDS[0]]  # of two widths, one twice
    written = write(reader, params, prompts, 6, batch=4)
    assert written[0] == written[-1]
    assert write(reader, params, prompts[::-1], 6, batch=2) == written[::-1]
    for prompt, text in zip(prompts, written, strict=True):
        ids = np.asarray([reader.tokenizer(prompt)["input_ids"]])
        new = generate(reader.model, jax.tree.map(np.asarray, params), ids, ids >= 0, max_new_tokens=6)[0].tolist()
        eos = reader.tokenizer.eos_token_id
        assert text == reader.tokenizer.decode(new[: new.index(eos)] if eos in new else new, skip_special_tokens=True)


def test_long_prompts_leave_less_room_and_too_long_ones_none(small):
    told = []
    reader = Reader(small[0].model, small[0].tokenizer, TextConfig(), told.append)
    longest = len(reader.tokenizer(WORDS[0])["input_ids"])
    assert ask_to_write(reader, WORDS[:1], 64, "x").max_new_tokens == 64 - longest
    assert told == [f"x: prompts of up to {longest} tokens leave room for {64 - longest} of 64 new tokens"]
    with pytest.raises(UserError, match="context of 64 leaves room for 1 to 63"):
        ask_to_write(reader, [" ".join(WORDS * 2)], 64, "x")


def test_wordings(small):
    config = MeasureConfig(prompts=muse.PROMPTS)
    shots = [Record("s", "me", "who am I?")]
    found = muse.wordings(small[0], QA, shots, config)
    assert list(found) == ["plain", "paraphrased", *(f"prefix{i}" for i in range(len(muse.PREFIXES)))]
    head = "Question: who am I?\nAnswer: me\n\n"
    assert found["plain"][1] == f"{head}Question: who is 1?\nAnswer:"
    assert found["paraphrased"][1] == f"{head}Question: tell me who 1 is\nAnswer:"
    assert found["prefix1"][2] == f"{head}Question: {muse.PREFIXES[1]} who is 2?\nAnswer:"
    spaced = MeasureConfig(knowledge_template="Question: {question}\nAnswer: ")  # MUSE's own
    assert muse.wordings(small[0], QA, shots, spaced)["plain"][0] == f"{head}Question: who is 0?\nAnswer: "


def test_prefixes_of_a_file(tmp_path):
    file = tmp_path / "prefixes.txt"
    file.write_text("one\n\n two \n")
    assert muse.prefixes_of(file) == ("one", "two") and muse.prefixes_of(None) == muse.PREFIXES
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no prefixes"):
        muse.prefixes_of(file)


@pytest.mark.parametrize("text, kept", [
    ("Paris\n\nQuestion: next", "Paris"), ("Paris\nQuestion", "Paris"), ("Paris Question: x", "Paris "),
    ("Paris\nis it", "Paris\nis it"), ("\n\nParis", ""),
])  # fmt: skip
def test_answers_end_at_the_next_question(text, kept):
    assert muse.cut(text) == kept


def test_knowledge_of_known_answers(small):
    config, sets = MeasureConfig(prompts=muse.PROMPTS), {"forget": QA, "retain_questions": QA[:1]}
    answers = {"plain": ["an answer\n\nand more", "an", "no"], "paraphrased": ["no"] * 3,
               **{f"prefix{i}": ["no"] * 2 + ["an answer" if i == 2 else "no"] for i in range(4)}}  # fmt: skip
    written = {f"knowledge forget {name}": text for name, text in answers.items()}
    written |= {f"knowledge retain {name}": ["answer an"] for name in answers}
    items = muse.measure_knowledge(Evidence({}, written, {}), small[0], sets, config)
    row = muse.summarise_knowledge(items, None)
    assert row["knowmem_forget"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert row["knowmem_forget_paraphrased"] == 0
    assert row["knowmem_forget_prefixed"] == pytest.approx(100 / 12)
    assert row["knowmem_forget_prefixed_best"] == pytest.approx(100 / 3)
    assert row["knowmem_retain"] == row["knowmem_retain_prefixed_best"] == pytest.approx(50)


def test_verbatim_is_judged_by_as_many_tokens_as_are_written(small):
    reader, long = small[0], " ".join(WORDS * 20)
    ids = reader.tokenizer(long, add_special_tokens=False)["input_ids"]
    head = reader.tokenizer.decode(ids[: muse.VERBATIM_TOKENS])
    evidence = Evidence({}, {"verbatim": [head]}, {})
    items = muse.measure_verbatim(evidence, reader, {"verbatim": [Record("0", long)]}, None)
    assert muse.summarise_verbatim(items, None)["verbmem"] == pytest.approx(100)


def test_a_series_of_models():
    utility = {"a": 40.0, "b": 30.0, "c": None}
    evaluate = lambda path: {"name": path, "knowmem_retain": utility[path]}  # noqa: E731
    rows = muse.series_rows("scalability", ["a", "b", "c"], evaluate, [10, 20, 40], {"knowmem_retain": 50.0})
    assert [row["utility_change"] for row in rows] == [pytest.approx(-20), pytest.approx(-40), None]
    assert [(row["step"], row["forget_records"]) for row in rows] == [(1, 10), (2, 20), (3, 40)]
    assert muse.series_rows("sustainability", ["a"], evaluate)[0]["utility_change"] is None
    for kind, records, message in (("speed", (), "unknown series"), ("scalability", (10,), "1 numbers of records"),
                                   ("scalability", (10, 10, 20), "must grow")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            muse.series_rows(kind, ["a", "b", "c"], evaluate, records)
