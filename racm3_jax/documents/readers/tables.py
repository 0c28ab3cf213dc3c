"""Tables of captions: a file name and a caption per row.

    file_name,caption          metadata.csv, captions.csv, any CSV or TSV with such columns
    img\\1.jpg;two cats         Excel's: semicolons, tabs, backslashes, UTF-16
    {"file_name": "1.jpg", …}  metadata.jsonl, metadata.parquet: Hugging Face's
    1000.jpg#0<tab>two cats    Flickr8k.token.txt
    image| n| comment          Flickr30k's results.csv
    "[""two cats"", ""cats""]"   several captions in one cell

Rows with the same file name are the captions of one image.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from racm3_jax.documents.readers.fields import (
    TEXT_FIELDS,
    as_object,
    parse_json,
    pick,
)
from racm3_jax.documents.readers.files import MAX_FILE_BYTES
from racm3_jax.documents.readers.image_fields import FILE_FIELDS, names_image
from racm3_jax.documents.readers.records import BadRecord

NAME_FIELDS = (*FILE_FIELDS, "image", "images", "image_path", "img_path", "img")
_USUAL_STEMS = ("captions", "metadata")
_MUST_BE_TABLES = tuple(f"{s}.{e}" for s in _USUAL_STEMS for e in ("csv", "jsonl"))
_TABLE_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t", "|")
_NAME_AND_NUMBER = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)")
# A longer cell is not a list of captions.
_MAX_LIST = 1 << 16
# Appended to a table to check that its last quotation mark is closed.
_LAST_ROW = "\x1e"
# Bytes of a file that are used to detect a table.
_HEAD_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      names: of its files; empty for a bad row.
      fields: by column.
      place: location of the row, for messages.
      error: why it cannot be read.
    """

    names: tuple[str, ...]
    fields: Mapping[str, Any]
    place: str
    error: BadRecord | None = None


def may_be_table(name: str) -> bool:
    """Whether a file name may be that of a table of captions."""
    path = pathlib.PurePath(name.lower())
    stem = path.name.split(".")[0]
    if stem in _USUAL_STEMS:
        return path.suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
    return path.suffix in _TABLE_SUFFIXES or ".token" in path.suffixes


def must_be_table(name: str) -> bool:
    """Whether a file must be a table by its name; other content is then an error."""
    return pathlib.PurePath(name.lower()).name in _MUST_BE_TABLES


def read_table(
    data: bytes, name: str, encoding: str | None = None, text: str | None = None
) -> list[Row]:
    """All rows of a table, including bad ones.

    Args:
      data: content of the file.
      name: of the file; its suffix gives the format.
      encoding: None means UTF-8, or UTF-16 with a byte order mark.
      text: the caption's column; None tries the usual names.

    Raises:
      ValueError: another encoding, no column of file names, or no column `text`.
    """
    suffix = pathlib.PurePath(name.lower()).suffix
    if suffix == ".parquet":
        rows = _parquet_rows(data, name)
    elif suffix in (".jsonl", ".json", ".ndjson"):
        rows = _json_rows(data, name)
    else:
        rows = list(_text_rows(_decode(data, name, encoding), name, text))
    good = [row for row in rows if row.error is None]
    if good and not any(_names_files(row.fields) for row in good):
        raise ValueError(
            f"{name} has rows without a file name; one of the columns "
            f"{', '.join(FILE_FIELDS)} must hold it"
        )
    if text and good and not any(text in row.fields for row in good):
        raise ValueError(
            f"{name} has no column {text!r}; it has {', '.join(map(str, good[0].fields))}"
        )
    return [row if row.error or row.names else _nameless(row) for row in rows]


def _names_files(fields: Mapping[str, Any]) -> bool:
    return any(str(name).strip().lower() in NAME_FIELDS for name in fields)


def _nameless(row: Row) -> Row:
    error = BadRecord("row without a file name", f"{row.place} names no file")
    return dataclasses.replace(row, error=error)


def is_table(data: bytes, name: str, encoding: str | None = None) -> bool:
    """Whether the content of a file is a table of captions."""
    suffix = pathlib.PurePath(name.lower()).suffix
    try:
        if suffix not in (".parquet", ".jsonl", ".json"):
            head = _decode(data[:_HEAD_BYTES], name, encoding, partial=True)
            rows = list(_text_rows(head, name, None, whole=False))[:8]
        else:
            rows = read_table(data, name)[:8]
    except ValueError:
        return False
    return any(
        names_image(list(row.names)) and pick(row.fields, TEXT_FIELDS) is not None
        for row in rows
    )


def _row(fields: Mapping[str, Any], place: str) -> Row:
    value = pick(fields, NAME_FIELDS)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        value = value.get("path")
    names = value if isinstance(value, list | tuple) else [value]
    found = tuple(str(n).strip() for n in names if isinstance(n, str | int) and n != "")
    return Row(found, fields, place)


def _parquet_rows(data: bytes, name: str) -> list[Row]:
    from racm3_jax.documents.readers.parquet import import_parquet

    try:
        with import_parquet().ParquetFile(io.BytesIO(data)) as opened:
            rows = opened.read().to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as parquet: {error}") from error
    return [_row(fields, f"{name}[{i}]") for i, fields in enumerate(rows)]


