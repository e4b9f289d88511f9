"""The size of a GGUF file's model, from its header alone.

Format (versions 2 and 3, little-endian): `GGUF`, version u32, number of tensors u64, number of entries u64; for each entry its
key, type u32 and value; for each tensor its name, number of dimensions u32, their sizes u64, type u32, offset u64. A string is
its length u64 and bytes; an array its element type u32, length u64 and elements.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
_DIMENSIONS = 8  # no tensor has more
_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by type
_MOST = 8  # float32 bytes over file bytes if the header cannot be read: 4 bits a weight


def weights(file: Path) -> int:
    """The bytes of a GGUF file's weights as float32; an estimate from its size if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return 4 * _count(handle)
    except (struct.error, KeyError, OverflowError, ValueError, OSError, RecursionError):
        return _MOST * file.stat().st_size


def _count(handle: BinaryIO) -> int:
    _, _, tensors, entries = _read(handle, "<4sIQQ")
    for _ in range(entries):
        _skip_string(handle)
        _skip(handle, _read(handle, "<I")[0])
    found = 0
    for _ in range(tensors):
        _skip_string(handle)
        dimensions = _read(handle, "<I")[0]
        if dimensions > _DIMENSIONS:
            raise struct.error
        found += math.prod(_read(handle, f"<{dimensions}Q"))
        _read(handle, "<IQ")
    return found


def _skip(handle: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip_string(handle)
    elif kind == _ARRAY:
        inner, count = _read(handle, "<IQ")
        if inner in _WIDTH:
            handle.seek(count * _WIDTH[inner], 1)
        else:
            for _ in range(count):
                _skip(handle, inner)
    else:
        handle.seek(_WIDTH[kind], 1)


def _skip_string(handle: BinaryIO) -> None:
    handle.seek(_read(handle, "<Q")[0], 1)


def _read(handle: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, handle.read(struct.calcsize(form)))
