"""JSON with its own checksum, and what a run continues from after a kill, sealed when it was written: whatever was altered since is
made again, not trusted."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fusechat.run.files import read_json, seen, write_json

CHECKSUM = "checksum"


def write_sealed(path: Path, value: Any) -> None:
    """JSON with its own checksum."""
    write_json(path, {"sha256": _digest(value), "value": value})


def read_sealed(path: Path) -> Any | None:
    """The value; None where there is no such file, or one that is not what was written."""
    try:
        found = read_json(path)
        return found["value"] if found["sha256"] == _digest(found["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """A mapping as JSON, with its checksum next to its own keys."""
    content = {key: value for key, value in content.items() if key != CHECKSUM}
    write_json(path, {**content, CHECKSUM: _digest(content)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """The mapping, without its checksum; None where there is no such file, or one that is not what was written. One without a
    checksum is taken as it is."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    checksum = found.pop(CHECKSUM, None)
    return found if checksum in (None, _digest(found)) else None


def record(path: Path, *places: Path) -> None:
    """Writes down what the files at these places are, or below them, by their sizes and times of change: nothing is read."""
    write_sealed(path, _state(places))


def matches_record(path: Path, *places: Path) -> bool:
    """Whether just these files are there, as they were when they were sealed; a directory may have another name now."""
    found = read_sealed(path)
    return found is not None and found == _state(places)


def _state(places: tuple[Path, ...]) -> list[dict[str, dict[str, int]]]:
    return [
        {
            str(file.relative_to(place)): seen(file)
            for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
            if file.is_file()
        }
        for place in places
    ]


def _digest(value: Any) -> str:
    """Of the value as it is read again: keys are text then, tuples lists."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
