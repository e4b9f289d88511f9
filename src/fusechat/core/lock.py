"""One process at a time: a lock on a file, which the system frees however its holder ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fusechat.errors import WorkdirError


@contextmanager
def only_one(file: Path, what: Path, *, remove: bool = False) -> Iterator[None]:
    """Raises WorkdirError, naming `what` and the process that uses it, where another one holds the lock. With `remove` the file
    is not left behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(file, what)
    while not _is_still(handle, file):  # removed after it was opened here, and before it was locked
        handle.close()
        handle = _locked(file, what)
    with handle:
        try:
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield
        finally:
            if remove:
                file.unlink(missing_ok=True)


def _locked(file: Path, what: Path) -> TextIO:
    handle = file.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with handle:
            handle.seek(0)
            raise WorkdirError(f"{what}: process {handle.read().strip() or '?'} is using it") from None
    return handle


def _is_still(handle: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False
