"""report/index.html: what was fused, and what came of it."""

import json
from pathlib import Path
from typing import Any

import yaml

from fusechat.config import PIVOT, Recipe
from fusechat.core.files import read_json, write_text
from fusechat.core.steps import Step

PAGE = "index.html"


def step(recipe: Recipe, workdir: Path, upstream: dict[str, Step]) -> Step:
    """Writes the page. `upstream`: `align/<source>`, `fuse/<target>`, `merge`, and `evaluate` where something was measured."""

    def work(directory: Path) -> dict[str, Any]:
        return _write(directory, recipe, upstream)

    return Step("report", "", workdir / "report", {"recipe": recipe.model_dump()}, work, upstream)


def _write(directory: Path, recipe: Recipe, upstream: dict[str, Step]) -> dict[str, Any]:
    from fusechat.report.choices import choice_rows
    from fusechat.report.page import render_page
    from fusechat.report.results import result_table

    evaluated = upstream.get("evaluate")
    fused = {name.removeprefix("fuse/"): step for name, step in upstream.items() if name.startswith("fuse/")}
    aligned = {name.removeprefix("align/"): step for name, step in upstream.items() if name.startswith("align/")}
    merged = read_json(upstream["merge"].directory / "merge_report.json")
    pivot = {"role": PIVOT, "name": "", "reference": str(recipe.chatter(PIVOT).reference), "data": ""}
    page = render_page(
        name=recipe.name,
        table=result_table(read_json(evaluated.directory / "results.json")) if evaluated else None,
        models=[pivot, *(_source(recipe, name) for name in recipe.sources)],
        losses={name: _losses(step) for name, step in fused.items()},
        alignment={name: _alignment(step) for name, step in aligned.items()},
        choices=choice_rows({name: (step.manifest() or {})["counts"] for name, step in fused.items()}),
        merged=merged,
        recipe=yaml.safe_dump(
            recipe.model_dump(exclude_none=True, by_alias=True), sort_keys=False, allow_unicode=True, width=100
        ),
        versions=(upstream["merge"].manifest() or {})["versions"],
    )
    write_text(directory / PAGE, page)
    return {"bytes": len(page.encode())}


def _source(recipe: Recipe, name: str) -> dict[str, str]:
    data = Path(recipe.training_set(name).path).name
    return {"role": "source", "name": name, "reference": str(recipe.chatter(name).reference), "data": data}


def _losses(step: Step) -> list[dict[str, float]]:
    return [json.loads(line) for line in (step.directory / "losses.jsonl").read_text().splitlines()]


def _alignment(step: Step) -> dict[str, Any]:
    figures = read_json(step.directory / "figures.json")
    origins = figures["mass_by_origin"]
    kinds = ("same bytes", "first token", "longest prefix", "edit distance", "tail")
    figures["back_off_mass"] = ", ".join(f"{kind} {origins[kind]:.4f}" for kind in kinds if origins.get(kind))
    return dict(figures)
