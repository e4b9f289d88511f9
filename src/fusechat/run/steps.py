"""A step is one unit of work with a directory of its own: done once, skipped when nothing that it depends on changed.

Its fingerprint is a hash of the settings that count and of its upstream steps' fingerprints, so that the fingerprints of a whole
pipeline are known before anything runs. `manifest.json` is the last file written; `started.json` marks a directory in
which a run with the same fingerprint, and with the same files above it, may continue where a killed one stopped.
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
SEALED = "sealed.json"  # what `work` wrote and a killed run may continue from: see `seals.py`
State = Literal["done", "freed", "partial", "stale", "damaged", "absent"]


@dataclass(frozen=True)
class Step:
    """`work(directory)` writes the artifacts and returns the counts for the manifest.

    `counted` picks from the settings those that results depend on; by the others nothing becomes stale.
    `format` is raised whenever the meaning or layout of the artifacts changes, so that older ones become stale. With
    `whole_files` every file stands for itself: of a damaged step the sound ones are kept, and `work` makes the others again.
    `parts`: files that depend on the settings and on some of the upstream steps only, which are named; of a stale step those are
    kept for which that is as it was, and `work` makes the others.
    A step with `join` is shared by all processes: each calls `work`, and `join` makes one of the counts that they return.
    `bulk`: the pattern of files that a finished run can do without; `reads_bulk`: whether `work` reads those of its upstream
    steps, which are then made again before; where not, it reads their manifests, and is stale when those are of another run.
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
        return {
            "format": self.format,
            "settings": dict(self.settings),
            "upstream": {key: step.fingerprint for key, step in self.upstream.items()},
        }

    @cached_property
    def _counting(self) -> dict[str, Any]:
        """The inputs that count, as JSON gives them back."""
        counting = {**self.inputs, "settings": dict(self.counted(self.settings))}
        return dict(json.loads(json.dumps(counting, allow_nan=False)))

    @cached_property
    def fingerprint(self) -> str:
        return digest_json({"stage": self.stage, **self._counting})

    def manifest(self) -> dict[str, Any] | None:
        return read_checked(self.directory / MANIFEST)

    def state(self) -> tuple[State, str]:
        """Where the step stands, and why."""
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
        """Where a step stands that is not finished."""
        found = beginning(self.directory)
        if found is None:
            return "absent", "its manifest is damaged" if (self.directory / MANIFEST).exists() else "not begun"
        old = "inputs" not in found  # of a version that wrote down the fingerprint alone
        why = "" if old and found.get("fingerprint") == self.fingerprint else self._changed(found)
        return ("absent", f"begun, not finished; since then {why}") if why else ("partial", "begun, not finished")

    def _changed(self, earlier: Mapping[str, Any]) -> str:
        """What is another now than what a manifest, or a beginning, was made of; nothing where all that counts is as it was."""
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
        """The inputs of a manifest, or a beginning, maybe of another version, with the settings that count today, and with today's
        fingerprints of upstream steps that are what they were, or that were done again and wrote the same files."""
        inputs, built = earlier.get("inputs", {}), earlier.get("built_from", {})
        above = dict(inputs.get("upstream", {}))
        above |= {
            key: step.fingerprint
            for key, step in self.upstream.items()
            if step.is_known_as(above.get(key)) or (self.reads_bulk and key in above and step.wrote(built.get(key)))
        }
        return {**inputs, "settings": dict(self.counted(inputs.get("settings", {}))), "upstream": above}

    def is_known_as(self, fingerprint: str | None) -> bool:
        """Whether that is, or was when it was made, the fingerprint of what this step is today."""
        manifest = self.manifest() if fingerprint != self.fingerprint else None
        if manifest is None or manifest.get("fingerprint") != fingerprint:
            return fingerprint == self.fingerprint
        key = self.directory, self.fingerprint, "known"
        return asked_once(key, lambda: not difference(self._as_now(manifest), self._counting))

    def wrote(self, contents: str | None) -> bool:
        """Whether the step is finished, and that is the digest of its files."""
        return contents is not None and self._contents(self.manifest()) == contents and self.finished

    @property
    def finished(self) -> bool:
        """Whether there is nothing to do: its files are there, or were and nothing needs them."""
        return self.state()[0] in ("done", "freed")

    def _upstream_contents(self) -> dict[str, str | None]:
        """A digest of what each upstream step wrote, None where it is not finished. With one fingerprint contents may still
        differ: a GPU does not give the same bits twice."""
        return {key: self._contents(step.manifest()) for key, step in self.upstream.items()}

    @staticmethod
    def _contents(manifest: Mapping[str, Any] | None) -> str | None:
        return digest_json(manifest.get("outputs")) if manifest else None

    def run(self, *, needed: bool = False) -> bool:
        """Does the work unless it is done; returns whether there was anything to do. `needed`: its files are, cleared away or
        not."""
        if ranks.from_first(lambda: self._settled(needed)):
            return False
        with ExitStack() as held:
            ranks.from_first(lambda: held.enter_context(wait_for_lock(self._lock, self.label)))  # another one waits
            return self._run(needed)

    def _run(self, needed: bool) -> bool:
        if ranks.from_first(lambda: self._settled(needed)):  # another process may have done it meanwhile
            return False
        for above in self.upstream.values() if self.reads_bulk else ():
            if ranks.from_first(partial(bool, above.freed)):
                above.run(needed=True)
        ranks.from_first(self._begin)
        began, peaks = time.monotonic(), watch()
        work = naming_storage(self.directory)(partial(self.work, self.directory))
        counts = self.join(ranks.gather(work())) if self.join is not None else ranks.from_first(work)
        timings = {"seconds": round(time.monotonic() - began, 3), **peaks()}  # of the last, completing run
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
        """Whether a process does it now."""
        return is_held(self._lock)

    def _begin(self) -> None:
        """Leaves in the directory what the work can continue from, and says what it does not leave."""
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
        """Names of files that were cleared away."""
        return list((self.manifest() or {}).get(FREED, ()))

    def redo(self) -> None:
        """Does the work again, done or not."""
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
                "built_from": began.get("built_from", {}),  # not what is there by now
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
        """Which `parts` of an earlier run are what they would become again."""
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
        """Empties the directory but for the parts that stay as they are, and says what goes, how long it took, and why."""
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
