"""Files that are altered, cut short, filled with zeros or removed: of finished runs, of killed ones, and in the cache."""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.children import At, start
from faults.place import LAUNCHES, LOST, SAME, Fault, Place
from fusechat.recipe.schema import STAGES
from fusechat.run import cache
from fusechat.run.files import seen
from fusechat.run.integrity import read_sealed, write_sealed

FLIP, CUT, ZEROS = "a byte flipped", "cut short", "zeros from a point on"
HOW = (FLIP, CUT, ZEROS)


def harm(file: Path, how: str, chance: random.Random, *, keep_time: bool = False) -> str:
    """Alters the bytes of a file, always; with `keep_time` its time of change is put back. Says what it did."""
    before, data = file.stat(), bytearray(file.read_bytes())
    place = chance.randrange(len(data)) if data else 0
    if not data:
        data += b"\0"
    elif how == CUT:
        del data[place:]
    elif how == ZEROS and any(data[place:]):
        data[place:] = bytes(len(data) - place)
    else:
        data[place] ^= chance.randint(1, 255)
    file.write_bytes(data)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{how} at byte {place} of {before.st_size}" + (", time put back" if keep_time else "")


def kinds(workdir: Path) -> dict[str, list[Path]]:
    """The files of a work directory by what they are: `fuse/model/config.json` has one of each target."""
    found: dict[str, list[Path]] = {}
    for file in sorted(workdir.rglob("*")):
        if file.is_file():
            parts = file.relative_to(workdir).parts
            name = re.sub(r"\d{5}-[0-9a-f]{16}", "*", "/".join((*(["model"] if "model" in parts else []), parts[-1])))
            found.setdefault(f"{parts[0]}/{name}" if len(parts) > 1 else name, []).append(file)
    return found


def ways_to(path: Path, workdir: Path) -> tuple[Path, ...]:
    """A file and the directories above it: what an error may name, and the user may delete."""
    return (path, *(above for above in path.parents if above.is_relative_to(workdir) and above != workdir))


def finished(place: Place, launch: str, *, most: int | None = None) -> None:
    """Files of every kind in a run that is done, in every way; what is remembered of them is as fresh as it can be."""
    ways = [(how, keep) for how in HOW for keep in ((False,) if how == CUT else (False, True))]
    every = [(kind, *way) for kind in kinds(place.references[launch].workdir) for way in ways]
    chance = place.chance("finished", launch)
    _one_by_one(place, launch, "altered when done", _some(every, most, chance), _harm_kind(chance))


def _harm_kind(chance: random.Random) -> Callable[..., tuple[Path, str]]:
    def do(workdir: Path, kind: str, how: str, keep: bool) -> tuple[Path, str]:
        file = chance.choice(kinds(workdir)[kind])
        return file, harm(file, how, chance, keep_time=keep)

    return do


def removed(place: Place, launch: str, *, most: int | None = None) -> None:
    """A file of every kind, and every directory, is gone."""
    workdir, chance = place.references[launch].workdir, place.chance("removed", launch)
    every: list[tuple[str, ...]] = [(kind,) for kind in kinds(workdir)]
    every += [(str(path.relative_to(workdir)) + "/",) for path in sorted(workdir.rglob("*")) if path.is_dir()]

    def do(workdir: Path, name: str) -> tuple[Path, str]:
        if name.endswith("/"):
            shutil.rmtree(workdir / name)
            return workdir / name, "removed"
        file = chance.choice(kinds(workdir)[name])
        file.unlink()
        return file, "removed"

    _one_by_one(place, launch, "removed", _some(every, most, chance), do)


def _one_by_one(
    place: Place,
    launch: str,
    what: str,
    every: list[tuple[str, ...]],
    do: Callable[..., tuple[Path, str]],
) -> None:
    """Does one thing to a finished run and runs it again, over and over in one directory as long as all is whole again."""
    workdir = place.scratch / f"{what.replace(' ', '-')}-{LAUNCHES[launch]}"
    whole = False
    for arguments in every:
        if not whole:
            shutil.rmtree(workdir, ignore_errors=True)
            place.copy(launch, workdir.name)
            place.run(workdir, launch)
        path, done = do(workdir, *arguments)
        name = path.relative_to(workdir)
        fault = Fault(what, launch, _stage(name), f"{name}: {done}")
        whole = place.judge(fault, workdir, launch, ways_to(path, workdir)) == SAME and not fault.others
    shutil.rmtree(workdir, ignore_errors=True)


