"""The main path, to be read first: builds the steps of a recipe, in order.

    prompts ─► generate ─► conversations ─► prepare ─► capture ─► align ─► fuse ─► rounds ─► merge ─► evaluate ─► report

A step knows its upstream steps, so that its fingerprint changes whenever they do; see `run/steps.py`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.align import stage as align
from fusechat.capture import stage as capture
from fusechat.data.conversations import DataSet, Questions
from fusechat.errors import DataError, RecipeError
from fusechat.evaluate import questions
from fusechat.evaluate import stage as evaluate
from fusechat.fuse import stage as fuse
from fusechat.generate import stage as generate
from fusechat.merge import stage as merge
from fusechat.merge.settings import problems as merge_problems
from fusechat.models.chat_model import ChatModel
from fusechat.models.dates import day_of, today
from fusechat.models.reference import Reference
from fusechat.prepare import stage as prepare
from fusechat.recipe.load import read_recipe
from fusechat.recipe.pinned import RECIPE
from fusechat.recipe.rounds import taught_targets
from fusechat.recipe.schema import FUSED, PIVOT, STAGES, Recipe
from fusechat.report import stage as report
from fusechat.rounds import stage as rounds
from fusechat.run.steps import Step, with_upstream

__all__ = ["RECIPE", "build_steps", "load_recipe"]


def load_recipe(
    source: Path | Mapping[str, Any],
    overrides: list[str] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Recipe:
    """Reads a recipe as `read_recipe` does, and checks its merge parameters too. Raises RecipeError."""
    return read_recipe(source, overrides, changes=changes, dtype=dtype, merge_check=merge_problems)


def of_day(recipe: Recipe, workdir: Path) -> Recipe:
    """The recipe with the date that chat templates see: its own, else the day on which the work directory was created."""
    return recipe if recipe.date else recipe.model_copy(update={"date": day_of(workdir) or today()})


def build_steps(recipe: Recipe, workdir: Path) -> list[Step]:
    """Builds all steps of the recipe, upstream first. Raises DataError naming all missing data files."""
    recipe = of_day(recipe, workdir)
    _check_files([*recipe.all_read_sets(), *_held_out(recipe)])
    chosen = generate.chosen_step(recipe, workdir) if recipe.generate else None
    fused = {target: _target(recipe, workdir, target, chosen) for target in recipe.teachers()}
    targets = fused | {name: _rounds(recipe, workdir, name, fused[name], chosen) for name in taught_targets(recipe)}
    merged = merge.step(recipe, workdir, {name: targets[name] for name in recipe.merged_targets()})
    aligned = {step.name: step for step in with_upstream(list(targets.values())) if step.stage == "align"}
    upstream = _overlap(recipe, workdir)
    upstream |= {f"align/{name}": step for name, step in aligned.items()}
    upstream |= {f"fuse/{name}": step for name, step in fused.items()}
    upstream |= {f"rounds/{name}": step for name, step in targets.items() if step is not fused[name]}
    upstream["merge"] = merged
    upstream |= _evaluation(recipe, workdir, targets, merged)
    steps = with_upstream([report.step(recipe, workdir, upstream)])
    return sorted(steps, key=lambda step: STAGES.index(step.stage))  # stable: upstream stays first


def _held_out(recipe: Recipe) -> list[DataSet]:
    """The held-out sets that the run measures on."""
    evaluates = recipe.evaluate.bits_per_byte or recipe.evaluate.verifier is not None
    return recipe.validation_sets() if evaluates or fuse.measures(recipe) else []


def evaluation_texts(recipe: Recipe) -> list[DataSet | Questions]:
    """Texts that should not be in the training data: held-out sets, and questions of installed suites. None if nothing is
    measured."""
    held_out = _held_out(recipe)
    return [*held_out, *questions.find_installed()] if held_out else []


def _overlap(recipe: Recipe, workdir: Path) -> dict[str, Step]:
    """The step that looks for evaluation texts in the training data. Training does not depend on it."""
    texts = evaluation_texts(recipe)
    return {prepare.OVERLAP: prepare.overlap_step(recipe, workdir, recipe.all_read_sets(), texts)} if texts else {}


def _target(recipe: Recipe, workdir: Path, target: str, chosen: Step | None) -> Step:
    """The fuse step of one target, with its upstream steps: only the prepared tokens for plain fine-tuning. `chosen`: the step
    that writes its conversations, if the recipe generates."""
    pivot, sets, weights = recipe.chat_model(PIVOT), [], recipe.weights()
    is_taught = fuse.is_taught(recipe, target)
    branches = {name: _branch(recipe, workdir, name, chosen) for name in recipe.teachers()[target] if is_taught}
    for data, sources in recipe.training_sets(target).items():
        prepared = prepare.step(recipe, workdir, pivot, data, chosen)
        captured = capture.step(recipe, workdir, pivot, prepared) if fuse.needs_pivot(recipe, target) else None
        taught = {name: branches[name][data.name] for name in sources if is_taught}
        sets.append(fuse.SetSteps(data.name, prepared, captured, taught, weight=weights[data.name]))
    held_out = recipe.validation_sets_of(target) if fuse.measures(recipe) else []
    measured = {data.name: prepare.step(recipe, workdir, pivot, data) for data in held_out}
    return fuse.step(recipe, workdir, target, sets, measured)


def _rounds(recipe: Recipe, workdir: Path, target: str, fused: Step, chosen: Step | None) -> Step:
    """The step that ends a target's rounds, in which other stages do what they do for the first training."""

    def taught(source: str) -> rounds.Counted:
        """What a source's map was first counted on."""
        pairs = [
            [prepare.step(recipe, workdir, recipe.chat_model(name), data, chosen) for name in (PIVOT, source)]
            for data in recipe.sets_of(source)
        ]
        steps = {step.name: step for pair in pairs for step in pair}
        ours, theirs = ([pair[side].directory for pair in pairs] for side in (0, 1))
        return rounds.Counted(ours, theirs, steps)

    def aligned(source: str, place: tuple[str, str, Path], made: Mapping[str, Step], counted: rounds.Counted) -> Step:
        places = {"pivot": counted.pivot, "source": counted.source}
        return align.sampled_step(recipe, source, place, made, places, counted.steps)

    parts = rounds.Parts(
        open_model=generate.open_model,
        capture=lambda chat_model, prepared: capture.step(recipe, workdir, chat_model, prepared),
        align=aligned,
        train=fuse.train_part,
        counted={source: taught(source) for source in taught_targets(recipe)[target]},
    )
    return rounds.step(recipe, workdir, target, fused, chosen, parts)


