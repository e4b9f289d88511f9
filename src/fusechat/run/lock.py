"""File locks, which the system frees when their holder ends."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fusechat.errors import WorkdirError
from fusechat.run.progress import log

_PAUSE = 0.2  # seconds between two tries


@contextmanager
def exclusive_lock(file: Path, what: Path, *, remove: bool = False) -> Iterator[None]:
    """Holds the lock alone. Raises WorkdirError, naming `what` and the process, if another holds it. `remove` deletes the file."""
    with _held(file, lambda handle: _refuse(handle, what), remove=remove):
        yield


@contextmanager
def wait_for_lock(file: Path, what: str) -> Iterator[None]:
    """Waits, with a log line, until the lock is free, and holds it alone. Deletes the file at the end."""

    def wait(handle: TextIO) -> None:
        log.info("%s: process %s is doing it; waiting", what, _holder(handle))
        while not _lock(handle, fcntl.LOCK_EX):
            time.sleep(_PAUSE)

    with _held(file, wait, remove=True):
        yield


@contextmanager
def shared_lock(file: Path, what: Path) -> Iterator[bool]:
    """Holds the lock together with other `shared_lock`s. Raises WorkdirError during an `exclusive_lock`. Yields whether this
    process is the first. If two begin at the same time, neither may be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        first = _lock(handle, fcntl.LOCK_EX)
        if not _lock(handle, fcntl.LOCK_SH):
            _refuse(handle, what)
        _sign(handle)
        yield first


def is_held(file: Path) -> bool:
    """Whether any process holds the lock."""
    try:
        with file.open("r+") as handle:  # over NFS, locking needs write access
            return not _lock(handle, fcntl.LOCK_EX)
    except OSError:
        return False


@contextmanager
def _held(file: Path, otherwise: Callable[[TextIO], None], *, remove: bool) -> Iterator[None]:
    """Holds the lock alone; `otherwise` raises or waits if another process has it."""
    handle = _take(file, otherwise)
    while not _is_still(handle, file):  # removed between opening and locking
        handle.close()
        handle = _take(file, otherwise)
    with handle:
        try:
            _sign(handle)
            yield
        finally:
            if remove:
                file.unlink(missing_ok=True)


def _take(file: Path, otherwise: Callable[[TextIO], None]) -> TextIO:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = file.open("a+")
    try:
        if not _lock(handle, fcntl.LOCK_EX):
            otherwise(handle)
    except BaseException:
        handle.close()
        raise
    return handle


def _lock(handle: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise WorkdirError(
            f"{handle.name}: cannot be locked ({error.strerror}): its file system must support locks; choose another --workdir"
        ) from error
    return True


def _sign(handle: TextIO) -> None:
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()


def _holder(handle: TextIO) -> str:
    handle.seek(0)
    return handle.read().strip() or "?"


def _refuse(handle: TextIO, what: Path) -> None:
    raise WorkdirError(f"{what}: process {_holder(handle)} is using it")


def _is_still(handle: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False
