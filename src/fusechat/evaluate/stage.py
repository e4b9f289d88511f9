"""evaluate/<model>/scores.json: nll and bytes of every held-out response, per data set.
evaluate/results.json: the scores of all models, in one schema for every suite."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.config import PIVOT, Recipe
from fusechat.core.chatters import Chatter
from fusechat.core.files import read_json, write_json
from fusechat.core.progress import log, progress
from fusechat.core.steps import Step

SCORES, RESULTS = "scores.json", "results.json"


@dataclass(frozen=True)
class Subject:
    """A model that is measured: `role` is pivot, source, target or fused; `label` is what tables call it."""

    role: str
    label: str
    step: Step


def pivot_or_source_step(recipe: Recipe, workdir: Path, chatter: Chatter, prepared: dict[str, Step]) -> Step:
    """Measures a model that the recipe names. `prepared`: held-out data set → its prepare step for this model."""
    role = PIVOT if chatter.name == PIVOT else f"source-{chatter.name}"
    settings = {**_settings(recipe), "model": chatter.identity}

    def work(directory: Path) -> dict[str, Any]:
        return _score(directory, chatter, prepared, settings, label=role)

    return Step("evaluate", role, workdir / "evaluate" / role, settings, work, prepared)


def tuned_step(recipe: Recipe, workdir: Path, name: str, made_by: Step, prepared: dict[str, Step]) -> Step:
    """Measures a target or the fused model: the pivot's tokens, the weights that step `made_by` wrote."""
    from fusechat.core.references import Reference

    settings = _settings(recipe)
    pivot = recipe.chatter(PIVOT)
    reference = Reference((str(made_by.directory / "model"),), trust_remote_code=pivot.reference.trust_remote_code)

    def work(directory: Path) -> dict[str, Any]:
        return _score(directory, Chatter(name, reference), prepared, settings, label=name)

    return Step("evaluate", name, workdir / "evaluate" / name, settings, work, {"model": made_by, **prepared})


def results_step(workdir: Path, subjects: list[Subject], sets: list[str]) -> Step:
    """Joins the scores of all models."""
    settings = {"subjects": [[subject.role, subject.label] for subject in subjects], "sets": sets}
    upstream = {f"{index:03d}": subject.step for index, subject in enumerate(subjects)}

    def work(directory: Path) -> dict[str, Any]:
        return _results(directory, subjects, sets)

    return Step("evaluate", "results", workdir / "evaluate", settings, work, upstream)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"dtype": recipe.evaluate.dtype, "batch_tokens": recipe.evaluate.batch_tokens, "device": recipe.device}


def _score(
    directory: Path, chatter: Chatter, prepared: dict[str, Step], settings: dict[str, Any], *, label: str
) -> dict[str, Any]:
    from fusechat.core.models import choose_device
    from fusechat.core.prepared import PreparedSet
    from fusechat.evaluate.bits_per_byte import score_responses

    model = chatter.model(dtype=settings["dtype"], device=choose_device(settings["device"]))
    sets = {name: PreparedSet(step.directory) for name, step in prepared.items()}
    scores = {}
    with progress(f"evaluate {label}", sum(map(len, sets.values())), "conversations") as advance:
        for name, data in sets.items():
            scores[name] = score_responses(model, data, batch_tokens=settings["batch_tokens"], advance=advance)
    write_json(directory / SCORES, scores)
    return {name: len(found) for name, found in scores.items()}


def _results(directory: Path, subjects: list[Subject], sets: list[str]) -> dict[str, Any]:
    from fusechat.evaluate.bits_per_byte import compare

    scores = {subject.step.name: read_json(subject.step.directory / SCORES) for subject in subjects}
    records = []
    for name in sets:
        found = compare({model: by_set[name] for model, by_set in scores.items()})
        pivot = found[PIVOT].value
        for subject in subjects:
            score = found[subject.step.name]
            records.append(
                {
                    "suite": "bits-per-byte",
                    "data": name,
                    "role": subject.role,
                    "model": subject.label,
                    "value": score.value,
                    "difference_to_pivot": None if score.value is None or pivot is None else score.value - pivot,
                    "bytes": score.bytes,
                    "n": score.responses,
                    "missing": score.missing,
                }
            )
            if score.missing and subject.role == PIVOT:
                log.warning(
                    "evaluate %s: %d responses are left out, which some model does not have", name, score.missing
                )
    write_json(directory / RESULTS, {"schema": 1, "scores": records})
    return {"models": len(subjects), "sets": len(sets)}