def targets_of(steps: Iterable[Step]) -> dict[str, Step]:
    """The step that made each target, the last of its rounds where it has some."""
    ends = {"fuse": 0, "rounds": 1}
    found = sorted((step for step in steps if step.stage in ends), key=lambda step: ends[step.stage])
    fused = {step.name for step in found if step.stage == "fuse"}
    return {step.name: step for step in found if step.name in fused}


def _branch(recipe: Recipe, workdir: Path, source: str, chosen: Step | None) -> dict[str, fuse.SourceSteps]:
    """By set name, one source's steps on each set of its conversations, up to its distributions over pivot tokens."""
    pivot, teacher = recipe.chat_model(PIVOT), recipe.chat_model(source)
    sets: dict[str, dict[str, Step]] = {}
    for data in recipe.sets_of(source):
        ours, theirs = (prepare.step(recipe, workdir, each, data, chosen) for each in (pivot, teacher))
        captured = [capture.step(recipe, workdir, *pair) for pair in ((pivot, ours), (teacher, theirs))]
        sets[data.name] = {"pivot": ours, "source": theirs, "pivot_capture": captured[0], "capture": captured[1]}
    aligned = align.step(recipe, workdir, source, sets)
    return {name: fuse.SourceSteps(steps["source"], steps["capture"], aligned) for name, steps in sets.items()}


