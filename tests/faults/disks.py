"""Disks that are full, files that may not grow, directories that cannot be written to."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from faults.place import LOST, Fault, Place
from fusechat.recipe.schema import STAGES

ROOM = "size=200m"
PAD_INDEX = 65534
PAGE = 4096


def can_mount() -> bool:
    """Whether this user may mount a file system; most may not."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def _refused(place: Place, fault: Fault, workdir: Path, launch: str, named: Path, before: object = None) -> bool:
    """Whether a run stopped as it should: with status 2 and an error that names the place. Otherwise something is lost, unless
    it went through."""
    run = place.run(workdir, launch, before=before)
    if run.done:
        return False
    done = [stage for stage in STAGES if (workdir / stage).is_dir()]
    fault.stage = done[-1] if done else fault.stage
    if any(str(named) in line for line in run.errors()):
        fault.what += f": {'; '.join(run.errors())}"
        return True
    place.note(fault, LOST, run.end())
    return False


def full(place: Place, launch: str, times: int, stages: Sequence[str] = STAGES) -> None:
    """A disk with less room than a stage needs, so many times for each stage; then it is given enough."""
    for stage in stages:
        files = [file for file in (place.references[launch].workdir / stage).rglob("*") if file.is_file()]
        needed = sum(-(-file.stat().st_size // PAGE) for file in files)
        for number in range(times):
            chance = place.chance("full", launch, stage, number)
            room = chance.randint(1, max(1, int(needed * 0.9))) * PAGE
            fault = Fault("disk full", launch, stage, f"room of {room:,} bytes before {stage}")
            with mounted(place.scratch / "disk", ROOM) as disk:
                workdir = _begun(place, launch, disk / "work", STAGES.index(stage))
                remount(disk, f"size={_used(disk) + room}")
                if _refused(place, fault, workdir, launch, disk):
                    remount(disk, ROOM)
                    place.judge(fault, workdir, launch)


def _used(disk: Path) -> int:
    state = os.statvfs(disk)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def limited(place: Place, launch: str, count: int) -> None:
    """No file may pass so many bytes, as a quota has it."""
    largest = max(file.stat().st_size for file in place.references[launch].workdir.rglob("*") if file.is_file())
    for number in range(count):
        limit = round(8000 * (largest / 8000) ** ((number + 0.5) / count))
        workdir = place.scratch / f"limited-{number}"
        fault = Fault("files limited", launch, STAGES[0], f"files of {limit:,} bytes at most")

        def before(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        if _refused(place, fault, workdir, launch, workdir, before):
            place.judge(fault, workdir, launch)
        shutil.rmtree(workdir, ignore_errors=True)


def read_only(place: Place, launch: str) -> None:
    """A file system that is read-only when a run begins, from each stage on; then it is writable again."""
    for index, stage in enumerate(STAGES):
        fault = Fault("work directory read-only", launch, stage, f"a disk, before {stage}")
        with mounted(place.scratch / "disk", ROOM) as disk:
            workdir = _begun(place, launch, disk / "work", index)
            remount(disk, "ro")
            refused = _refused(place, fault, workdir, launch, disk)
            remount(disk, "rw")
            if refused:
                fault.stage = stage
                place.judge(fault, workdir, launch)


def forbidden(place: Place, launch: str) -> None:
    """A work directory of another user, from each stage on; then its owner runs."""
    cache = place.scratch / "cache-of-nobody"
    cache.mkdir()
    cache.chmod(0o777)

    def before() -> None:
        os.environ["FUSECHAT_CACHE"] = str(cache)
        os.setgroups([])
        os.setgid(PAD_INDEX)
        os.setuid(PAD_INDEX)

    for index, stage in enumerate(STAGES):
        fault = Fault("work directory read-only", launch, stage, f"another user's, before {stage}")
        workdir = _begun(place, launch, place.scratch / "forbidden", index)
        if _refused(place, fault, workdir, launch, workdir, before):
            fault.stage = stage
            place.judge(fault, workdir, launch)
        shutil.rmtree(workdir)


def cache(place: Place, launch: str) -> None:
    """A cache that is read-only, or on a disk that is full; then it is neither."""
    for what, options in (("read-only", "ro"), ("full", "size=32k")):
        fault = Fault(f"cache {what}", launch, "", f"a disk, {options}")
        workdir = place.scratch / "work-without-cache"
        with mounted(place.scratch / "disk", options) as disk:

            def before(disk: Path = disk) -> None:
                os.environ["FUSECHAT_CACHE"] = str(disk / "cache")

            if _refused(place, fault, workdir, launch, disk, before):
                place.judge(fault, workdir, launch)
        shutil.rmtree(workdir, ignore_errors=True)


def _begun(place: Place, launch: str, workdir: Path, stages: int) -> Path:
    """A work directory in which so many stages are done."""
    shutil.copytree(place.references[launch].workdir, workdir)
    for stage in STAGES[stages:]:
        shutil.rmtree(workdir / stage)
    return workdir
