"""`fusechat run`: checks what it can, then runs the steps of a recipe in order and skips what is done."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

from fusechat.data.rejected import tell
from fusechat.errors import WorkdirError
from fusechat.models.gguf_parallel import convert_together
from fusechat.pipeline import RECIPE, build_steps, of_day, select_steps
from fusechat.plan import preflight
from fusechat.recipe.load import is_saved, recipe_identity, save_recipe
from fusechat.recipe.pinned import pin
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run import ranks
from fusechat.run.lock import exclusive_lock, shared_lock, wait_for_lock
from fusechat.run.progress import log

LOCK, STARTING = ".lock", ".starting.lock"


def run(recipe: Recipe, workdir: Path, *, until: str | None = None, only: str | None = None) -> int:
    """Runs what is not done, and makes deleted files of stage `until` again; returns the number of steps that ran. Raises
    FuseChatError. Under `torchrun` every process calls it; see `run/ranks.py`."""
    select_steps([], until=until)  # an unknown stage is refused before anything is written
    recipe = ranks.from_first(partial(of_day, recipe, workdir))
    with shared_workdir(recipe, workdir, until=until, only=only) as recipe:
        ranks.on_every_machine(lambda: _get_ready(recipe, workdir, until, only))
        steps = select_steps(build_steps(recipe, workdir), until=until, only=only)
        done_now = 0
        for stage, group in groupby(steps, key=lambda step: step.stage):
            members = list(group)
            done_now += sum(step.run(needed=stage == until) for step in members)
            ranks.from_first(partial(tell, members, recipe.data.max_rejected))
        log.info("%d steps done now, %d were done before", done_now, len(steps) - done_now)
    ranks.shut_down()
    return done_now


def _get_ready(recipe: Recipe, workdir: Path, until: str | None, only: str | None) -> None:
    """If there is work to do, checks what it can before, and converts models into this machine's cache."""
    steps = select_steps(build_steps(recipe, workdir), until=until, only=only)
    waiting = [step for step in steps if not step.finished]
    preflight.check_settings(recipe, waiting)
    if any(step.stage != "report" for step in waiting):
        used = {PIVOT, *(step.name.partition("/")[0] for step in steps)} if only else {PIVOT, *recipe.models}
        convert_together([recipe.chat_model(name).reference for name in (PIVOT, *recipe.models) if name in used])
    preflight.check_models(recipe, waiting)


def check_workdir(recipe: Recipe, workdir: Path) -> None:
    """Raises WorkdirError for the work directory of a recipe with another name or pivot."""
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
                f"{workdir / RECIPE}: is of a recipe with {key} {theirs}, not {ours}; choose another --workdir"
            )


@contextmanager
def lock(recipe: Recipe, workdir: Path) -> Iterator[None]:
    """Locks a work directory of this recipe for this process alone. The system frees the lock when the process ends."""

    def take() -> None:
        check_workdir(recipe, workdir)
        held.enter_context(exclusive_lock(workdir / LOCK, workdir))

    with ExitStack() as held:
        ranks.from_first(take)
        yield


@contextmanager
def shared_workdir(recipe: Recipe, workdir: Path, *, until: str | None, only: str | None) -> Iterator[Recipe]:
    """Locks a work directory together with other runs of the same recipe. Writes the recipe, and yields it as written, with all
    that is fixed for the work directory."""

    def take() -> Recipe:
        check_workdir(recipe, workdir)
        with wait_for_lock(workdir / STARTING, f"beginning in {workdir}"):
            first = held.enter_context(shared_lock(workdir / LOCK, workdir))
            check_workdir(recipe, workdir)  # another run may have begun
            whole = pin(recipe, workdir, begin=first)
            select_steps(build_steps(whole, workdir), until=until, only=only)
            if first:
                save_recipe(whole, workdir / RECIPE)
            elif not is_saved(whole, workdir / RECIPE):
                raise WorkdirError(
                    f"{workdir}: another recipe is being run in it; wait for that, or choose another --workdir"
                )
        return whole

    with ExitStack() as held:
        yield ranks.from_first(take)
