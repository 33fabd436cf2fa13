"""Files or a hub dataset -> records. The only place that knows file formats."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jaxforget import checks
from jaxforget.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz", ".parquet")
QUESTION_FIELDS = ("question", "prompt")
ANSWER_FIELDS = ("answer", "completion", "response")
TEXT_FIELDS = ("text", "content", "sentence", "document")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>.+))?")
FLAGS = "--text-field, or --question-field with --answer-field"

# A row as read: where it stood ("line 7"), then its columns.
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """One training or evaluation text, with whatever else its source said about it.

    text: the answer of a question-answer record, or the whole plain text.
    prompt: the question; None for plain text. fields: all other columns.
    """

    id: str
    text: str
    prompt: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Return the prompt of a record that has one. Raises UserError for plain text."""
        if self.prompt is None:
            raise UserError(f"record {self.id!r} is plain text; a question and an answer are needed")
        return self.prompt


def read_records(
    source: str | Path,
    *,
    text_field: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    group_field: str | None = None,
    label_field: str | None = None,
    limit: int | None = None,
) -> list[Record]:
    """Read every record of a file, or of a hub dataset `owner/name[:config][:split]`.

    A source that ends with `::field=value` gives only the records whose field has that value.
    Without field names the first record decides: question (or prompt) with answer, completion or response;
    else text, content, sentence or document. Field names that are all numbers count the columns of a table
    without a header, from 0. The group and label columns are copied to fields["group"] and fields["label"].
    Without id_field an id is a digest of the content, with "-2", "-3" for exact duplicates, so it is the same
    in every file format and order. A hub dataset without a split gives its train split.
    Raises UserError naming file, line and field.
    """
    if text_field is not None and (question_field is not None or answer_field is not None):
        raise UserError("--text-field cannot be combined with --question-field or --answer-field")
    checks.at_least(1, limit=limit)
    source, wanted = _selection(str(source))
    extra = {"group": group_field, "label": label_field}
    named = [name for name in (text_field, question_field, answer_field, id_field, *extra.values()) if name is not None]

    records: list[Record] = []
    occurrences: Counter[str] = Counter()
    seen: dict[str, str] = {}
    prompt_column: str | None = None
    text_column = ""
    for where, row in islice(_selected(source, _rows(source, named), wanted), limit):
        place = f"{source}, {where}"
        if not records:
            prompt_column, text_column = _content_columns(place, row, text_field, question_field, answer_field)
        prompt = None if prompt_column is None else _string(place, row, prompt_column)
        text = _string(place, row, text_column)
        if id_field is None:
            digest = content_id(prompt, text)
            occurrences[digest] += 1
            identity = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        else:
            identity = _identity(place, row, id_field)
            if identity in seen:
                raise UserError(
                    f"{source}: field {id_field!r} holds {identity!r} twice, at {seen[identity]} and {where}"
                )
            seen[identity] = where
        used = {prompt_column, text_column, id_field}
        fields = {name: value for name, value in row.items() if name not in used}
        for name, column in extra.items():
            if column is not None:
                fields[name] = _value(place, row, column)
        records.append(Record(id=identity, text=text, prompt=prompt, fields=fields))
    if not records:
        raise UserError(f"{source}: holds no records" + (f" whose {wanted[0]!r} is {wanted[1]!r}" if wanted else ""))
    return records


def read_rows(source: str | Path, fields: Sequence[str]) -> list[Row]:
    """Read every row of a source for `read_records`, as it is. Raises UserError unless `fields` are strings in all."""
    source, wanted = _selection(str(source))
    rows = list(_selected(source, _rows(source, list(fields)), wanted))
    for where, row in rows:
        for name in fields:
            _string(f"{source}, {where}", row, name)
    if not rows:
        raise UserError(f"{source}: holds no records" + (f" whose {wanted[0]!r} is {wanted[1]!r}" if wanted else ""))
    return rows


