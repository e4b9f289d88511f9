"""merge/: `model/` (the fused LLM, a plain Hugging Face directory with a model card), `merge_report.json`."""

import functools
import shutil
from pathlib import Path
from typing import Any

from fusechat.config import PIVOT, Recipe
from fusechat.core.chatters import Chatter
from fusechat.core.files import write_json
from fusechat.core.progress import progress
from fusechat.core.steps import Step

MODEL, REPORT = "model", "merge_report.json"


def step(recipe: Recipe, workdir: Path, targets: dict[str, Step]) -> Step:
    """Merges all targets into the fused model."""
    pivot = recipe.chatter(PIVOT)
    settings = {
        **recipe.merge.model_dump(),
        "pivot": pivot.identity,
        "chat_template": pivot.chat_template,
        "name": recipe.name,
        "sources": {name: str(recipe.chatter(name).reference) for name in targets},
    }

    def work(directory: Path) -> dict[str, Any]:
        return _merge(directory, recipe, pivot, targets)

    return Step("merge", "", workdir / "merge", settings, work, dict(targets))


def _merge(directory: Path, recipe: Recipe, pivot: Chatter, targets: dict[str, Step]) -> dict[str, Any]:
    from fusechat.merge import methods
    from fusechat.merge.stream import Weights, merge_models

    settings = recipe.merge
    method = methods.linear
    if settings.method == "sce":
        method = functools.partial(
            methods.sce,
            select_topk=settings.select_topk,
            select_deltas=settings.select_deltas,
            normalize=settings.normalize,
        )
    model, building = directory / MODEL, directory / "model.building"  # kept by a killed run: finished shards count
    if not model.is_dir():
        building.mkdir(exist_ok=True)
        with progress(f"merge ({settings.method})", len(Weights.open(pivot.directory).files), "tensors") as advance:
            report = merge_models(
                pivot.directory,
                {name: target.directory / "model" for name, target in targets.items()},
                building,
                method=method,
                dtype=settings.dtype,
                advance=advance,
            )
        write_json(directory / REPORT, report)
        _complete(building, pivot, dtype=settings.dtype)
        (building / "README.md").write_text(_card(recipe, pivot, report), encoding="utf-8")
        building.rename(model)
    own, made = Weights.open(pivot.directory).files, Weights.open(model).files
    return {"tensors": len(made), "targets": len(targets), "left_out": sorted(own.keys() - made.keys())}


def _complete(model: Path, pivot: Chatter, *, dtype: str | None) -> None:
    """Configuration, generation configuration, tokenizer and chat template: the pivot's."""
    from transformers import AutoConfig

    trust = pivot.reference.trust_remote_code
    config = AutoConfig.from_pretrained(pivot.directory, trust_remote_code=trust)
    if dtype:
        config.dtype = dtype
    config.save_pretrained(model)
    for name in ("generation_config.json", *(("*.py",) if trust else ())):
        for file in pivot.directory.glob(name):
            shutil.copyfile(file, model / file.name)
    pivot.save_tokenizer(model)


def _card(recipe: Recipe, pivot: Chatter, report: dict[str, Any]) -> str:
    from fusechat.merge.card import model_card

    return model_card(
        name=recipe.name,
        method=recipe.merge.method,
        pivot=str(pivot.reference),
        sources={name: str(recipe.chatter(name).reference) for name in recipe.sources},
        data={name: Path(recipe.training_set(name).path).name for name in recipe.sources},
        report=report,
        recipe=recipe.model_dump(exclude_none=True),
    )
