"""The main path, to be read first: from a recipe to its steps, in order, skipping what is done.

    conversations ─► prepare ─► capture ─► align ─► fuse ─► merge ─► evaluate ─► report

A step knows its upstream steps, so that its fingerprint changes when anything that it rests on does; see `core/steps.py`.
"""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fusechat.align import stage as align
from fusechat.capture import stage as capture
from fusechat.config import FUSED, PIVOT, STAGES, Recipe
from fusechat.core import ranks
from fusechat.core.chatters import Chatter
from fusechat.core.conversations import DataSet
from fusechat.core.gguf import convert_together
from fusechat.core.lock import only_one
from fusechat.core.progress import log
from fusechat.core.steps import Step, with_upstream
from fusechat.errors import DataError, RecipeError, WorkdirError
from fusechat.evaluate import stage as evaluate
from fusechat.fuse import stage as fuse
from fusechat.merge import stage as merge
from fusechat.prepare import stage as prepare
from fusechat.recipe_file import recipe_identity, save_recipe
from fusechat.report import stage as report

RECIPE, LOCK = "recipe.yaml", ".lock"


def build_steps(recipe: Recipe, workdir: Path) -> list[Step]:
    """Every step of the recipe, upstream first. Raises DataError naming all data files that are not there."""
    held_out = recipe.validation_sets() if recipe.evaluate.bits_per_byte else []
    _check_files([*map(recipe.training_set, recipe.sources), *held_out])
    aligned, targets = {}, {}
    for source in recipe.sources:
        aligned[source], targets[source] = _branch(recipe, workdir, source)
    merged = merge.step(recipe, workdir, targets)
    upstream = {f"align/{name}": step for name, step in aligned.items()}
    upstream |= {f"fuse/{name}": step for name, step in targets.items()}
    upstream["merge"] = merged
    if held_out:
        upstream["evaluate"] = _evaluation(recipe, workdir, held_out, targets, merged)
    steps = with_upstream([report.step(recipe, workdir, upstream)])
    return sorted(steps, key=lambda step: STAGES.index(step.stage))  # stable: upstream stays first


def _branch(recipe: Recipe, workdir: Path, source: str) -> tuple[Step, Step]:
    """The align and the fuse step of one source, and through them all that its branch needs."""
    data = recipe.training_set(source)
    pivot, teacher = recipe.chatter(PIVOT), recipe.chatter(source)
    pivot_prepared = prepare.step(recipe, workdir, pivot, data)
    source_prepared = prepare.step(recipe, workdir, teacher, data)
    pivot_captured = capture.step(recipe, workdir, pivot, pivot_prepared)
    source_captured = capture.step(recipe, workdir, teacher, source_prepared)
    aligned = align.step(
        recipe,
        workdir,
        source,
        pivot_prepared=pivot_prepared,
        pivot_captured=pivot_captured,
        source_prepared=source_prepared,
        source_captured=source_captured,
    )
    upstream = {
        "pivot": pivot_prepared,
        "pivot_capture": pivot_captured,
        "source": source_prepared,
        "source_capture": source_captured,
        "align": aligned,
    }
    return aligned, fuse.step(recipe, workdir, source, upstream)


def _evaluation(recipe: Recipe, workdir: Path, held_out: list[DataSet], targets: dict[str, Step], merged: Step) -> Step:
    """Every model on every held-out set. Sources that are one model with one template are measured once."""

    def prepared(chatter: Chatter) -> dict[str, Step]:
        return {data.name: prepare.step(recipe, workdir, chatter, data) for data in held_out}

    subjects, seen = [], set()
    for name in (PIVOT, *recipe.sources):
        chatter = recipe.chatter(name)
        role = PIVOT if name == PIVOT else "source"
        if (role, chatter.tokenizer_identity) not in seen:
            seen.add((role, chatter.tokenizer_identity))
            step = evaluate.pivot_or_source_step(recipe, workdir, chatter, prepared(chatter))
            subjects.append(evaluate.Subject(role, chatter.reference.label, step))
    pivot_prepared = prepared(recipe.chatter(PIVOT))
    for name, target in targets.items():
        step = evaluate.tuned_step(recipe, workdir, f"target-{name}", target, pivot_prepared)
        subjects.append(evaluate.Subject("target", name, step))
    fused = evaluate.tuned_step(recipe, workdir, FUSED, merged, pivot_prepared)
    subjects.append(evaluate.Subject(FUSED, recipe.name, fused))
    return evaluate.results_step(workdir, subjects, [data.name for data in held_out])


