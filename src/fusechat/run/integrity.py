"""JSON with its own checksum, and records of the files that a run resumes from: altered ones are made again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fusechat.run.files import read_json, seen, write_json

CHECKSUM = "checksum"


def write_sealed(path: Path, value: Any) -> None:
    """Writes JSON with its own checksum."""
    write_json(path, {"sha256": _digest(value), "value": value})


def read_sealed(path: Path) -> Any | None:
    """The value, or None if the file is missing or altered."""
    try:
        found = read_json(path)
        return found["value"] if found["sha256"] == _digest(found["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Writes a mapping as JSON, with its checksum as another key."""
    content = {key: value for key, value in content.items() if key != CHECKSUM}
    write_json(path, {**content, CHECKSUM: _digest(content)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """The mapping without its checksum; None if the file is missing or altered. A file without a checksum is accepted."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    checksum = found.pop(CHECKSUM, None)
    return found if checksum in (None, _digest(found)) else None


def record(path: Path, *places: Path) -> None:
    """Writes the sizes and times of the files at, or below, these places, without reading them."""
    write_sealed(path, _state(places))


def matches_record(path: Path, *places: Path) -> bool:
    """Whether exactly the recorded files exist, unchanged. A directory may have been renamed."""
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
    """Of the value as read back from JSON: keys are text, tuples lists."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
