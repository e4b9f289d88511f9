"""One process at a time: a lock on a file, which the system frees however its holder ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusechat.errors import WorkdirError


@contextmanager
def only_one(file: Path, what: Path) -> Iterator[None]:
    """Raises WorkdirError, naming `what` and the process that uses it, where another one holds the lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise WorkdirError(f"{what}: process {handle.read().strip() or '?'} is using it") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
