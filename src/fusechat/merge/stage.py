"""merge/: `model/` (the fused model, a plain Hugging Face directory with a model card), `merge_report.json`."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from fusechat.models.chat_files import how_to_ask, write_chat_files
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.files import write_json
from fusechat.run.integrity import matches_record, record
from fusechat.run.progress import log
from fusechat.run.steps import SEALED, Step, with_upstream

MODEL, REPORT = "model", "merge_report.json"
FORMAT = 2


def step(recipe: Recipe, workdir: Path, targets: dict[str, Step]) -> Step:
    """The step that merges all targets into the fused model."""
    pivot = recipe.chat_model(PIVOT)
    settings = {
        **recipe.merge.model_dump(),
        "pivot": pivot.identity,
        "chat_template": pivot.template_key,
        "name": recipe.name,
        "sources": {name: recipe.sources[name].label for name in _sources(recipe)},
        "seed": recipe.seed,
    }

    def work(directory: Path) -> dict[str, Any]:
        return _merge(directory, recipe, pivot, targets)

    return Step("merge", "", workdir / "merge", settings, work, dict(targets), format=FORMAT)


def _merge(directory: Path, recipe: Recipe, pivot: ChatModel, targets: dict[str, Step]) -> dict[str, Any]:
    from fusechat.merge.engine import forget_parts, merge_tensors
    from fusechat.merge.merge_file import read_merge_file
    from fusechat.merge.output import copy_files
    from fusechat.merge.plan import BASE
    from fusechat.merge.report import make_report
    from fusechat.merge.settings import configuration
    from fusechat.merge.standalone import open_job

    own_prompt = 2 * sum(_counts(target).get("own_prompt", False) for target in targets.values()) > len(targets)
    note = how_to_ask(pivot, own_prompt=own_prompt)
    directories = {name: target.directory / "model" for name, target in targets.items()}
    settings = configuration(
        recipe.merge.method, recipe.merge.parameters(), pivot=pivot.directory, targets=directories, seed=recipe.seed
    )
    job = open_job(read_merge_file(settings), pivot.directory, dtype=recipe.merge.dtype or BASE, names=list(targets))
    model, building = directory / MODEL, directory / "model.building"  # a resumed run reuses its finished shards
    if matches_record(directory / SEALED, building, directory / REPORT):  # killed before the rename
        building.rename(model)
    if not matches_record(directory / SEALED, model, directory / REPORT):
        if model.exists():
            log.warning("merge: %s is not what was written, or not all of it: merged again", model)
            shutil.rmtree(model)
        building.mkdir(exist_ok=True)
        report = make_report(job, merge_tensors(job, building))
        write_json(directory / REPORT, report)
        copy_files(pivot.directory, building, job.plan)
        write_chat_files(pivot, building, own_prompt=own_prompt, name="merge")
        card = _card(recipe, pivot, report, note, _chosen(targets))
        (building / "README.md").write_text(card, encoding="utf-8")
        forget_parts(job, building)
        record(directory / SEALED, building, directory / REPORT)
        building.rename(model)
    found = {"tensors": len(job.plan.pieces), "targets": len(targets), "left_out": job.plan.left_out}
    return found | ({"how_to_ask": note} if note else {})


def _counts(step: Step) -> dict[str, Any]:
    return dict((step.manifest() or {}).get("counts", {}))


def _sources(recipe: Recipe) -> list[str]:
    """The sources that taught the merged targets, or wrote their answers."""
    merged = [source for target in recipe.merged_targets() for source in recipe.teachers()[target]] + recipe.answering
    return [name for name in recipe.sources if name in merged]


def _chosen(targets: dict[str, Step]) -> dict[str, Any]:
    """How many answers of the models were chosen, and whose; empty for a recipe that does not generate."""
    steps = with_upstream(list(targets.values()))
    return next((_counts(step) for step in steps if (step.stage, step.name) == ("generate", "chosen")), {})


def _card(recipe: Recipe, pivot: ChatModel, report: dict[str, Any], note: str | None, generated: dict[str, Any]) -> str:
    from fusechat.merge.card import portable, render_card
    from fusechat.merge.report import is_copy

    as_written = portable(recipe.model_dump(exclude_none=True, by_alias=True))
    return render_card(
        "card.md.j2",
        name=recipe.name,
        method=recipe.merge.method,
        pivot=str(pivot.reference),
        sources={name: recipe.sources[name].label for name in _sources(recipe)},
        how_to_ask=note,
        data={name: ", ".join(Path(data.path).name for data in recipe.read_sets(name)) for name in _sources(recipe)},
        generated=generated,
        is_copy=is_copy(report),
        coefficients=report["mean_coefficients"],
        recipe=yaml.safe_dump(as_written, sort_keys=False, allow_unicode=True, width=100),
    )
