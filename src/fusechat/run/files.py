"""Atomic writes, so that an incomplete file is never taken for a whole one: temporary name, flush, rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PARTIAL = ".partial"  # suffix of every temporary name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which is renamed to `path` if nothing is raised. Two processes may write the same
    file; the last one's whole file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # name the file in errors
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """As `atomic_file`, for a directory with its content; replaces an older `path`."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            flush(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A new temporary directory in `directory`, deleted at the end."""
    with TemporaryDirectory(dir=directory, prefix=".", suffix=PARTIAL) as room:
        yield Path(room)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, with sorted keys so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seen(path: Path) -> dict[str, int]:
    """Values that change whenever the file is written."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def remove_partial(directory: Path) -> None:
    """Deletes the temporary files of a killed run."""
    for left in list(directory.rglob(f"*{PARTIAL}")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Deletes a file, or a directory with its content."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def flush(path: Path) -> None:
    """Waits until a file, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