def _check_files(sets: list[DataSet]) -> None:
    paths = dict.fromkeys(data.path for data in sets)
    missing = [f"{path}: no such file" for path in paths if Path(path).is_absolute() and not Path(path).exists()]
    if missing:
        raise DataError(*missing)


def select_steps(steps: list[Step], *, until: str | None = None, only: str | None = None) -> list[Step]:
    """The steps up to stage `until`, and of source `only` its own branch alone (which ends before the merge)."""
    if only is not None:
        branch = [step for step in steps if step.stage == "fuse" and step.name == only]
        if not branch:
            sources = ", ".join(step.name for step in steps if step.stage == "fuse")
            raise RecipeError(f"--only {only}: the recipe has no such source; it has {sources}")
        steps = list(with_upstream(branch))
    if until is None:
        return steps
    if until not in STAGES:
        raise RecipeError(f"--until {until}: no such stage; choose one of {', '.join(STAGES)}")
    return [step for step in steps if STAGES.index(step.stage) <= STAGES.index(until)]


def run(recipe: Recipe, workdir: Path, *, until: str | None = None, only: str | None = None) -> int:
    """Runs what is not done yet; returns how many steps there were to do. Raises a FuseChatError for what a user can mend.

    Under `torchrun` every process calls it; see `core/ranks.py`.
    """
    with lock(recipe, workdir):
        ranks.from_first(lambda: _get_ready(recipe, workdir, until, only))
        steps = select_steps(build_steps(recipe, workdir), until=until, only=only)
        done_now = sum(step.run() for step in steps)
        log.info("%d steps done now, %d were done before", done_now, len(steps) - done_now)
    ranks.leave()
    return done_now


def _get_ready(recipe: Recipe, workdir: Path, until: str | None, only: str | None) -> None:
    """Writes the recipe down; where there is work to do, checks what can be checked before it, and converts models."""
    steps = select_steps(build_steps(recipe, workdir), until=until, only=only)
    save_recipe(recipe, workdir / RECIPE)
    waiting = [step for step in steps if step.state()[0] != "done"]
    if any(step.stage == "fuse" for step in waiting):
        fuse.check(recipe)
    if any(step.stage != "report" for step in waiting):
        names = [PIVOT, *([only] if only else recipe.sources)]
        convert_together([recipe.chatter(name).reference for name in names])


def check_workdir(recipe: Recipe, workdir: Path) -> None:
    """Refuses a work directory that belongs to another recipe: one of another name or with another pivot."""
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"{workdir}: is a file, not a directory")
    if not (workdir / RECIPE).is_file():
        if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / LOCK).exists():
            raise WorkdirError(f"{workdir}: is not empty and no work directory of FuseChat; choose another --workdir")
        return
    name, pivot = recipe_identity(workdir / RECIPE)
    for key, theirs, ours in (
        ("name", name, recipe.name),
        ("pivot", ", ".join(pivot), ", ".join(recipe.pivot.reference.parts)),
    ):
        if theirs != ours:
            raise WorkdirError(
                f"{workdir}: was made by a recipe with {key} {theirs}, not {ours}; choose another --workdir"
            )


def in_use(workdir: Path) -> bool:
    """Whether a run is going on in the work directory."""
    try:
        with (workdir / LOCK).open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def lock(recipe: Recipe, workdir: Path) -> Iterator[None]:
    """One run at a time in a work directory that is this recipe's; the system frees the lock however the holder ends."""

    def take() -> None:
        check_workdir(recipe, workdir)
        held.enter_context(only_one(workdir / LOCK, workdir))

    with ExitStack() as held:
        ranks.from_first(take)
        yield