def content_id(prompt: str | None, text: str) -> str:
    """Digest what a record says: 20 hex digits of SHA-256 over prompt and text."""
    # The length keeps ("ab", "c") apart from ("a", "bc"); "-" keeps no prompt apart from an empty one.
    head = "-" if prompt is None else str(len(prompt))
    return hashlib.sha256(f"{head}:{prompt or ''}{text}".encode()).hexdigest()[:20]


def _selection(source: str) -> tuple[str, tuple[str, str] | None]:
    """Split `source::field=value`."""
    found = re.fullmatch(r"(.+)::([^:=]+)=(.*)", source)
    return (found[1], (found[2], found[3])) if found else (source, None)


def _selected(source: str, rows: Iterator[Row], wanted: tuple[str, str] | None) -> Iterator[Row]:
    for where, row in rows:
        if wanted is None or str(_value(f"{source}, {where}", row, wanted[0])) == wanted[1]:
            yield where, row


# ---------------------------------------------------------------- columns


def _content_columns(
    place: str, row: Mapping[str, Any], text_field: str | None, question_field: str | None, answer_field: str | None
) -> tuple[str | None, str]:
    if text_field is not None:
        return None, text_field
    question = question_field or next((name for name in QUESTION_FIELDS if name in row), None)
    answer = answer_field or next((name for name in ANSWER_FIELDS if name in row), None)
    if question is not None and answer is not None:
        return question, answer
    if question_field is None and answer_field is None:
        text = next((name for name in TEXT_FIELDS if name in row), None)
        if text is not None:
            return None, text
    raise UserError(f"{place}: cannot tell which fields hold the text; present are {_names(row)}; set {FLAGS}")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) or "none"


def _value(place: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise UserError(f"{place}: field {column!r} is missing; present are {_names(row)}")
    return row[column]


def _string(place: str, row: Mapping[str, Any], column: str) -> str:
    value = _value(place, row, column)
    if value is None:
        raise UserError(f"{place}: field {column!r} is null; it must be a string")
    if not isinstance(value, str):
        raise UserError(f"{place}: field {column!r} is a {type(value).__name__}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: field {column!r} holds half a surrogate pair, which is not Unicode text") from None
    return value


def _identity(place: str, row: Mapping[str, Any], column: str) -> str:
    value = _value(place, row, column)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise UserError(f"{place}: id field {column!r} is {value!r}; it must be a non-empty string or a number")
    return str(value)


# ---------------------------------------------------------------- formats


def _rows(source: str | Path, named: list[str]) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source}: is a directory; give a file, one of {', '.join(FORMATS)}")
    if not path.exists():
        hub = HUB_NAME.fullmatch(str(source))
        if hub is None or str(source).endswith(FORMATS) or str(source).startswith("."):
            raise UserError(f"{source}: no such file (a hub dataset is written owner/name[:config][:split])")
        return _hub_rows(str(source), hub["name"], hub["config"] or None, hub["split"])
    kind = next((name for name in FORMATS if path.name.endswith(name)), None)
    if kind is None:
        raise UserError(f"{source}: unknown extension {path.suffix!r}; use one of {', '.join(FORMATS)}")
    if kind == ".parquet":
        return _parquet_rows(path)
    kind = kind.removesuffix(".gz")
    if kind == ".jsonl":
        return _json_line_rows(path, _lines(path))
    if kind == ".json":
        return _json_rows(path)
    return _table_rows(path, "," if kind == ".csv" else "\t", named)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file. Only a line feed ends a line, never U+2028."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    # A byte order mark would otherwise become part of the first column's name.
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip file is damaged or cut short after line {number}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _row(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {where}: holds a {type(value).__name__}, not an object with fields")
    return where, value


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text.rstrip())  # or what is cut short would be reported on the next line
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; endless nesting
        raise UserError(f"{path}, line {first_line}: not usable JSON ({error})") from None


def _json_line_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            yield _row(path, f"line {number}", _parse(path, line, number))


