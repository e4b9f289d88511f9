"""A journal: what was answered, a line of JSON each, on disk before the next is waited for. A killed run asks nothing twice."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fusechat.errors import WorkdirError


class Journal:
    """`{"key": …, "value": …}` lines, only ever appended to. Where a key is there twice, the last one holds.

    A last line without its end, which a killed run left, is cut off. Raises WorkdirError where any other line is not one of a
    journal, and where another process has the journal open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # a buffer would be written again after a write that failed
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
        """One line, flushed to the disk. `value` is plain JSON with finite numbers. Where there is no room, the journal stays
        as it was and OSError names it."""
        # ASCII: a server's text may hold half of a surrogate pair, which UTF-8 cannot
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
        """A second time does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> dict[str, Any]:
    """What a journal holds, by key; nothing where there is none. It is not changed, and may be in use."""
    return _read(path)[0] if path.exists() else {}


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The values, and how many bytes the whole lines take."""
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
