"""Sources: the same content is the same records in every format; each bad input is one clear sentence."""

import csv
import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from jaxforget.data.sources import Record, content_id, read_records
from jaxforget.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

ROWS = [
    {"question": "Where is Zub?", "answer": 'In "the\nnorth", far.', "group": "a"},
    {"question": "Où?", "answer": "Là-bas, 雪.", "group": "b"},
    {"question": "Where is Zub?", "answer": 'In "the\nnorth", far.', "group": "a"},
    {"question": "tab\there", "answer": "", "group": "b"},
]


def _write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the name, by the format's usual writer."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    stream = io.StringIO(newline="")
    if name.endswith((".csv", ".tsv")):
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if name.endswith(".csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    elif name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows, indent=1)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def _message(path, **flags) -> str:
    with pytest.raises(UserError) as caught:
        read_records(path, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- good input


FORMATS = [
    "a.jsonl",
    "a.jsonl.gz",
    "a.json",
    "a.json.gz",
    "a.csv",
    "a.csv.gz",
    "a.tsv",
    "a.tsv.gz",
    "a.parquet",
]


@pytest.mark.parametrize("name", FORMATS)
def test_same_records_in_every_format(tmp_path, name):
    records = read_records(_write(tmp_path / name, ROWS))
    assert [(r.prompt, r.text) for r in records] == [(row["question"], row["answer"]) for row in ROWS]
    assert [r.fields for r in records] == [{"group": row["group"]} for row in ROWS]
    assert [r.id for r in records] == [r.id for r in read_records(_write(tmp_path / "reference.jsonl", ROWS))]


def test_ids_depend_on_content_only(tmp_path):
    records = read_records(_write(tmp_path / "a.jsonl", ROWS))
    first, second, third, _ = (record.id for record in records)
    assert third == f"{first}-2" and len({r.id for r in records}) == 4
    assert len(first) >= 16 and int(first, 16) >= 0
    shuffled = random.Random(3).sample(ROWS, len(ROWS))
    again = read_records(_write(tmp_path / "b.csv", shuffled))
    assert {(r.id, r.text) for r in again} == {(r.id, r.text) for r in records}
    fewer = read_records(_write(tmp_path / "c.jsonl", ROWS[1:2]))
    assert fewer[0].id == second


def test_ids_tell_question_from_answer():
    assert len({content_id("ab", "c"), content_id("a", "bc"), content_id(None, "abc"), content_id("", "abc")}) == 4


def test_plain_text_has_no_question():
    assert Record("a", "blue", "Which colour?").question == "Which colour?"
    with pytest.raises(UserError, match="^record 'b' is plain text; a question and an answer are needed$"):
        Record("b", "The sky is blue.").question  # noqa: B018  what is read is the error


def test_json_shapes(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    shapes = {
        "array": json.dumps(ROWS),
        "lines": lines,
        "data": json.dumps({"data": ROWS}),
        "data_last": json.dumps({"version": 1, "data": ROWS}),
        "marked": "\ufeff" + lines,
    }
    for name, text in shapes.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        assert [r.text for r in read_records(path)] == [row["answer"] for row in ROWS], name
    one = tmp_path / "one.json"
    one.write_text('{"text": "alone"}')
    assert read_records(one)[0].text == "alone"


@pytest.mark.parametrize(
    ("row", "prompt", "text"),
    [
        ({"text": "t", "answer": "a", "question": "q"}, "q", "a"),
        ({"prompt": "q", "response": "a"}, "q", "a"),
        ({"prompt": "q", "completion": "a", "text": "t"}, "q", "a"),
        ({"prompt": "q", "text": "t"}, None, "t"),
        ({"sentence": "t", "x": 1}, None, "t"),
        ({"document": "t"}, None, "t"),
    ],
)
def test_fields_are_inferred(tmp_path, row, prompt, text):
    record = read_records(_write(tmp_path / "a.jsonl", [row]))[0]
    assert (record.prompt, record.text) == (prompt, text)


def test_flags(tmp_path):
    row = {"k": 7, "q": "Q", "a": "A", "region": "west", "y": 1}
    path = _write(tmp_path / "a.jsonl", [row])
    record = read_records(
        path, question_field="q", answer_field="a", id_field="k", group_field="region", label_field="y"
    )[0]
    assert record == Record("7", "A", "Q", {"region": "west", "y": 1, "group": "west", "label": 1})
    assert read_records(path, text_field="a")[0].prompt is None


def test_limit_stops_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\nbroken\n')
    assert [r.text for r in read_records(path, limit=2)] == ["a", "b"]
    assert "limit is 0" in _message(path, limit=0)


def test_table_without_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('good "film\t1\n"bad\t0\n')  # quotes that quote nothing, as plain tab-separated text has them
    records = read_records(path, text_field="0", label_field="1")
    assert [(r.text, r.fields["label"]) for r in records] == [('good "film', "1"), ('"bad', "0")]
    path.write_text("0\t1\na\tb\n")
    assert [r.text for r in read_records(path, text_field="0")] == ["a"]


def test_long_cells_and_process_settings(tmp_path):
    limit = csv.field_size_limit()
    path = _write(tmp_path / "a.csv", [{"text": "x" * 300_000}])
    assert len(read_records(path)[0].text) == 300_000
    assert csv.field_size_limit() == limit


def test_hub_dataset(monkeypatch):
    import datasets

    calls = []

    def load(name, config, split=None):
        calls.append((name, config, split))
        rows = [{"text": "a"}, {"text": "b"}]
        return rows if split else {"test": [], "train": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r.text for r in read_records("some/name")] == ["a", "b"]
    read_records("some/name:part:test[:10%]")
    read_records("some/name::test")
    assert calls == [
        ("some/name", None, None),
        ("some/name", "part", "test[:10%]"),
        ("some/name", None, "test"),
    ]


# ---------------------------------------------------------------- bad input


BROKEN = [
    ("a.jsonl", b'{"text": "a"}\n' * 6 + b'{"text": \n', ["line 7", "JSON"]),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', ["line 2", "list"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ["line 2", "'text'", "null"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', ["line 2", "'text'", "int"]),
    ("a.jsonl", b'{"text": "a"}\n{"tekst": "b", "z": 1}\n', ["line 2", "'text'", "'tekst'", "'z'"]),
    ("a.jsonl", b'{"body": "a", "z": 1}\n', ["line 1", "'body'", "'z'", "--text-field"]),
    ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "'text'", "Unicode"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "UTF-8"]),
    ("a.jsonl", b"", ["no records"]),
    ("a.jsonl", b"\n \n", ["no records"]),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
    ("a.json", b"", ["no records"]),
    ("a.json", b"[]", ["no records"]),
    ("a.json", b'[\n{"text": "a"},\n{"text": 3}\n]', ["line 3", "'text'", "int"]),
    ("a.json", b'[\n{"text": "a"},\n{"text": }\n]', ["line 3", "JSON"]),
    ("a.json", b'{"data": [\n{"text": "a"},\n{"z": 3}\n]}', ["line 3", "'text'", "'z'"]),
    ("a.json", b'{"v": 1, "data": [{"text": "a"}, 5]}', ["item 2", "int"]),
    ("a.json", b'{"text": "a"}\n{"text": \n', ["line 2", "JSON"]),
    ("a.json", b'{\n"data": [\n{"text": "a"},\n', ["line 3", "JSON"]),
    ("a.csv", b"", ["no records"]),
    ("a.csv", b"text,z\n", ["no records"]),
    ("a.csv", b'text,z\n"two\nlines",1\nb\n', ["line 4", "1 cells", "2"]),
    ("a.csv", b"text,text\na,b\n", ["line 1", "'text'", "twice"]),
    ("a.csv", b'text,z\na,1\n"b,2\n', ["line 3", "table"]),
    ("a.csv", b"tekst,z\na,1\n", ["line 2", "'tekst'", "'z'", "--text-field"]),
    ("a.tsv", b"text\tz\na\n", ["line 2", "1 cells"]),
    ("a.csv", b"text,z\na,\xff\n", ["line 2", "UTF-8"]),
    ("a.tsv", b"text\tz\na\t\xff\n", ["line 2", "UTF-8"]),
    ("a.txt", b"hello", ["'.txt'", ".jsonl", ".parquet"]),
    ("a.parquet", b"PAR1 not really", ["parquet"]),
    ("a.parquet", b"", ["parquet"]),
    ("a.jsonl.gz", b"not gzip at all", ["gzip"]),
]


