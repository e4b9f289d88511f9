"""Errors that a user can act on. They end the program with status 2, a line each on stderr, and no traceback.

FuseChatError
├── RecipeError     a recipe, or an option of the command line
├── DataError       a file of conversations
├── ModelError      a model reference, its weights, tokenizer or chat template
├── WorkdirError    a work directory: of another recipe, in use, damaged
├── TrainingError   fine-tuning that cannot continue (a loss that is not finite)
└── StorageError    no space left, no permission, a file that cannot be written, or read

Everything else that escapes is a defect of FuseChat, and ends it with status 1 and a traceback.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FuseChatError(Exception):
    """What the user can correct; `messages` holds one line for each thing that is wrong."""

    reported = False  # another process of the launch reports it

    def __init__(self, *messages: str) -> None:
        self.messages = tuple(" ".join(message.split()) for message in messages)
        super().__init__("\n".join(self.messages))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.messages


class RecipeError(FuseChatError):
    pass


class DataError(FuseChatError):
    pass


class ModelError(FuseChatError):
    pass


class WorkdirError(FuseChatError):
    pass


class TrainingError(FuseChatError):
    pass


class StorageError(FuseChatError):
    pass


class PlanError(FuseChatError):
    """What a plan found that would end the run."""


_STORAGE_ERRNO = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
}
# What libraries written in Rust and C++ say where Python would raise an OSError with a number, and what to say for it.
_STORAGE_TEXT = {
    "No space left on device": "",
    "File too large": "",
    "Disk quota exceeded": "",
    "Read-only file system": "",
    "PytorchStreamWriter failed writing": "a checkpoint could not be written",
    "unexpected pos": "a checkpoint could not be written",  # PyTorch, when it finds that less was written than it gave
}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ADVICE = "free some room or choose another {place}, then run again to resume"
_OTHER_ADVICE = "make it writable or choose another {place}, then run again to resume"
_REFUSED = (errno.EACCES, errno.EPERM)  # of reading as well as of writing


def storage_error(error: BaseException, place: str = "--workdir", where: Path | None = None) -> str | None:
    """What to tell the user where `error` (or what caused it) says that the disk cannot be written, or a file not read; else None.

    `place`: how the user says where to write. `where`: what was being written, for errors that do not name their file."""
    advice, other = _ADVICE.format(place=place), _OTHER_ADVICE.format(place=place)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE_ERRNO:
            unread = unreadable(Path(seen.filename)) if seen.errno in _REFUSED and seen.filename else None
            if unread:
                return unread
            said, named = str(seen.strerror or seen), seen.filename or where
            at = f" ({named})" if named and str(named) not in said else ""
            return f"{said}{at}; {advice if seen.errno in _NO_ROOM else other}"
        for text, words in _STORAGE_TEXT.items():
            if text in str(seen):
                said = words or first_line(seen)
                at = f" ({where})" if where and str(where) not in said else ""
                return f"{said}{at}; {advice}"
        seen = seen.__cause__ or seen.__context__
    return None


def unreadable(path: Path) -> str | None:
    """What to tell the user where a file or directory is there and may not be read; else None."""
    try:
        if path.is_dir():
            os.listdir(path)
        else:
            path.open("rb").close()
    except PermissionError as error:
        closed = next((above for above in reversed(path.absolute().parents) if not os.access(above, os.X_OK)), None)
        advice = "make it readable" if closed is None else f"{closed} may not be entered"
        return f"{path}: cannot be read ({error.strerror}): {advice}"
    except OSError:
        pass  # not there, or broken in another way
    return None


@contextmanager
def naming_storage(where: Path) -> Iterator[None]:
    """Raises StorageError, naming a place, for whatever says that it cannot be written to."""
    try:
        yield
    except Exception as error:
        told = None if isinstance(error, FuseChatError) else storage_error(error, where=where)
        if told is None:
            raise
        raise StorageError(told) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, as one line: its first, or all of it where that one only leads on to the rest."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(str(error).split()) if first.endswith(":") else first
