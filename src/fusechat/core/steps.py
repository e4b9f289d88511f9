"""A step is one unit of work with a directory of its own: done once, skipped when nothing that it depends on changed.

Its fingerprint is a hash of its settings and of its upstream steps' fingerprints, so that the fingerprints of a whole
pipeline are known before anything runs. `manifest.json` is the last file written; `started.json` marks a directory in
which a run with the same fingerprint may go on where a killed one stopped.
"""

import fnmatch
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from fusechat.core import ranks
from fusechat.core.cache import fresh_digest, known_digest
from fusechat.core.files import digest_json, read_json, remove_partial, write_json
from fusechat.core.lock import in_turn, is_held
from fusechat.core.manifests import difference, versions
from fusechat.core.progress import log
from fusechat.core.seals import read_checked, write_checked
from fusechat.core.usage import watch
from fusechat.errors import naming_storage

MANIFEST, STARTED, LOCK = "manifest.json", "started.json", ".lock"
SEALED = "sealed.json"  # what `work` wrote and a killed run may go on from: see `seals.py`
FREED = "freed"  # a manifest's key: the files that were cleared away since
State = Literal["done", "freed", "partial", "stale", "damaged", "absent"]


@dataclass(frozen=True)
class Step:
    """`work(directory)` writes the artifacts and returns the counts for the manifest.

    `format` is raised whenever the meaning or layout of the artifacts changes, so that older ones become stale. With
    `whole_files` every file stands for itself: of a damaged step the sound ones are kept, and `work` makes the others again.
    `parts`: files that rest on the settings and on some of the upstream steps only, which are named; of a stale step those are
    kept for which that is as it was, and `work` makes the others.
    A step with `join` is shared by all processes: each calls `work`, and `join` makes one of the counts that they return.
    `bulk`: the pattern of files that a finished run can do without; `reads_bulk`: whether `work` reads those of its upstream
    steps, which are then made again before.
    """

    stage: str
    name: str
    directory: Path
    settings: Mapping[str, Any]
    work: Callable[[Path], dict[str, Any]]
    upstream: Mapping[str, "Step"] = field(default_factory=dict)
    format: int = 1
    whole_files: bool = False
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)
    join: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    bulk: str = ""
    reads_bulk: bool = True

    @property
    def label(self) -> str:
        return f"{self.stage} {self.name}".strip()

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "settings": dict(self.settings),
            "upstream": {key: step.fingerprint for key, step in self.upstream.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        return digest_json({"stage": self.stage, **self.inputs})

    def manifest(self) -> dict[str, Any] | None:
        return read_checked(self.directory / MANIFEST)

    def state(self) -> tuple[State, str]:
        """Where the step stands, and why."""
        manifest = self.manifest()
        if manifest is None:
            if self._started() == self.fingerprint:
                return "partial", "begun, not finished"
            return "absent", "not begun"
        if manifest.get("fingerprint") != self.fingerprint:
            return "stale", difference(manifest.get("inputs", {}), self.inputs)
        damaged = self._damaged(manifest)
        if damaged:
            name, what = next(iter(damaged.items()))
            return "damaged", f"{name} {what}" + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        built_from = manifest.get("built_from", {})
        for key, contents in self._upstream_contents().items():
            if contents is not None and contents != built_from.get(key):
                return "stale", f"{self.upstream[key].label} was made again and came out different"
        if manifest.get(FREED):
            return "freed", "done, its files cleared away; they are made again if a step needs them"
        return "done", ""

    @property
    def finished(self) -> bool:
        """Whether there is nothing to do: its files are there, or were and nothing needs them."""
        return self.state()[0] in ("done", "freed")

    def _damaged(self, manifest: dict[str, Any]) -> dict[str, str]:
        """What is wrong with files that were written. Contents are read again only where a file's size or times changed."""
        found = {}
        for name, written in manifest.get("outputs", {}).items():
            file = self.directory / name
            if name in manifest.get(FREED, ()):
                continue
            if not file.is_file():
                found[name] = "is missing"
            elif file.stat().st_size != written["bytes"]:
                found[name] = "is not of the size that was written"
            elif known_digest(file) != written["sha256"]:
                found[name] = "is not what was written (its checksum differs)"
        return found

    def _upstream_contents(self) -> dict[str, str | None]:
        """A digest of what each upstream step wrote, None where it is not finished. With one fingerprint contents may still
        differ: a GPU does not give the same bits twice."""
        manifests = {key: step.manifest() for key, step in self.upstream.items()}
        return {key: digest_json(found.get("outputs")) if found else None for key, found in manifests.items()}

    def run(self, *, needed: bool = False) -> bool:
        """Does the work unless it is done; returns whether there was anything to do. `needed`: its files are, cleared away or
        not."""
        if ranks.from_first(lambda: self._settled(needed)):
            return False
        with ExitStack() as held:
            ranks.from_first(lambda: self._enter(held))
            return self._run(needed)

    def _run(self, needed: bool) -> bool:
        if not ranks.from_first(lambda: self._begin(needed)):  # another process may have done it meanwhile
            return False
        for above in self.upstream.values() if self.reads_bulk else ():
            if ranks.from_first(partial(bool, above.freed)):
                above.run(needed=True)
        began, peaks = time.monotonic(), watch()
        counts = self.join(ranks.gather(self._work())) if self.join is not None else ranks.from_first(self._work)
        timings = {"seconds": round(time.monotonic() - began, 3), **peaks()}  # of the last, completing run
        ranks.from_first(lambda: self._finish(counts, timings))
        return True

    def _work(self) -> dict[str, Any]:
        with naming_storage(self.directory):
            return self.work(self.directory)

    def _settled(self, needed: bool) -> bool:
        state = self.state()[0]
        if state == "done" or (state == "freed" and not needed):
            self._forget_start()
            return True
        return False

    def _enter(self, held: ExitStack) -> None:
        """One process at a time does a step; another one that comes to it waits."""
        held.enter_context(in_turn(self._lock, self.label))

    @property
    def _lock(self) -> Path:
        return self.directory.with_name(f".{self.directory.name}{LOCK}")

    @property
    def running(self) -> bool:
        """Whether a process does it now."""
        return is_held(self._lock)

    def _begin(self, needed: bool) -> bool:
        """Whether there is work to do; if so, leaves in the directory what it can go on from."""
        if self._settled(needed):
            return False
        state, why = self.state()
        if state in ("stale", "damaged", "freed"):
            log.info("%s is %s (%s): doing it again", self.label, state, why)
        if state == "damaged" and self.whole_files:
            for name in self._damaged(self.manifest() or {}):
                (self.directory / name).unlink(missing_ok=True)
        elif state != "partial":
            self._clear(spare=self._unchanged() if state == "stale" else ())
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_partial(self.directory)
        write_json(self.directory / STARTED, {"fingerprint": self.fingerprint})
        (self.directory / MANIFEST).unlink(missing_ok=True)
        return True

    @property
    def freed(self) -> list[str]:
        """Names of files that were cleared away."""
        return list((self.manifest() or {}).get(FREED, ()))

    def bulk_files(self) -> dict[str, int]:
        """Names and sizes of the files that can go and are there."""
        names = fnmatch.filter((self.manifest() or {}).get("outputs", ()), self.bulk)
        return {name: file.stat().st_size for name in names if (file := self.directory / name).is_file()}

    def free(self) -> None:
        """Removes these of a finished step. Its manifest says so before a file goes."""
        names, manifest = self.bulk_files(), self.manifest() or {}
        write_checked(self.directory / MANIFEST, {**manifest, FREED: sorted({*names, *manifest.get(FREED, ())})})
        for name in names:
            (self.directory / name).unlink(missing_ok=True)

    def redo(self) -> None:
        """Does the work again, done or not."""
        ranks.from_first(lambda: (self.directory / MANIFEST).unlink(missing_ok=True))
        self.run()

    def _finish(self, counts: dict[str, Any], timings: dict[str, float]) -> None:
        outputs = {
            str(file.relative_to(self.directory)): {"bytes": file.stat().st_size, "sha256": fresh_digest(file)}
            for own in self._own()
            for file in sorted(own.rglob("*") if own.is_dir() else [own])
            if file.is_file() and file.name not in (MANIFEST, STARTED, SEALED)
        }
        write_checked(
            self.directory / MANIFEST,
            {
                "stage": self.stage,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "inputs": self.inputs,
                "built_from": self._upstream_contents(),
                "versions": versions(),
                "counts": counts,
                "outputs": outputs,
                "timings": timings,
            },
        )
        self._forget_start()

    def _forget_start(self) -> None:
        for name in (STARTED, SEALED):
            (self.directory / name).unlink(missing_ok=True)

    def _own(self) -> list[Path]:
        """What lies in the directory, without subdirectories that are steps of their own."""
        if not self.directory.is_dir():
            return []
        return [
            path
            for path in sorted(self.directory.iterdir())
            if path.suffix != LOCK and not any((path / n).exists() for n in (MANIFEST, STARTED))
        ]

    def _unchanged(self) -> list[str]:
        """Which `parts` of an earlier run are what they would become again."""
        earlier = self.manifest() or {}
        before, now = earlier.get("inputs", {}), self.inputs
        if any(before.get(key) != now[key] for key in ("format", "settings")):
            return []
        built, contents = earlier.get("built_from", {}), self._upstream_contents()
        same = {
            key
            for key, found in now["upstream"].items()
            if before["upstream"].get(key) == found and built.get(key) == contents[key]
        }
        sound = earlier.get("outputs", {}).keys() - self._damaged(earlier).keys()
        return [name for name, rests_on in self.parts.items() if name in sound and same.issuperset(rests_on)]

    def _clear(self, spare: Collection[str] = ()) -> None:
        for path in self._own():
            if path.name in spare:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _started(self) -> str | None:
        try:
            return str(read_json(self.directory / STARTED)["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def with_upstream(steps: list[Step]) -> Iterator[Step]:
    """`steps` and all that they depend on, upstream first, each once."""
    seen: set[Path] = set()

    def visit(step: Step) -> Iterator[Step]:
        if step.directory in seen:
            return
        seen.add(step.directory)
        for above in step.upstream.values():
            yield from visit(above)
        yield step

    for step in steps:
        yield from visit(step)