def _json_rows(data: bytes, name: str) -> list[Row]:
    """Rows of JSON lines, of a list of objects, or of {"1.jpg": caption or object}."""
    if name.lower().endswith(".json"):
        found = parse_json(data)
        if isinstance(found, dict):
            found = [
                {"file_name": n, **(v if isinstance(v, dict) else {"caption": v})}
                for n, v in found.items()
            ]
        if not isinstance(found, list):
            raise ValueError(f"{name} is not a list of rows")
        return [_json_row(fields, f"{name}[{i}]") for i, fields in enumerate(found)]
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        place = f"{name}:{number}"
        if line.strip():
            try:
                rows.append(_json_row(parse_json(line), place))
            except BadRecord as error:
                rows.append(Row((), {}, place, error))
    return rows


def _json_row(found: Any, place: str) -> Row:
    try:
        return _row(as_object(found), place)
    except BadRecord as error:
        return Row((), {}, place, error)


def _decode(
    data: bytes, name: str, encoding: str | None, *, partial: bool = False
) -> str:
    has_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    used = encoding or ("utf-16" if has_mark else "utf-8-sig")
    try:
        return data.decode(used, "ignore" if partial else "strict")
    except UnicodeDecodeError as error:
        guess = ("UTF-16", "utf-16-le") if b"\0" in data else ("Windows' cp1252",) * 2
        advice = f"it is probably {guess[0]}: save it as UTF-8, or give ;encoding="
        advice += guess[1].split()[-1]
        raise ValueError(
            f"{name} is not {used.removesuffix('-sig').upper()} (byte "
            f"0x{data[error.start]:02x} at {error.start}); "
            + (advice if encoding is None else "give another ;encoding=")
        ) from None
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; cp1252 is one") from None


def _text_rows(
    text: str, name: str, caption: str | None, *, whole: bool = True
) -> Iterator[Row]:
    """Rows of a text file.

    Args:
      text: content of the file.
      name: of the file.
      caption: the caption's column; None tries the usual names.
      whole: False if `text` is only the beginning of the file.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return
    if _NAME_AND_NUMBER.fullmatch(lines[first]):
        for number, line in enumerate(lines, 1):
            found = _NAME_AND_NUMBER.fullmatch(line)
            place = f"{name}:{number}"
            if found:
                fields = {"file_name": found[1], "caption": found[2]}
                yield Row((found[1],), fields, place)
            elif line.strip():
                error = BadRecord("damaged row", f"{place} is not name#number<tab>text")
                yield Row((), {}, place, error)
        return
    if lines[first].lower().startswith("sep=") and len(lines[first]) == 5:
        delimiter = lines[first][4]
        first += 1
    else:
        delimiter = _find_delimiter(lines[first])
    header, *rows = _parse("\n".join(lines[first:]), name, delimiter, whole)
    columns = [column.strip() for column in header[1]] or [""]
    last_is_text = columns[-1].lower() in ((caption or "").lower(), *TEXT_FIELDS)
    for number, cells in rows:
        place = f"{name}:{number + first}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(columns) and last_is_text:
            # A caption with delimiters and without quotation marks.
            last = len(columns) - 1
            cells = [*cells[:last], delimiter.join(cells[last:])]
        if any(cell.strip() for cell in cells[len(columns) :]):
            error = BadRecord(
                "row with too many columns",
                f"{place} has {len(cells)} columns, its header has {len(columns)}",
            )
            yield Row((), {}, place, error)
        else:
            values = [_as_list(cell.strip()) for cell in cells]
            yield _row(dict(zip(columns, values, strict=False)), place)


def _as_list(cell: str) -> str | list[str]:
    """Parses a cell with a JSON or Python list of strings: `["a dog", "two"]`."""
    if not (cell.startswith(("['", '["')) and cell.endswith(("']", '"]'))):
        return cell
    if len(cell) > _MAX_LIST:
        return cell
    try:
        with warnings.catch_warnings():
            # From a backslash in a caption.
            warnings.simplefilter("ignore")
            found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell
    if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
        return found
    return cell


def _find_delimiter(header: str) -> str:
    """The delimiter that gives the most columns, including a file name's."""
    best, most = ",", 0
    for delimiter in _DELIMITERS:
        cells = [
            c.strip().lower() for c in next(csv.reader([header], delimiter=delimiter))
        ]
        if len(cells) > most and any(c in NAME_FIELDS for c in cells):
            best, most = delimiter, len(cells)
    return best


def _parse(
    text: str, name: str, delimiter: str, whole: bool
) -> list[tuple[int, Sequence[str]]]:
    """(line, cells) of every row."""
    # Python's own limit is 128 KiB per field.
    csv.field_size_limit(MAX_FILE_BYTES)

    def parse(text: str, **options: Any) -> list[tuple[int, Sequence[str]]]:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, **options
        )
        return [(reader.line_num, cells) for cells in reader]

    try:
        return parse(text, strict=whole)
    except csv.Error:
        # Flickr's tables have unbalanced quotation marks.
        if delimiter in "\t|":
            return parse(text, quoting=csv.QUOTE_NONE)
    try:
        *rows, (_, last) = parse(f"{text}\n{_LAST_ROW}")
    except csv.Error as error:
        raise ValueError(f"{name} is not a table: {error}") from None
    if last != [_LAST_ROW]:
        raise ValueError(
            f"{name} has a quotation mark that is never closed; it may be in line "
            f"{rows[-1][0] + 1 if rows else 1}"
        )
    return rows
