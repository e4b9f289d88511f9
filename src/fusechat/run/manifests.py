"""What a step's manifest says: what was written and whether it is still that, with which versions, how long it took, and how one's
inputs differ from another's."""

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from fusechat.run.cache import fresh_digest, known_digest
from fusechat.run.unfinished import STARTED

MANIFEST, LOCK = "manifest.json", ".lock"
FREED = "freed"  # a key: the files that were cleared away since
BEFORE = "seconds_before"  # of timings: what killed runs had spent before the one that finished

T = TypeVar("T")
_answers: list[dict[Any, Any]] = []  # of the question that is open
_VERSIONS = ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors", "accelerate")


def versions(*more: str) -> dict[str, str]:
    """Of this package, those that results depend on, and `more` of them."""
    found = {}
    for name in (*_VERSIONS, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def difference(old: Any, new: Any, path: str = "") -> str:
    """The first few keys in which two manifests' inputs differ, for a person to read."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{path} changed"
    found = []
    for key in [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)][:4]:
        name = f"{path}.{key}".lstrip(".")
        one_sided = "" if key in old and key in new else "is new" if key in new else "is gone"
        found.append(f"{name} {one_sided}" if one_sided else difference(old[key], new[key], name))
    return "; ".join(found)


def asked_once(key: Any, answer: Callable[[], T]) -> T:
    """What a step answers about itself: while one question to a step leads to the same ones again and again, each is asked once."""
    outermost = not _answers
    answers = _answers[0] if _answers else {}
    if outermost:
        _answers.append(answers)
    try:
        if key not in answers:
            answers[key] = answer()
        found: T = answers[key]
        return found
    finally:
        if outermost:
            _answers.clear()


def seconds_of(manifest: Mapping[str, Any]) -> float:
    """How long the step took, killed runs counted."""
    timings = manifest.get("timings", {})
    return float(timings.get("seconds", 0.0) + timings.get(BEFORE, 0.0))


def own(directory: Path) -> list[Path]:
    """What lies in a step's directory, without subdirectories that are steps of their own."""
    if not directory.is_dir():
        return []
    return [
        path
        for path in sorted(directory.iterdir())
        if path.suffix != LOCK and not any((path / name).exists() for name in (MANIFEST, STARTED))
    ]


def outputs(directory: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file at, or below, these paths of a directory."""
    return {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": fresh_digest(file)}
        for path in paths
        for file in sorted(path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
    }


def damaged(directory: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with files that were written. Contents are read again only where a file's size or times changed."""
    found = {}
    for name, written in manifest.get("outputs", {}).items():
        file = directory / name
        if name in manifest.get(FREED, ()):
            continue
        if not file.is_file():
            found[name] = "is missing"
        elif file.stat().st_size != written["bytes"]:
            found[name] = "is not of the size that was written"
        elif known_digest(file) != written["sha256"]:
            found[name] = "is not what was written (its checksum differs)"
    return found


def which_device(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of device among settings, `cuda` of `cuda:1`: results do not depend on which of its kind it is."""
    device = settings.get("device")
    return {"device": device.partition(":")[0]} if isinstance(device, str) else {}
