"""Files of records: JSONL and JSON, also gzipped, Parquet, and data sets of the hub. Errors name their place."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.data.messages import Malformed
from fusechat.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
_BOM = b"\xef\xbb\xbf"


def suffix_of(path: Path | str) -> str:
    """The one of SUFFIXES that the file's name ends with, else ""."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if str(path).endswith(suffix)), "")


def file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and content of every record, Malformed for unreadable ones. Raises DataError for an unreadable file."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    lines = suffix.startswith(".jsonl") or _holds_lines(path)
    try:
        yield from _jsonl(path) if lines else _json(path)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not gzip, or cut off ({error})") from None


def hub_records(name: str, directory: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The records of a data set that was fetched to `directory`. Raises DataError."""
    import datasets  # slow to import, and rarely needed

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below
    number = 0
    try:
        for row in datasets.load_dataset(str(directory), split=split, streaming=True):
            number += 1
            yield f"{name}, record {number}", without_null(row)
    except Exception as error:  # of many types; all mean that the data cannot be read
        raise DataError(f"{name}: cannot be read past record {number} ({first_line(error)})") from error


def without_null(value: Any) -> Any:
    """Without keys whose value is null: in columns, null means that the record lacks the key."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _holds_lines(path: Path) -> bool:
    """Whether a JSON file has one record on each line: the first line is an object by itself."""
    try:
        with _open(path) as stream:
            first = next((line for line in stream if line.strip(b" \t\r\n" + _BOM)), b"")
        found = json.loads(first.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError):  # reported by the reader
        return False
    return isinstance(found, dict) and bool(found)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError:
                yield where, Malformed(where, "not UTF-8")
            except json.JSONDecodeError as error:
                yield where, Malformed(where, f"not JSON ({error.msg}, column {error.colno})")
            except (ValueError, RecursionError) as error:  # a number with too many digits, too many brackets
                yield where, Malformed(where, f"not JSON ({error})")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        data = stream.read()
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: holds {type(records).__name__}, not a list of conversations")
    yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, record {number}", without_null(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not Parquet past record {number} ({error})") from error
