"""`started.json`: the inputs of an unfinished step and the time spent on it, for a run that resumes it or starts again.

Keys: `fingerprint`, `inputs`, `built_from` and `versions` as in a manifest; `spent`, seconds of earlier runs; `began`, the time
when this run reached it (seconds since the epoch). Older versions wrote `fingerprint` only.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusechat.run.integrity import read_checked, write_checked
from fusechat.run.progress import in_bytes, in_time, log

STARTED = "started.json"


def begin(directory: Path, *, spent: float, versions: Mapping[str, str], **content: Any) -> None:
    """Writes these keys. If the step resumes, logs which versions differ."""
    before = (beginning(directory) or {}).get("versions", versions)
    others = [f"{name} {before[name]} → {now}" for name, now in versions.items() if before.get(name, now) != now]
    if others:
        log.warning("%s: resumes with other versions than it began with: %s", directory, ", ".join(others))
    content["versions"] = dict(before)
    write_checked(directory / STARTED, {**content, "spent": round(spent, 3), "began": time.time()})


def beginning(directory: Path) -> dict[str, Any] | None:
    """The content of the file, or None."""
    return read_checked(directory / STARTED)


def seconds_spent(found: Mapping[str, Any], paths: Iterable[Path]) -> float:
    """Seconds of work in an unfinished step; of a killed run, until its last file."""
    if "began" not in found:
        return 0.0
    last = max((file.stat().st_mtime for file in _files(paths) if file.name != STARTED), default=0.0)
    return float(found["spent"]) + max(0.0, last - float(found["began"]))


def lost(paths: Iterable[Path], seconds: float) -> str:
    """What is lost with these paths, and how long it took: `checkpoints, model (1.3 GB, of 2 h 5 min)`."""
    paths = list(paths)
    names = [path.name for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    size = in_bytes(sum(file.stat().st_size for file in _files(paths)))
    return f"{', '.join(names[:3] if more else names)}{more} ({size}, of {in_time(seconds)})"


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