def _evaluation(recipe: Recipe, workdir: Path, targets: dict[str, Step], merged: Step) -> dict[str, Step]:
    """Every model on every held-out set, what pivot, sources and fused model answer there, where a verifier judges all models, and
    what suites found."""
    measured = recipe.validation_sets() if recipe.evaluate.bits_per_byte else []
    models = run_models(recipe, targets, merged)
    subjects = [_subject(recipe, workdir, model, measured) for model in models]
    asked = recipe.validation_sets() if recipe.evaluate.verifier else measured if recipe.evaluate.answers else []
    answers = {
        model.name: evaluate.answers_step(recipe, workdir, subject, asked)
        for model, subject in zip(models, subjects, strict=True)
        if asked and (recipe.evaluate.verifier or model.role != "target")
    }
    shown = {model.name for model in models if model.role != "target"}
    found = {f"answers/{name}": step for name, step in answers.items() if name in shown}
    if measured or recipe.evaluate.verifier or evaluate.has_suites(workdir):
        sft = recipe.sft_target()
        sets = [data.name for data in measured]
        verified = evaluate.Verified(asked, recipe.evaluate, answers) if recipe.evaluate.verifier else None
        found["evaluate"] = evaluate.results_step(workdir, subjects, sets, f"target-{sft}" if sft else None, verified)
    return found


@dataclass(frozen=True)
class RunModel:
    """A model of a run. `name` is unique among them; `made_by` is the step that wrote it, None for models of the recipe."""

    role: str
    name: str
    label: str
    chat_model: ChatModel
    made_by: Step | None = None


def run_models(recipe: Recipe, targets: dict[str, Step], merged: Step) -> list[RunModel]:
    """Pivot, sources, targets and the fused model. Sources with the same model and template are listed once."""
    models, seen = [], set()
    for name in (PIVOT, *recipe.models):
        chat_model = recipe.chat_model(name)
        role = PIVOT if name == PIVOT else "source"
        if (role, chat_model.tokenizer_identity) not in seen:
            seen.add((role, chat_model.tokenizer_identity))
            models.append(
                RunModel(role, name if name == PIVOT else f"source-{name}", chat_model.reference.label, chat_model)
            )
    for role, name, label, step in (
        *(("target", f"target-{name}", name, step) for name, step in targets.items()),
        (FUSED, FUSED, recipe.name, merged),
    ):
        trust = recipe.pivot.reference.trust_remote_code
        reference = Reference((str(step.directory / "model"),), trust_remote_code=trust)
        models.append(RunModel(role, name, label, ChatModel(name, reference, date=recipe.date), step))
    called = Counter((model.role, model.label) for model in models)
    return [replace(one, label=one.name) if called[one.role, one.label] > 1 else one for one in models]


def _subject(recipe: Recipe, workdir: Path, model: RunModel, held_out: list[DataSet]) -> evaluate.Measured:
    """How a model of the run is measured: targets and the fused model with the pivot's tokens."""
    tokens = model.chat_model if model.made_by is None else recipe.chat_model(PIVOT)
    prepared = {data.name: prepare.step(recipe, workdir, tokens, data) for data in held_out}
    step = evaluate.model_step(recipe, workdir, model.name, model.chat_model, prepared, model.made_by)
    return evaluate.Measured(model.role, model.label, step, model.chat_model, model.made_by)


def _check_files(sets: list[DataSet]) -> None:
    paths = dict.fromkeys(data.path for data in sets)
    missing = [f"{path}: no such file" for path in paths if Path(path).is_absolute() and not Path(path).exists()]
    if missing:
        raise DataError(*missing)


def select_steps(steps: list[Step], *, until: str | None = None, only: str | None = None) -> list[Step]:
    """The steps up to stage `until`. `only` keeps the branch of one source or target, which ends before the merge. For a source
    that only answers, it keeps its answers and their scores. Raises RecipeError for unknown names."""
    if only is not None:
        branch = [step for name, step in targets_of(steps).items() if name == only]
        answers = [step for step in steps if step.stage == "generate" and step.name == f"{only}/answers"]
        branch = branch or [
            step for step in steps if step in answers or list(step.upstream.values()) == (answers or None)
        ]
        if not branch:
            names = list(targets_of(steps))
            names += [step.name.removesuffix("/answers") for step in steps if step.name.endswith("/answers")]
            raise RecipeError(f"--only {only}: the recipe has no such source or target; it has {', '.join(names)}")
        overlap = [step for step in steps if step.name == prepare.OVERLAP]
        steps = list(with_upstream([*overlap, *branch]))
    if until is None:
        return steps
    if until not in STAGES:
        raise RecipeError(f"--until {until}: no such stage; choose one of {', '.join(STAGES)}")
    return [step for step in steps if STAGES.index(step.stage) <= STAGES.index(until)]
