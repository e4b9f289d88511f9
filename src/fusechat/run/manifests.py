"""The manifest of a step: its files and whether they are unchanged, versions, time, and differences of inputs."""

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from fusechat.run.cache import fresh_digest, known_digest
from fusechat.run.unfinished import STARTED

MANIFEST, LOCK = "manifest.json", ".lock"
FREED = "freed"  # a key: files that were deleted since
BEFORE = "seconds_before"  # a key of timings: time of killed runs

T = TypeVar("T")
_answers: list[dict[Any, Any]] = []  # of the outermost call
_VERSIONS = ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors", "accelerate")


def versions(*more: str) -> dict[str, str]:
    """Versions of this package and of those that results depend on, and of `more`."""
    found = {}
    for name in (*_VERSIONS, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def difference(old: Any, new: Any, path: str = "") -> str:
    """The first few keys in which two manifests' inputs differ, as text."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{path} changed"
    found = []
    for key in [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)][:4]:
        name = f"{path}.{key}".lstrip(".")
        one_sided = "" if key in old and key in new else "is new" if key in new else "is gone"
        found.append(f"{name} {one_sided}" if one_sided else difference(old[key], new[key], name))
    return "; ".join(found)


def asked_once(key: Any, answer: Callable[[], T]) -> T:
    """Caches `answer()` by `key` during the outermost call, because a step's state asks its upstream steps repeatedly."""
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
    """Seconds that the step took, killed runs included."""
    timings = manifest.get("timings", {})
    return float(timings.get("seconds", 0.0) + timings.get(BEFORE, 0.0))


def own(directory: Path) -> list[Path]:
    """The entries of a step's directory, without subdirectories of other steps."""
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
    """What is wrong with written files, by name. Reads contents only if a file's size or times changed."""
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
    """The kind of device in settings, `cuda` for `cuda:1`: results do not depend on the number."""
    device = settings.get("device")
    return {"device": device.partition(":")[0]} if isinstance(device, str) else {}
