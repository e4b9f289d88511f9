"""Errors that a user can correct. They end the program with status 2 and a line each on stderr, without a traceback.

FuseChatError
├── RecipeError     a recipe, or an option of the command line
├── DataError       a file of conversations
├── ModelError      a model reference, its weights, tokenizer or chat template
├── WorkdirError    a work directory: of another recipe, in use, damaged
├── TrainingError   fine-tuning that cannot continue (a loss that is not finite)
├── StorageError    no space left, no permission, a file that cannot be written or read
└── PlanError       a plan that found what would end the run

Any other exception is a defect of FuseChat. It ends the program with status 1 and a traceback.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FuseChatError(Exception):
    """An error that the user can correct. `messages`: one line for each mistake."""

    reported = False  # another process of the launch reports it

    def __init__(self, *messages: str) -> None:
        self.messages = tuple(" ".join(message.split()) for message in messages)
        super().__init__("\n".join(self.messages))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.messages


class RecipeError(FuseChatError):
    """A mistake in a recipe, in an option, or in an argument of the Python interface."""


class DataError(FuseChatError):
    """A mistake in a file of conversations, or in a text."""


class ModelError(FuseChatError):
    """A model reference, weights, a tokenizer or a chat template that cannot be used."""


class WorkdirError(FuseChatError):
    """A work directory that is in use, damaged, unfinished, or of another recipe."""


class TrainingError(FuseChatError):
    """A fine-tuning that cannot continue."""


class StorageError(FuseChatError):
    """A file that cannot be written or read: no space left, or no permission."""


class PlanError(FuseChatError):
    """A plan that found problems which would end the run."""


_STORAGE_ERRNO = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
}
# Texts of errors from Rust and C++ libraries that stand for an OSError, and the message for each ("": the text itself).
_STORAGE_TEXT = {
    "No space left on device": "",
    "File too large": "",
    "Disk quota exceeded": "",
    "Read-only file system": "",
    "PytorchStreamWriter failed writing": "a checkpoint could not be written",
    "unexpected pos": "a checkpoint could not be written",  # PyTorch, after an incomplete write
}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ADVICE = "free some room or choose another {place}, then run again to resume"
_OTHER_ADVICE = "make it writable or choose another {place}, then run again to resume"
_REFUSED = (errno.EACCES, errno.EPERM)  # for reading and for writing


def storage_error(error: BaseException, place: str = "--workdir", where: Path | None = None) -> str | None:
    """The message for an error, or its cause, that comes from the disk: full, read-only, no permission. None for other errors.

    `place`: the option that sets where to write. `where`: the file being written, for errors that do not name theirs.
    """
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
    """The message for a file or directory that exists but cannot be read, else None."""
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
        pass  # missing, or broken in another way
    return None


@contextmanager
def naming_storage(where: Path) -> Iterator[None]:
    """Raises StorageError, naming `where`, in place of any error that comes from the disk."""
    try:
        yield
    except Exception as error:
        message = None if isinstance(error, FuseChatError) else storage_error(error, where=where)
        if message is None:
            raise
        raise StorageError(message) from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error; all of its text, on one line, if the first line ends with a colon."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(str(error).split()) if first.endswith(":") else first
