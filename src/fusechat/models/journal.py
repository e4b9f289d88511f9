"""A journal of answers: one line of JSON each, written before the next answer is awaited, so that a killed run repeats nothing."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fusechat.errors import WorkdirError


class Journal:
    """An append-only file of `{"key": …, "value": …}` lines. The last line of a key counts. An incomplete last line of a killed
    run is cut off. Raises WorkdirError for any other invalid line, and if another process has the journal open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # a buffer would repeat a failed write
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkdirError(f"{path}: another process is writing it") from None
            self._values, self._whole = _read(path)
            self._file.truncate(self._whole)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Appends a line and flushes it to disk. `value`: plain JSON with finite numbers. On a full disk the journal stays
        unchanged, and OSError names it."""
        # ASCII: a server's text may have single surrogates, which UTF-8 does not have
        line = json.dumps({"key": key, "value": value}, allow_nan=False).encode() + b"\n"
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._whole)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self._path)
            raise
        self._whole += len(line)
        self._values[key] = value

    def close(self) -> None:
        """Closes the file. Further calls do nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> dict[str, Any]:
    """The values of a journal by key, or an empty mapping. Reads a journal in use too, and does not change it."""
    return _read(path)[0] if path.exists() else {}


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The values, and the number of bytes in complete lines."""
    values: dict[str, Any] = {}
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
            except (ValueError, TypeError, KeyError):
                key, value = None, None
            if not isinstance(key, str):
                raise WorkdirError(f'{path}:{number}: not a line of a journal ({{"key": …, "value": …}})')
            values[key] = value
            whole += len(line)
    return values, whole
