"""`started.json`: with what a step was begun and how long it was worked on, for a run that continues there or has to start again.

Its keys: `fingerprint`, `inputs`, `built_from` and `versions` as a manifest has them; `spent`, seconds of the runs before this one;
`began`, when this one came to it (of the epoch). Of older versions `fingerprint` alone.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusechat.run.integrity import read_checked, write_checked
from fusechat.run.progress import in_bytes, in_time, log

STARTED = "started.json"


def begin(directory: Path, *, spent: float, versions: Mapping[str, str], **content: Any) -> None:
    """Writes down what a step is begun with: the keys above. Of one that continues, tells which versions are others now."""
    before = (beginning(directory) or {}).get("versions", versions)
    others = [f"{name} {before[name]} → {now}" for name, now in versions.items() if before.get(name, now) != now]
    if others:
        log.warning("%s: continues with other versions than it was begun with: %s", directory, ", ".join(others))
    content["versions"] = dict(before)
    write_checked(directory / STARTED, {**content, "spent": round(spent, 3), "began": time.time()})


def beginning(directory: Path) -> dict[str, Any] | None:
    """What was written down; None where nothing is begun."""
    return read_checked(directory / STARTED)


def seconds_spent(found: Mapping[str, Any], paths: Iterable[Path]) -> float:
    """Seconds of work in a step that is begun and not finished: of a run that was killed, up to the last of its files."""
    if "began" not in found:
        return 0.0
    last = max((file.stat().st_mtime for file in _files(paths) if file.name != STARTED), default=0.0)
    return float(found["spent"]) + max(0.0, last - float(found["began"]))


def lost(paths: Iterable[Path], seconds: float) -> str:
    """What goes with these files and directories, and how long it took: `checkpoints, model (1.3 GB, of 2 h 5 min)`."""
    paths = list(paths)
    names = [path.name for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    size = in_bytes(sum(file.stat().st_size for file in _files(paths)))
    return f"{', '.join(names[:3] if more else names)}{more} ({size}, of {in_time(seconds)})"


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
