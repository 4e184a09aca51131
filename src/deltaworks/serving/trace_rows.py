"""The rows of a trace's file: CSV, JSON lines, JSON, Parquet, or what `vllm bench serve` writes."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaworks.documents import decoded, json_values, read_bytes
from deltaworks.errors import DeltaworksError, WorkloadError, one_line, quoted
from deltaworks.wording import counted

Row = Mapping[Any, Any]

TRACE_BYTES = 512 << 20
"""The largest trace that is read; a larger one should be cut, or be Parquet."""
_WHAT = "a trace"
_BATCH_ROWS = 1 << 16
VLLM_BENCH = ("start_times", "input_lens", "output_lens")
"""Keys of a result of `vllm bench serve --save-detailed` that say what was asked and when."""


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a trace's file, one by one.

    Raises:
        WorkloadError: it cannot be read, or is not a list of requests; what it is instead is said.
    """
    content = read_bytes(path, _WHAT, WorkloadError, TRACE_BYTES)
    if path.suffix == ".parquet" or content[:4] == b"PAR1":
        yield from _parquet_rows(path, content)
    elif content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        yield from _json_rows(decoded(content, str(path), _WHAT, WorkloadError), path)
    else:
        yield from csv_rows(path, content, _WHAT, WorkloadError)


def csv_rows(path: Path, content: bytes, what: str, error: type[DeltaworksError]) -> Iterator[Row]:
    """The rows of a CSV file, by the names in its first line.

    Args:
        path: The file, for errors.
        content: Its bytes.
        what: What it should be, for errors.
        error: The class of errors to raise.

    Raises:
        DeltaworksError: as ``error``: it is not CSV in UTF-8, it has a column twice, or a row has more or fewer values
            than there are columns.
    """
    reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=""))
    try:
        counts = Counter(reader.fieldnames or ())
        if twice := [name for name, count in counts.items() if count > 1 and name]:
            raise error(f"{path}: the column {quoted(twice[0])} is given twice")
        if separator := _separator(reader.fieldnames or ()):
            raise error(f"{path}: its columns are separated by {separator}; separate them by commas")
        for row in reader:
            if None in row or None in row.values():
                found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                raise error(
                    f"{path}: line {reader.line_num} has {counted(found, 'value')} for"
                    f" {counted(len(reader.fieldnames or ()), 'column')}; put"
                    " values that hold a comma in quotes, and write decimals with a point"
                )
            yield row
    except csv.Error as failure:
        line = reader.line_num + 1
        raise error(f"{path}: cannot be read as {what}: line {line} is not CSV: {failure}") from None
    except UnicodeDecodeError:
        decoded(content, str(path), what, error)
        raise


def _separator(columns: Sequence[str]) -> str:
    """What separates the names in a line without commas; empty if nothing does."""
    kinds = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    return next((kind for mark, kind in kinds.items() if len(columns) == 1 and mark in columns[0]), "")


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    values = json_values(text, str(path), _WHAT, WorkloadError)
    first = next(values, None)
    if isinstance(first, dict) and isinstance(first.get("requests"), list):
        yield from first["requests"]
    elif isinstance(first, dict) and set(VLLM_BENCH) & set(first) and "input_lens" in first:
        yield from _bench_rows(first, path)
    elif isinstance(first, dict) and isinstance(first.get("data"), dict) and "resultType" in first["data"]:
        raise WorkloadError(
            f"{path}: is a response of Prometheus, which has counts and no requests; give a list of requests, or rates"
        )
    elif first is not None:
        yield first
    yield from values


def _bench_rows(result: dict[str, Any], path: Path) -> Iterator[Row]:
    columns = [result.get(key) for key in VLLM_BENCH]
    for key, column in zip(VLLM_BENCH, columns, strict=True):
        if not isinstance(column, list):
            raise WorkloadError(
                f"{path}: is a result of vLLM's benchmark without {key}; run it with --save-detailed, in a vLLM that"
                " writes them"
            )
    if len({len(column or ()) for column in columns}) > 1:
        raise WorkloadError(f"{path}: {', '.join(VLLM_BENCH)} are of different lengths")
    for values in zip(*(column or () for column in columns), strict=True):
        yield dict(zip(VLLM_BENCH, values, strict=True))


def _parquet_rows(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow as pa  # noqa: PLC0415  # slow to import, seldom needed
    from pyarrow import parquet  # noqa: PLC0415

    try:
        file = parquet.ParquetFile(pa.BufferReader(content))
        for batch in file.iter_batches(_BATCH_ROWS):
            columns = [_microseconds(column, pa) for column in batch.columns]
            yield from pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
    except (OSError, ValueError, KeyError, NotImplementedError, pa.ArrowException) as error:
        raise WorkloadError(f"{path}: cannot be read as {_WHAT}: {one_line(str(error))}") from None


def _microseconds(column: Any, pa: Any) -> Any:
    """A column of times in nanoseconds as one in microseconds, which Python's dates can hold."""
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column
