"""`fusechat init`: writes a recipe from a pivot, sources and a file of conversations, and checks it as `fusechat plan` does."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import TypeAdapter, ValidationError

from fusechat.commands.first_recipe import recipe_text
from fusechat.commands.run import check_workdir
from fusechat.data.conversations import DataSet, Read, read_records
from fusechat.errors import FuseChatError, PlanError, RecipeError, StorageError, storage_error
from fusechat.models.reference import Reference
from fusechat.pipeline import load_recipe
from fusechat.plan.calibration import choose
from fusechat.plan.command import Plan, make_plan
from fusechat.plan.table import totals
from fusechat.recipe.pinned import pin
from fusechat.recipe.sections import Name, SourceName
from fusechat.run.files import write_text
from fusechat.run.units import duration, size

T = TypeVar("T")
_UNMEASURED = (
    "without held-out conversations (--validation), nothing is measured: no bits per byte, no answers side by side in "
    "the report, no search for evaluation texts in the training data"
)
_MODEL = "a directory, a .gguf file, or org/name of the hub"
_FEW = 20  # steps of fine-tuning; the first has a learning rate of 0


def init(
    *,
    pivot: str | None,
    sources: Sequence[str],
    data: str | None,
    validation: str | None,
    name: str | None,
    out: Path,
    force: bool,
) -> None:
    """Writes the recipe `out`; asks on a terminal for arguments that are None or empty. Raises RecipeError for bad options,
    before writing, and PlanError for problems of the plan, after it."""
    if out.exists() and not out.is_file():
        raise RecipeError(f"--out {out}: is not a file")
    if out.exists() and not force:
        raise RecipeError(f"{out}: exists; choose another --out, or replace it with --force")
    given = {"--pivot": pivot, "--source": sources, "--data": data}
    lacking = [option for option, value in given.items() if not value]
    if lacking and not sys.stdin.isatty():
        raise RecipeError(f"{', '.join(lacking)}: missing; see fusechat init --help")
    pivot = pivot or _ask(f"Pivot ({_MODEL})", _model)
    sources = sources or _ask_sources()
    data = data or _ask("Conversations (a file, or a data set of the hub)", _data)
    if lacking and not validation:
        validation = _ask("Held-out conversations, to measure all models (empty: none)", _data, default="") or None
    text = _checked(pivot, sources, data, validation, name=name, base=out.resolve().parent)
    try:
        write_text(out, text)
    except OSError as error:
        raise StorageError(
            storage_error(error, "--out", out) or f"--out {out}: cannot be written ({error.strerror})"
        ) from error
    print(f"wrote {out}")
    if not validation:
        print(f"note: {_UNMEASURED}")
    _check(out)


def _check(out: Path) -> None:
    """Prints the recipe's plan, and the command that runs it."""
    command = shlex.join(["fusechat", "run", str(out)])
    try:
        plan = _plan(out)
    except FuseChatError:
        print(f"fix what follows, then run: {command}", flush=True)
        raise
    for note in plan.notes:
        print(f"note: {note}")
    steps = min(step.details["steps"] for step in plan.steps if step.stage == "fuse")
    if steps < _FEW:
        print(f"note: steps of fine-tuning: {steps}; with more num_train_epochs or a smaller batch there are more")
    every = totals(plan.steps)
    took = f"about {duration(every['seconds'])}, {size(every['fullest'])} of disk, {size(every['memory'])} of memory"
    print(f"takes {took} on {plan.device.name}; step by step: {shlex.join(['fusechat', 'plan', str(out)])}")
    print(f"run it:  {command}")


def _plan(out: Path) -> Plan:
    recipe = load_recipe(out)
    workdir = Path("runs") / recipe.name
    check_workdir(recipe, workdir)
    recipe = pin(recipe, workdir)
    plan = make_plan(recipe, workdir, choose(None, recipe.device, workdir))
    if plan.problems:
        raise PlanError(*plan.problems)
    return plan


# -- questions ----------------------------------------------------------------------------------------------------------


def _ask(question: str, check: Callable[[str], object], *, default: str | None = None) -> str:
    """Asks until `check` accepts the answer."""

    def accepted(answer: str) -> str:
        try:
            if answer:
                check(answer)
        except FuseChatError as error:
            raise typer.BadParameter(str(error)) from None
        return answer

    found: str = typer.prompt(question, default=default, show_default=False, value_proc=accepted, err=True)
    return found


def _ask_sources() -> list[str]:
    found = [_ask(f"Source, a model that teaches ({_MODEL})", _source)]
    while more := _ask("One more source (empty: no more)", _source, default=""):
        found.append(more)
    return found


# -- what is given, checked ---------------------------------------------------------------------------------------------


def _model(text: str) -> Reference:
    reference = Reference((_expanded(text),))
    problem = reference.check()
    if problem:
        raise RecipeError(problem)
    return reference


def _source(text: str) -> tuple[str | None, Reference]:
    """The name in NAME=MODEL, or None, and the model."""
    name, equals, model = text.partition("=")
    if not equals or text.startswith("wheel:") or Path(text).exists():
        return None, _model(text)
    if not model:
        raise RecipeError(f"{text}: names no model")
    return _valid(name, SourceName), _model(model)


def _data(text: str) -> DataSet:
    found = DataSet("data", _expanded(text))
    if not found.is_hub:
        found.local()
    return found


def _expanded(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _valid(name: str, kind: Any) -> str:
    try:
        TypeAdapter(kind).validate_python(name)
    except ValidationError as error:
        [found] = error.errors()
        reason = found["msg"].removeprefix("Value error, ")
        if found["type"] == "string_pattern_mismatch":
            reason = "a name holds letters, digits, '.', '_' and '-' only, and begins with a letter or digit"
        raise RecipeError(f"{name!r}: {reason}") from None
    return name


def _checked(
    pivot: str, sources: Sequence[str], data: str, validation: str | None, *, name: str | None, base: Path
) -> str:
    """The text of the recipe. Raises RecipeError with all wrong options."""
    wrong: list[str] = []

    def checked(option: str, check: Callable[[str], T], value: str) -> list[T]:
        try:
            return [check(value)]
        except FuseChatError as error:
            wrong.extend(f"--{option}: {message}" for message in error.messages)
            return []

    models = checked("pivot", _model, pivot)
    given = [found for source in sources for found in checked("source", _source, source)]
    training = checked("data", _data, data)
    held_out = checked("validation", _data, validation) if validation else [None]
    if name is not None:
        checked("name", lambda text: _valid(text, Name), name)
    times = Counter(own.lower() for own, _ in given if own)
    wrong += [f"--source: {own}: two sources have this name" for own in times if times[own] > 1]
    if wrong:
        raise RecipeError(*wrong)
    prompts = _are_prompts(training[0])
    return recipe_text(models[0], given, training[0], held_out[0], name=name, base=base, prompts=prompts)


def _are_prompts(data: DataSet) -> bool:
    """Whether the first record of a file that can be read has no answer."""
    if data.is_hub:
        return False
    read = next((one for one in read_records(replace(data, prompts=True)) if isinstance(one, Read)), None)
    return read is not None and not (read.whole.is_answered and read.whole.messages[-1].content)
