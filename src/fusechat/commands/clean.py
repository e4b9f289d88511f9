"""Deletes what a finished run no longer needs: distributions of capture and align, checkpoints, and directories of steps that
the recipe no longer has. Models, results and the report stay, and the run stays finished; distributions are made again if
needed."""

import fnmatch
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusechat.commands.run import lock
from fusechat.errors import WorkdirError
from fusechat.pipeline import build_steps
from fusechat.recipe.pinned import recipe_of
from fusechat.run.integrity import write_checked
from fusechat.run.steps import FREED, MANIFEST, STARTED, Step

STAGES = ("capture", "align", "rounds")  # stages with large files that only fine-tuning needs


@dataclass(frozen=True)
class Part:
    """Something that can be deleted. `size`: in bytes."""

    label: str
    size: int
    remove: Callable[[], None]


def parts(workdir: Path) -> list[Part]:
    """All that can be deleted. Raises WorkdirError if the run is not finished."""
    steps = build_steps(recipe_of(workdir), workdir)
    for step in steps:
        if not step.finished:
            raise WorkdirError(f"{workdir}: not finished: {step.label} is {step.state()[0]}; run the recipe first")
    found = [Part(step.label, sum(_bulk(step).values()), partial(_free, step)) for step in steps]
    left = [*_left_over(workdir, steps), *_checkpoints(workdir)]
    found += [
        Part(f"{path.relative_to(workdir)} (left over)", _size(path), partial(shutil.rmtree, path)) for path in left
    ]
    return [part for part in found if part.size]


def _bulk(step: Step) -> dict[str, int]:
    """Names and sizes of existing files that can be deleted."""
    names = fnmatch.filter((step.manifest() or {}).get("outputs", ()), step.bulk)
    return {name: file.stat().st_size for name in names if (file := step.directory / name).is_file()}


def _free(step: Step) -> None:
    """Deletes these files of a finished step, after noting them in its manifest."""
    names, manifest = _bulk(step), step.manifest() or {}
    write_checked(step.directory / MANIFEST, {**manifest, FREED: sorted({*names, *manifest.get(FREED, ())})})
    for name in names:
        (step.directory / name).unlink(missing_ok=True)


def _checkpoints(workdir: Path) -> list[Path]:
    """Of trainings that a killed run finished."""
    return sorted([*(workdir / "fuse").glob("*/checkpoints"), *(workdir / "rounds").glob("*/*/trained/checkpoints")])


def _left_over(workdir: Path, steps: list[Step]) -> Iterator[Path]:
    """Directories of steps that the recipe no longer has, or of other commands."""
    own = {step.directory for step in steps}
    for stage in STAGES:
        for name in (MANIFEST, STARTED):
            for file in sorted((workdir / stage).rglob(name)):
                if file.parent not in own and not any(each.is_relative_to(file.parent) for each in own):
                    yield file.parent


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def summary(found: list[Part]) -> list[str]:
    """What can be deleted and its size, a line each."""
    if not found:
        return ["there is nothing to free"]
    rows = [(f"{part.size / 1e6:,.1f} MB", part.label) for part in found]
    rows.append((f"{sum(part.size for part in found) / 1e6:,.1f} MB", "in all"))
    width = max(len(size) for size, _ in rows)
    return [f"{size:>{width}}  {label}" for size, label in rows]


def free(workdir: Path) -> None:
    """Deletes all of it. Raises WorkdirError while a run uses the work directory."""
    with lock(recipe_of(workdir), workdir):
        for part in parts(workdir):
            part.remove()
