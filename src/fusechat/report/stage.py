"""report/index.html: what was fused, and what came of it."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fusechat.data.conversations import DataSet
from fusechat.merge.stage import REPORT
from fusechat.models.reference import Reference
from fusechat.models.resolve import find_cached
from fusechat.recipe.schema import PIVOT, STAGES, Recipe
from fusechat.run.files import digest_json, read_json, write_text
from fusechat.run.progress import in_bytes, log
from fusechat.run.steps import Step, with_upstream

PAGE, LIMIT = "index.html", 5_000_000  # bytes that the page should not pass
FORMAT = 5  # 2: more sections, Plotly packed; 3: the summary; 4: answers of the models; 5: rounds


def step(recipe: Recipe, workdir: Path, upstream: dict[str, Step]) -> Step:
    """Writes the page. `upstream`: `align/<source>`, `fuse/<target>`, `merge`; `rounds/<target>` where there are rounds, `evaluate`
    where something was measured, `answers/<model>` where models answered, `overlap` where there are evaluation texts."""

    def work(directory: Path) -> dict[str, Any]:
        return _write(directory, recipe, upstream)

    settings = {"recipe": recipe.model_dump()}
    return Step("report", "", workdir / "report", settings, work, upstream, format=FORMAT, reads_bulk=False)


def _write(directory: Path, recipe: Recipe, upstream: dict[str, Step]) -> dict[str, Any]:
    from fusechat.data.rejected import left_out, notes
    from fusechat.report.answers import cards
    from fusechat.report.costs import stage_costs
    from fusechat.report.generated import generated
    from fusechat.report.page import Contents, render_page
    from fusechat.report.results import result_tables
    from fusechat.report.rounds import losses_of
    from fusechat.report.summary import summarise
    from fusechat.report.teaching import choice_rows

    evaluated = upstream.get("evaluate")
    results = read_json(evaluated.directory / "results.json") if evaluated else None
    fused, aligned, rounds = (_named(upstream, stage) for stage in ("fuse", "align", "rounds"))
    answers = {name: read_json(step.directory / "answers.json") for name, step in _named(upstream, "answers").items()}
    every = sorted(with_upstream(list(upstream.values())), key=lambda step: STAGES.index(step.stage))
    made = generated(recipe, directory.parent)
    page = render_page(
        Contents(
            name=recipe.name,
            tables=result_tables(results) if results else [],
            summary=summarise(results, recipe.sft_target()),
            models=_models(recipe, fused, upstream["merge"]),
            data=_data(recipe, every, made),
            left_out=[found for step in every if (found := left_out(step)) is not None],
            notes=[(step.name, line) for step in every for line in notes(step)],
            overlap=(upstream["overlap"].manifest() or {})["counts"]["pairs"] if "overlap" in upstream else [],
            losses={name: _losses(step) for name, step in fused.items()}
            | {f"{name}, rounds": losses_of(step) for name, step in rounds.items()},
            alignment={name: _alignment(step) for name, step in aligned.items()},
            samples=_samples(recipe, directory.parent, aligned),
            choices=choice_rows(
                {name: (step.manifest() or {})["counts"] for name, step in fused.items()},
                {data.name: "chosen answers" for data in recipe.all_training_sets() if data.chosen},
            ),
            merged=read_json(upstream["merge"].directory / REPORT),
            answers=cards(answers, {f"source-{name}": name for name in recipe.sources} | {"fused": recipe.name}),
            costs=stage_costs(every),
            recipe=yaml.safe_dump(
                recipe.model_dump(exclude_none=True, by_alias=True), sort_keys=False, allow_unicode=True, width=100
            ),
            seed=recipe.seed,
            generated=made,
            rounds=_rounds(recipe, rounds),
            how_to_ask=(upstream["merge"].manifest() or {})["counts"].get("how_to_ask"),
            versions={
                **(upstream["merge"].manifest() or {})["versions"],
                "Python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
            },
        )
    )
    write_text(directory / PAGE, page)
    if len(page.encode()) > LIMIT:
        log.warning("report: the page has %s, more than it should", in_bytes(len(page.encode())))
    return {"bytes": len(page.encode())}


def _named(upstream: dict[str, Step], stage: str) -> dict[str, Step]:
    return {name.removeprefix(f"{stage}/"): step for name, step in upstream.items() if name.startswith(f"{stage}/")}


def _models(recipe: Recipe, fused: dict[str, Step], merge: Step) -> list[Any]:
    """Pivot, sources, targets and the fused model, from what is on this machine; nothing is fetched."""
    from fusechat.merge.report import is_copy
    from fusechat.models.facts import Model, facts

    models = []
    for name in (PIVOT, *recipe.models):
        reference = recipe.chat_model(name).reference
        role = PIVOT if name == PIVOT else "source"
        data = _answered(recipe, name) if recipe.generate else "" if name == PIVOT else _files(recipe.sets_of(name))
        directory = find_cached(reference)
        found = facts(directory)
        identity = _identity(reference, directory)
        models.append(
            Model(role, "" if name == PIVOT else name, reference.label, reference.parts, identity, data, found)
        )
    for name, source in recipe.sources.items():
        if source.server is not None:
            where = ("behind a server",)
            models.append(Model("source", name, source.label, where, "", _answered(recipe, name), facts(None)))
    for name, step in fused.items():
        data = "the chosen answers" if recipe.generate else _files(recipe.training_sets(name))
        taught = " + ".join(recipe.teachers()[name]) or "nobody: plain fine-tuning"
        models.append(_made("target", name, step, f"the pivot, taught by {taught}", data))
    made_of = " + ".join(recipe.merged_targets())
    how = "a copy of" if is_copy(read_json(merge.directory / REPORT)) else f"{recipe.merge.method} of"
    return [*models, _made("fused", recipe.name, merge, f"{how} {made_of}", "")]


def _answered(recipe: Recipe, name: str) -> str:
    """The prompts that a model answers."""
    return _files(recipe.read_sets(name)) if name in recipe.answering else ""


def _files(sets: Iterable[DataSet]) -> str:
    return ", ".join(Path(data.path).name for data in sets)


def _made(role: str, name: str, step: Step, label: str, data: str) -> Any:
    """A model that the run wrote; its hash is that of its weights, of several files the hash of theirs."""
    from fusechat.models.facts import Model, facts

    outputs = (step.manifest() or {})["outputs"]
    weights = {file: output["sha256"] for file, output in outputs.items() if file.endswith(".safetensors")}
    known = next(iter(weights.values())) if len(weights) == 1 else digest_json(weights)
    parts = tuple(f"{file} {sha}" for file, sha in weights.items())
    return Model(role, name, label, parts, f"sha256:{known}", data, facts(step.directory / "model"))


def _identity(reference: Reference, directory: Path | None) -> str:
    from fusechat.models.resolve import identity

    if directory is None:
        return f"sha256:{reference.sha256}" if reference.sha256 else ""
    if reference.is_file or Path(reference.parts[0]).is_dir():
        return identity(reference)
    return f"hub:{reference.parts[0]}@{directory.name}"  # a snapshot's directory is named after its commit


def _data(recipe: Recipe, steps: list[Step], made: Any) -> list[Any]:
    """Every file of conversations that was used, as the pivot could use it, and the prompts that were answered."""
    from fusechat.models.facts import DataFile

    used = {step.name: step for step in steps if step.stage == "prepare"}
    if made is None:
        weights = {name: f", weight {weight:g}" for name, weight in recipe.weights().items() if weight != 1}
        taught: dict[DataSet, list[str]] = {}
        for name in recipe.sources:
            for data in recipe.sets_of(name):
                taught.setdefault(data, []).append(name)
        uses = {data: f"teaches {', '.join(names)}{weights.get(data.name, '')}" for data, names in taught.items()}
    else:
        sets = recipe.all_training_sets()
        uses = {data: f"chosen answers of {data.author}" if data.author else "all chosen answers" for data in sets}
    uses |= dict.fromkeys(recipe.validation_sets(), "held out")
    files = list(made.asked) if made else []
    for data, use in uses.items():
        manifest = used[f"pivot/{data.name}"].manifest() if f"pivot/{data.name}" in used else None
        if manifest is not None:
            digest = manifest["inputs"]["settings"]["data"]
            if made and data.chosen:
                digest = " ".join([made.sha256, *digest.split()[1:]])
            files.append(DataFile(data.name, Path(data.path).name, digest, use, manifest["counts"], data.chosen))
    return files


def _samples(recipe: Recipe, workdir: Path, aligned: dict[str, Step]) -> dict[str, Any]:
    """Of every source whose tokenizer, and the pivot's, are on this machine, and whose distributions were not cleared away."""
    from fusechat.report.samples import samples
    from fusechat.show.conversation import Branch

    pivot = recipe.chat_model(PIVOT)
    here = {
        name: step
        for name, step in aligned.items()
        if find_cached(recipe.chat_model(name).reference)
        and not any(one.freed for one in (step, *step.upstream.values()))
    }
    if find_cached(pivot.reference) is None:
        return {}
    return samples(
        {
            name: (
                Branch(step, pivot, recipe.chat_model(name), verify=False),
                [data.within(workdir) for data in recipe.sets_of(name)],
            )
            for name, step in here.items()
        }
    )


def _rounds(recipe: Recipe, steps: dict[str, Step]) -> list[Any]:
    from fusechat.data.prompts import read_prompts
    from fusechat.report.rounds import rounds_of
    from fusechat.rounds.prompts import sets_of

    found = []
    for name, step in steps.items():
        prompts = read_prompts(sets_of(recipe, name)).conversations
        found.append(rounds_of(name, step, {one.id: one.messages[-1].content for one in prompts}))
    return found


def _losses(step: Step) -> list[dict[str, float]]:
    return [json.loads(line) for line in (step.directory / "losses.jsonl").read_text().splitlines()]


def _alignment(step: Step) -> dict[str, Any]:
    figures = read_json(step.directory / "figures.json")
    origins = figures["mass_by_origin"]
    kinds = ("same bytes", "first token", "longest prefix", "edit distance", "tail")
    figures["back_off_mass"] = ", ".join(f"{kind} {origins[kind]:.4f}" for kind in kinds if origins.get(kind))
    figures["tokenizer"] = "the pivot's: W is the identity" if figures.get("same_tokenizer") else "its own"
    return dict(figures)