def unfinished(place: Place, launch: str, stage: str, times: int) -> None:
    """A run is killed in a stage; then a file that the next one may continue from is altered, or removed."""
    workdir = place.scratch / f"unfinished-{LAUNCHES[launch]}"
    last = place.references[launch].operations[0][stage]
    for number in range(times):
        chance = place.chance("unfinished", launch, stage, number)
        shutil.rmtree(workdir, ignore_errors=True)
        place.copy(launch, workdir.name)
        for later in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(workdir / later)
        at = At(stage, chance.randint(max(1, last - 12) if number % 2 else 1, last))  # half of them near the end
        if not place.run(workdir, launch, at=at).killed:
            continue
        files = list(_loose(workdir, stage))
        if not files:
            continue
        file, how = chance.choice(files), chance.choice([*HOW, "removed"])
        if how == "removed":
            file.unlink()
        done = how if how == "removed" else harm(file, how, chance, keep_time=chance.random() < 0.5)
        what = f"{file.relative_to(workdir)}: {done}, killed at operation {at.number}"
        place.judge(Fault("altered after a kill", launch, stage, what), workdir, launch, ways_to(file, workdir))
    shutil.rmtree(workdir, ignore_errors=True)


def _loose(workdir: Path, stage: str) -> Iterator[Path]:
    """The files of a stage's steps that are not done."""
    for file in sorted((workdir / stage).rglob("*")):
        steps = [
            above for above in ways_to(file, workdir)[1:] if above != workdir / stage or stage in ("merge", "report")
        ]
        if file.is_file() and not any((above / "manifest.json").is_file() for above in steps):
            yield file


def remembered(place: Place, launch: str, count: int) -> None:
    """Checksums that the cache remembers are altered; nothing may come out different, and nothing but time may be lost."""
    workdir, chance = place.copy(launch, "remembered"), place.chance("remembered", launch)
    place.run(workdir, launch)
    inputs = [*place.scratch.glob("models/*/*"), *place.scratch.glob("*.jsonl")]
    for number in range(count):
        artifacts = [file for file in sorted(workdir.rglob("*")) if file.is_file() and _memo(file).is_file()]
        file = chance.choice(artifacts if number % 2 else [one for one in sorted(inputs) if _memo(one).is_file()])
        done = harm(_memo(file), chance.choice(HOW), chance)
        fault = Fault("cache altered", launch, "", f"what is remembered of {file.relative_to(place.scratch)}: {done}")
        place.judge(fault, workdir, launch)
    shutil.rmtree(workdir)


def unseen(place: Place, launch: str, count: int) -> None:
    """Bytes that a disk gives back different, with size and times as they were. A run with an empty cache reads everything."""
    workdir, chance = place.copy(launch, "unseen"), place.chance("unseen", launch)
    place.run(workdir, launch)
    for number in range(count):
        files = [file for file in sorted(workdir.rglob("*")) if file.is_file() and _memo(file).is_file()]
        file = chance.choice(files)
        name = file.relative_to(workdir)
        done = harm(file, FLIP, chance, keep_time=True)
        write_sealed(_memo(file), {**(read_sealed(_memo(file)) or {}), **seen(file)})
        fault = Fault("altered unseen, empty cache", launch, _stage(name), f"{name}: {done}")
        said, empty = place.scratch / f"unseen-{number}.said", place.scratch / f"empty-{number}"

        def before(empty: Path = empty) -> None:
            os.environ["FUSECHAT_CACHE"] = str(empty)

        status = start(["status", workdir], workdir, said, before=before)
        status.wait()
        run = place.run(workdir, launch, before=before)
        models, others = place.differing(workdir, launch)
        place.note(fault, SAME if run.done and status.done and not models else LOST, run.end(), others)
    shutil.rmtree(workdir)


def _memo(file: Path) -> Path:
    return cache._memo(file.resolve())


def _stage(name: Path) -> str:
    return name.parts[0] if name.parts[0] in STAGES else ""


def _some(every: list[Any], most: int | None, chance: random.Random) -> list[Any]:
    return every if most is None or len(every) <= most else chance.sample(every, most)
