"""The cache of fetched and converted models, and of checksums."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusechat.run.files import digest, digest_json, seen
from fusechat.run.integrity import read_sealed, write_sealed


def cache_directory() -> Path:
    """The cache: `FUSECHAT_CACHE`, else `~/.cache/fusechat`."""
    return Path(os.environ.get("FUSECHAT_CACHE") or Path.home() / ".cache" / "fusechat").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Gives one process at a time access to `path` in the cache. The system frees the lock when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def known_digest(file: Path) -> str:
    """SHA-256 of a file, cached as long as its size and times stay the same."""
    file = file.resolve()
    known = read_sealed(_memo(file))
    if known is not None and known == {"path": str(file), **seen(file), "sha256": known.get("sha256")}:
        return str(known["sha256"])
    return fresh_digest(file)


def fresh_digest(file: Path) -> str:
    """SHA-256 of a file, read now and cached for `known_digest`."""
    file = file.resolve()
    before = seen(file)
    found = digest(file)
    write_sealed(_memo(file), {"path": str(file), **before, "sha256": found})
    return found


def _memo(file: Path) -> Path:
    return cache_directory() / "digests" / f"{digest_json(str(file))[:32]}.json"
