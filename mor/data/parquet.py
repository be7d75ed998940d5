"""The texts of a Parquet file, piece by piece and only the column that holds them.

pyarrow is the extra `data` and is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mor.data.records import MESSAGES, Row, choose_field, text_of
from mor.data.streams import CHUNK_BYTES, BadInput

PARQUET_SUFFIX = ".parquet"
BATCH_ROWS = 256


def read_parquet(
    path: Path,
    text_field: str,
    *,
    report: Callable[[str], None],
    on_read: Callable[[int], None],
) -> Iterator[Row]:
    """Yield the rows of a Parquet file in order.

    report   told, in one line, of a row that has no text
    on_read  told the bytes of the file that the rows so far stand for
    Raises   BadInput when the file cannot be read, is damaged or has no column of texts
    """
    import pyarrow as pa

    try:
        yield from _rows(path, text_field, report, on_read)
    except pa.ArrowException as error:
        raise BadInput(f"{path} is damaged or no Parquet file: {_one_line(error)}") from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or _one_line(error)}") from error


def _rows(
    path: Path,
    text_field: str,
    report: Callable[[str], None],
    on_read: Callable[[int], None],
) -> Iterator[Row]:
    import pyarrow.parquet as pq

    size = path.stat().st_size
    # So a column is read in pieces; by default a whole row group of it is loaded.
    with pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
        column = _text_column(path, file.schema_arrow, text_field)
        number = told = 0
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                for cell in batch.column(0):
                    number += 1
                    try:
                        text = text_of({column: _value(cell)}, text_field)
                    except BadInput as error:
                        report(f"{path}:{number}: {error}")
                        continue
                    yield Row(text, number)
            passed = size * (group + 1) // file.num_row_groups
            on_read(passed - told)
            told = passed


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise BadInput(f"invalid UTF-8 at byte {error.start}") from error


def _text_column(path: Path, schema: Any, text_field: str) -> str:
    """Return the column of texts or messages; BadInput when there is none."""
    import pyarrow.types as types

    try:
        column = choose_field(schema.names, text_field)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if column == text_field:
        is_fit = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    else:
        assert column == MESSAGES
        is_fit = types.is_list(kind) or types.is_large_list(kind)
    if not is_fit:
        wanted = "text" if column == text_field else "a list"
        raise BadInput(f"{path}: column {column!r} is {kind}, not {wanted}; set --text-field")
    return column


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