def _json_rows(path: Path) -> Iterator[Row]:
    lines = list(_lines(path))
    filled = next(((number, line) for number, line in lines if line.strip()), None)
    if filled is None:
        return
    text = "".join(line for _, line in lines)
    if text.lstrip()[0] == "[":
        _parse(path, text, 1)
        yield from _array_rows(path, text, text.index("[") + 1)
        return
    # JSON lines keep the name .json in some data sets: a whole object on the first of several lines.
    try:
        json.loads(filled[1])
        json_lines = sum(bool(line.strip()) for _, line in lines) > 1
    except ValueError:
        json_lines = False
    if json_lines:
        yield from _json_line_rows(path, lines)
        return
    whole = _parse(path, text, 1)
    if not (isinstance(whole, dict) and isinstance(whole.get("data"), list)):
        yield _row(path, f"line {filled[0]}", whole)
        return
    head = re.match(r'\s*\{\s*"data"\s*:\s*\[', text)
    if head:
        yield from _array_rows(path, text, head.end())
    else:
        for number, value in enumerate(whole["data"], 1):
            yield _row(path, f"item {number} of 'data'", value)


def _array_rows(path: Path, text: str, start: int) -> Iterator[Row]:
    """Walk an array known to be valid, so that each element's line is known."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[^\s,]")
    counted, line = 0, 1
    while (found := gap.search(text, start)) and text[at := found.start()] != "]":
        line += text.count("\n", counted, at)
        counted = at
        value, start = decoder.raw_decode(text, at)
        yield _row(path, f"line {line}", value)


def _table_rows(path: Path, delimiter: str, named: list[str]) -> Iterator[Row]:
    quoted = delimiter == "," or _well_quoted(path, delimiter)
    lines = (line for _, line in _lines(path))
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
    )
    header: list[str] | None = None
    for row in _cells(path, reader):
        where = f"line {reader.line_num}"
        if header is None:
            if not _headerless(row, named):
                header = row
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    raise UserError(f"{path}, {where}: the header names column {twice!r} twice")
                continue
            header = [str(column) for column in range(len(row))]
        if len(row) != len(header):
            raise UserError(f"{path}, {where}: has {len(row)} cells where the first row has {len(header)}")
        yield where, dict(zip(header, row))


def _cells(path: Path, reader: Any) -> Iterator[list[str]]:
    while True:
        # The limit is global to the process and too small for whole documents: lift it for one row at a time.
        limit = csv.field_size_limit(2**31 - 1)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a well-formed table ({error})") from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield row


def _well_quoted(path: Path, delimiter: str) -> bool:
    """Tell tables written with quoting from plain tab-separated text, where a quote is just a quote."""
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        return len({len(row) for row in _cells(path, reader)}) <= 1
    except UserError as error:
        if isinstance(error.__context__, csv.Error):
            return False
        raise


def _headerless(first_row: list[str], named: list[str]) -> bool:
    """Column numbers as field names mean that there is no header, unless the header itself is numbers."""
    numbers = bool(named) and all(name.isdecimal() for name in named)
    return numbers and not all(cell.isdecimal() or not cell for cell in first_row)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(". ")
        raise UserError(f"{path}: not a readable parquet file, after row {number} ({reason})") from None


def _hub_rows(source: str, name: str, config: str | None, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises a dozen kinds: no network, no such name, no such split
        reason = str(error).split("\n")[0].rstrip(". ") or type(error).__name__
        raise UserError(f"{source}: neither a file here nor a dataset that could be loaded ({reason})") from None
    if isinstance(data, dict):
        if len(data) > 1 and "train" not in data:
            raise UserError(f"{source}: has splits {', '.join(data)}; choose one as {name}:{config or ''}:<split>")
        data = data["train"] if "train" in data else next(iter(data.values()))
    for number, row in enumerate(data, 1):
        yield f"row {number}", dict(row)
