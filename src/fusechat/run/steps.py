"""A step is one unit of work with its own directory, done once and skipped as long as nothing that it depends on changes.

Its fingerprint is a hash of the settings that count and of its upstream steps' fingerprints, so that all fingerprints are known
before anything runs. `manifest.json` is written last; `started.json` marks a directory in which a run with the same fingerprint
and the same upstream files may resume.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from fusechat.errors import naming_storage
from fusechat.run import manifests, ranks
from fusechat.run.files import digest_json, remove, remove_partial
from fusechat.run.integrity import read_checked, write_checked
from fusechat.run.lock import is_held, wait_for_lock
from fusechat.run.manifests import BEFORE, FREED, LOCK, MANIFEST, asked_once, damaged, difference
from fusechat.run.progress import log
from fusechat.run.unfinished import STARTED, begin, beginning, lost, seconds_spent
from fusechat.run.usage import watch

__all__ = ["FREED", "MANIFEST", "SEALED", "STARTED", "Step", "with_upstream"]
SEALED = "sealed.json"  # files that a killed run may resume from: see `integrity.py`
State = Literal["done", "freed", "partial", "stale", "damaged", "absent"]


@dataclass(frozen=True)
class Step:
    """`work(directory)` writes the files of the step and returns the counts for the manifest.

    `counted` selects the settings that results depend on. `format` is raised when the meaning or layout of the files changes, so
    that older ones become stale. `whole_files`: files are independent; a damaged step keeps intact ones, and `work` makes the
    others again. `parts`: files that depend only on the settings and the named upstream steps; a stale step keeps them if these
    are unchanged. With `join` all processes share the step: each calls `work`, and `join` merges their counts. `bulk`: the
    pattern of files that a finished run does not need; `reads_bulk`: `work` reads those of upstream steps, which are made again
    first; else it reads their manifests, and is stale if these are of another run.
    """

    stage: str
    name: str
    directory: Path
    settings: Mapping[str, Any]
    work: Callable[[Path], dict[str, Any]]
    upstream: Mapping[str, "Step"] = field(default_factory=dict)
    format: int = 1
    counted: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
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
        """All that the fingerprint may cover."""
        return {
            "format": self.format,
            "settings": dict(self.settings),
            "upstream": {key: step.fingerprint for key, step in self.upstream.items()},
        }

    @cached_property
    def _counting(self) -> dict[str, Any]:
        """The inputs that count, as read back from JSON."""
        counting = {**self.inputs, "settings": dict(self.counted(self.settings))}
        return dict(json.loads(json.dumps(counting, allow_nan=False)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the inputs that count."""
        return digest_json({"stage": self.stage, **self._counting})

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished step, or None."""
        return read_checked(self.directory / MANIFEST)

    def state(self) -> tuple[State, str]:
        """The step's state, and why."""
        return asked_once((self.directory, self.fingerprint), self._state)

    def _state(self) -> tuple[State, str]:
        manifest = self.manifest()
        if manifest is None:
            return self._begun()
        why = self._changed(manifest)
        if why:
            return "stale", why
        wrong = damaged(self.directory, manifest)
        if wrong:
            name, what = next(iter(wrong.items()))
            return "damaged", f"{name} {what}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        if manifest.get(FREED):
            return "freed", "done, its files cleared away; they are made again if a step needs them"
        return "done", ""

    def _begun(self) -> tuple[State, str]:
        """The state of a step that is not finished."""
        found = beginning(self.directory)
        if found is None:
            return "absent", "its manifest is damaged" if (self.directory / MANIFEST).exists() else "not begun"
        old = "inputs" not in found  # of a version that wrote only the fingerprint
        why = "" if old and found.get("fingerprint") == self.fingerprint else self._changed(found)
        return ("absent", f"begun, not finished; since then {why}") if why else ("partial", "begun, not finished")

    def _changed(self, earlier: Mapping[str, Any]) -> str:
        """What differs from the inputs of a manifest or beginning; empty if nothing that counts does."""
        if earlier.get("fingerprint") != self.fingerprint:
            why = difference(self._as_now(earlier), self._counting)
            if why:
                return why
        built_from = earlier.get("built_from", {})
        for key, contents in self._upstream_contents().items():
            if contents is not None and contents != built_from.get(key):
                return f"{self.upstream[key].label} was made again and came out different"
        return ""

    def _as_now(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a manifest or beginning, maybe of an older version, with the settings that count today, and today's
        fingerprints of upstream steps that are unchanged or wrote the same files again."""
        inputs, built = earlier.get("inputs", {}), earlier.get("built_from", {})
        above = dict(inputs.get("upstream", {}))
        above |= {
            key: step.fingerprint
            for key, step in self.upstream.items()
            if step.is_known_as(above.get(key)) or (self.reads_bulk and key in above and step.wrote(built.get(key)))
        }
        return {**inputs, "settings": dict(self.counted(inputs.get("settings", {}))), "upstream": above}

    def is_known_as(self, fingerprint: str | None) -> bool:
        """Whether `fingerprint` is this step's, or was when it was made."""
        manifest = self.manifest() if fingerprint != self.fingerprint else None
        if manifest is None or manifest.get("fingerprint") != fingerprint:
            return fingerprint == self.fingerprint
        key = self.directory, self.fingerprint, "known"
        return asked_once(key, lambda: not difference(self._as_now(manifest), self._counting))

    def wrote(self, contents: str | None) -> bool:
        """Whether the step is finished and its files have this digest."""
        return contents is not None and self._contents(self.manifest()) == contents and self.finished

    @property
    def finished(self) -> bool:
        """Whether there is nothing to do: its files exist, or were deleted because nothing needs them."""
        return self.state()[0] in ("done", "freed")

    def _upstream_contents(self) -> dict[str, str | None]:
        """A digest of each upstream step's files, None if it is not finished. They may differ with equal fingerprints: a GPU
        does not give the same bits twice."""
        return {key: self._contents(step.manifest()) for key, step in self.upstream.items()}

    @staticmethod
    def _contents(manifest: Mapping[str, Any] | None) -> str | None:
        return digest_json(manifest.get("outputs")) if manifest else None

    def run(self, *, needed: bool = False) -> bool:
        """Does the work unless it is done; returns whether it was needed. `needed`: deleted files are needed too."""
        if ranks.from_first(lambda: self._settled(needed)):
            return False
        with ExitStack() as held:
            ranks.from_first(lambda: held.enter_context(wait_for_lock(self._lock, self.label)))  # another one waits
            return self._run(needed)

    def _run(self, needed: bool) -> bool:
        if ranks.from_first(lambda: self._settled(needed)):  # another process may have done it
            return False
        for above in self.upstream.values() if self.reads_bulk else ():
            if ranks.from_first(partial(bool, above.freed)):
                above.run(needed=True)
        ranks.from_first(self._begin)
        began, peaks = time.monotonic(), watch()
        work = naming_storage(self.directory)(partial(self.work, self.directory))
        counts = self.join(ranks.gather(work())) if self.join is not None else ranks.from_first(work)
        timings = {"seconds": round(time.monotonic() - began, 3), **peaks()}  # of the last run
        ranks.from_first(lambda: self._finish(counts, timings))
        return True

    def _settled(self, needed: bool) -> bool:
        state = self.state()[0]
        if state == "done" or (state == "freed" and not needed):
            self._forget_start()
            return True
        return False

    @property
    def _lock(self) -> Path:
        return self.directory.with_name(f".{self.directory.name}{LOCK}")

    @property
    def running(self) -> bool:
        """Whether a process is running it."""
        return is_held(self._lock)

    def _begin(self) -> None:
        """Keeps what the work can resume from in the directory, and logs what it removes."""
        state, why = self.state()
        manifest, spent = self.manifest() or {}, 0.0
        if state == "partial":
            spent = seconds_spent(beginning(self.directory) or {}, manifests.own(self.directory))
        elif state == "damaged" and self.whole_files:
            log.info("%s is damaged (%s): doing that again", self.label, why)
            spent = manifests.seconds_of(manifest)
            for name in damaged(self.directory, manifest):
                (self.directory / name).unlink(missing_ok=True)
        else:
            self._clear(state, why)
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_partial(self.directory)
        content = {"fingerprint": self.fingerprint, "inputs": self.inputs, "built_from": self._upstream_contents()}
        begin(self.directory, spent=spent, versions=manifests.versions(), **content)
        (self.directory / MANIFEST).unlink(missing_ok=True)

    @property
    def freed(self) -> list[str]:
        """Names of deleted files."""
        return list((self.manifest() or {}).get(FREED, ()))

    def redo(self) -> None:
        """Does the work again."""
        ranks.from_first(lambda: (self.directory / MANIFEST).unlink(missing_ok=True))
        self.run()

    def _finish(self, counts: dict[str, Any], timings: dict[str, float]) -> None:
        began = beginning(self.directory) or {}
        if began.get("spent"):
            timings = {**timings, BEFORE: began["spent"]}
        made = [path for path in manifests.own(self.directory) if path.name not in (MANIFEST, STARTED, SEALED)]
        write_checked(
            self.directory / MANIFEST,
            {
                "stage": self.stage,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "inputs": self.inputs,
                "built_from": began.get("built_from", {}),  # not the current ones
                "versions": manifests.versions(),
                "counts": counts,
                "outputs": manifests.outputs(self.directory, made),
                "timings": timings,
            },
        )
        self._forget_start()

    def _forget_start(self) -> None:
        for name in (STARTED, SEALED):
            (self.directory / name).unlink(missing_ok=True)

    def _unchanged(self) -> list[str]:
        """The `parts` of an earlier run that would stay the same."""
        earlier = self.manifest() or {}
        before, now = self._as_now(earlier), self._counting
        if any(before.get(key) != now[key] for key in ("format", "settings")):
            return []
        built, contents = earlier.get("built_from", {}), self._upstream_contents()
        same = {
            key
            for key, found in now["upstream"].items()
            if before["upstream"].get(key) == found and built.get(key) == contents[key]
        }
        sound = earlier.get("outputs", {}).keys() - damaged(self.directory, earlier).keys()
        return [name for name, rests_on in self.parts.items() if name in sound and same.issuperset(rests_on)]

    def _clear(self, state: State, why: str) -> None:
        """Empties the directory except for unchanged parts, and logs what goes, how long it took, and why."""
        spare = self._unchanged() if state == "stale" else ()
        gone = [path for path in manifests.own(self.directory) if path.name not in spare]
        made = [path for path in gone if path.name not in (MANIFEST, STARTED, SEALED)]
        if why != "not begun":
            manifest, found = self.manifest() or {}, beginning(self.directory) or {}
            seconds = manifests.seconds_of(manifest) or seconds_spent(found, made)
            removed = f"; removed: {lost(made, seconds)}" if made and state != "freed" else ""
            said = "cannot be continued" if state == "absent" else f"is {state}"
            log.info("%s %s (%s): doing it again%s", self.label, said, why, removed)
        for path in gone:
            remove(path)


def with_upstream(steps: list[Step]) -> Iterator[Step]:
    """Yields `steps` and all that they depend on, upstream first, each once."""
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
