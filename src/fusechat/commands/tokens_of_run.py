"""`fusechat tokens --workdir`: shows a conversation of a finished run, by source and number or id."""

from pathlib import Path

from fusechat.errors import DataError, RecipeError, WorkdirError
from fusechat.pipeline import build_steps
from fusechat.recipe.pinned import recipe_of
from fusechat.run.steps import Step, with_upstream
from fusechat.show.conversation import PIVOT, Branch
from fusechat.show.passages import TokenView


def of_run(workdir: Path, pivot: str, source: str, *, conversation: str) -> TokenView:
    """One conversation that `source` taught in the run; `conversation` is its number from 0, its id, or a prefix of its id."""
    recipe = recipe_of(workdir)
    if pivot != PIVOT:
        raise RecipeError(f"{pivot}: with --workdir the first argument is {PIVOT}, the second a source of the run")
    step = _align_step(build_steps(recipe, workdir), source, workdir)
    branch = Branch(step, recipe.chat_model(PIVOT), recipe.chat_model(source))
    identity = _find(conversation, branch.ids, source)
    return branch.shown([data.within(workdir) for data in recipe.sets_of(source)], [identity])[0]


def _align_step(steps: list[Step], source: str, workdir: Path) -> Step:
    aligning = {step.name: step for step in steps if step.stage == "align"}
    if source not in aligning:
        raise RecipeError(f"{source}: the run has no such source; it has {', '.join(aligning)}")
    for step in with_upstream([aligning[source]]):
        state, _ = step.state()
        if state == "freed":
            raise WorkdirError(
                f"{workdir}: {step.label} was cleared away; fusechat run RECIPE --until align makes it again"
            )
        if state != "done":
            raise WorkdirError(f"{workdir}: not finished: {step.label} is {state}; run the recipe first")
    return aligning[source]


def _find(asked: str, ids: list[str], source: str) -> str:
    if not ids:
        raise DataError(f"{source}: taught no conversation")
    if asked in ids:
        return asked
    if asked.isdecimal() and int(asked) < len(ids):
        return ids[int(asked)]
    found = [identity for identity in ids if identity.startswith(asked)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{asked}: {len(found)} conversations have ids with this prefix, {found[0]} and {found[1]}")
    raise DataError(f"{asked}: no such conversation of {source}; there are 0 to {len(ids) - 1}, {ids[0]} to {ids[-1]}")