@pytest.mark.parametrize(("name", "data", "expected"), BROKEN)
def test_broken_file_is_one_sentence(tmp_path, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    message = _message(path)
    for part in [str(path), *expected]:
        assert part in message, message


def test_truncated_gzip_and_parquet(tmp_path):
    rows = [{"text": random.Random(n).randbytes(40).hex()} for n in range(500)]
    for name, word in (
        ("a.jsonl.gz", "gzip"),
        ("a.csv.gz", "gzip"),
        ("a.tsv.gz", "gzip"),
        ("a.parquet", "parquet"),
    ):
        path = _write(tmp_path / name, rows)
        path.write_bytes(path.read_bytes()[:-200])
        message = _message(path)
        assert str(path) in message and word in message and " after " in message


def test_parquet_names_row_and_field(tmp_path):
    path = _write(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    message = _message(path)
    assert "row 2" in message and "'text'" in message and "null" in message


def test_missing_files_and_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gone.jsonl", "some/gone.csv", "./some/gone", "gone"):
        assert f"{name}: no such file" in _message(name)
    assert "directory" in _message(tmp_path)


def test_ids_from_a_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"k": 1, "text": "a"}\n{"k": "x", "text": "b"}\n{"k": "1", "text": "c"}\n')
    message = _message(path, id_field="k")
    assert "'1'" in message and "'k'" in message and "line 1" in message and "line 3" in message
    path.write_text('{"k": 1, "text": "a"}\n{"k": null, "text": "b"}\n')
    assert all(part in _message(path, id_field="k") for part in ("line 2", "'k'", "None"))
    assert all(part in _message(path, id_field="no") for part in ("line 1", "'no'", "'k'"))
    assert all(part in _message(path, group_field="no") for part in ("line 1", "'no'", "'k'"))


def test_contradicting_flags(tmp_path):
    path = _write(tmp_path / "a.jsonl", ROWS)
    assert "--text-field" in _message(path, text_field="answer", answer_field="answer")
    assert "'no'" in _message(path, question_field="question", answer_field="no")


def test_hub_name_offline(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nobody/nothing-here:part:test" in _message("nobody/nothing-here:part:test")


def test_hub_splits(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": [], "validation": []})
    message = _message("some/name")
    assert "test" in message and "validation" in message


# ---------------------------------------------------------------- real files

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no development data beside the checkout")


@pytest.mark.shared
@needs_shared
def test_real_question_answer_files():
    full = read_records(SHARED / "tofu/full.json")
    parts = [read_records(SHARED / f"tofu/{name}.json") for name in ("forget10", "retain90")]
    assert [len(full), *map(len, parts)] == [4000, 400, 3600]
    # The parts are the whole, by id, although the files differ in order and layout.
    assert {r.id for r in full} == {r.id for part in parts for r in part}
    questions = Counter(r.prompt for r in full)
    assert sorted(questions.values())[-2:] == [1, 2]
    perturbed = read_records(SHARED / "tofu/forget10_perturbed.json")
    assert [r.id for r in perturbed] == [r.id for r in parts[0]]
    assert all(len(r.fields["perturbed_answer"]) == 5 for r in perturbed)
    assert len(read_records(SHARED / "tofu/world_facts.json")) == 117


@pytest.mark.shared
@needs_shared
def test_real_tables():
    for split, size in (("train", 6920), ("dev", 872), ("test", 1821)):
        records = read_records(SHARED / f"sst2/{split}.tsv", text_field="0", label_field="1")
        assert len(records) == size and {r.fields["label"] for r in records} == {"0", "1"}
    pairs = read_records(
        SHARED / "crows_pairs/crows_pairs_anonymized.csv", text_field="sent_more", group_field="bias_type"
    )
    assert len(pairs) == 1508 and len({r.fields["group"] for r in pairs}) == 9
    truth = read_records(SHARED / "truthfulqa/TruthfulQA.csv", question_field="Question", answer_field="Best Answer")
    assert len(truth) == 817 and len({r.fields["Category"] for r in truth}) == 38


@pytest.mark.shared
@needs_shared
def test_real_corpora():
    paths = sorted((SHARED / "corpora").glob("*.jsonl.gz"))
    assert len(paths) == 11
    for path in paths:
        records = read_records(path, id_field="id", limit=200)
        assert records[0].id == f"{path.name.split('.')[0]}-00000" and all(r.text for r in records)
