"""align/<source>/, for all sets of the source's conversations together: `vocabulary_map.arrow` (W, see `VocabularyMap.save`),
`aligned.arrow` (distributions over pivot tokens, one for each response row of the pivot), `figures.json` (coverage)."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.data.distributions import open_distributions, write_distributions, write_store
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.files import write_json
from fusechat.run.progress import log, progress
from fusechat.run.steps import Step

TARGETS, FIGURES, FORMAT = "aligned.arrow", "figures.json", 2
PARTS, FILL = ("pivot", "source", "capture"), "pivot_capture"


def step(
    recipe: Recipe,
    workdir: Path,
    source: str,
    sets: Mapping[str, Mapping[str, Step]],
) -> Step:
    """The step that aligns one source's captured distributions to the pivot's tokens. `sets`: by name, the steps `pivot`,
    `source`, `capture` and `pivot_capture` of each set of conversations."""
    settings = recipe.align.model_dump(exclude={"processes"})  # does not change results
    read = [*PARTS, *([FILL] if recipe.align.unaligned == "pivot" else [])]
    upstream = {
        part if len(sets) == 1 else f"{name}/{part}": steps[part] for name, steps in sets.items() for part in read
    }

    def work(directory: Path) -> dict[str, Any]:
        return _align(directory, {part: _directories(upstream, part) for part in read}, recipe, source)

    directory = workdir / "align" / source
    return Step("align", source, directory, settings, work, upstream, FORMAT, counted=_counted, bulk="aligned.arrow")


def sampled_step(
    recipe: Recipe,
    source: str,
    place: tuple[str, str, Path],
    parts: Mapping[str, Step],
    counted: Mapping[str, Sequence[Path]],
    counted_by: Mapping[str, Step],
) -> Step:
    """Aligns a source on answers that the target sampled: where the source says nothing there is no target, for the gold token is
    the target's own. `place`: stage, name and directory. `parts`: the steps `pivot`, `source` and `capture`. The map is counted
    on other conversations: `counted`, the directories of what the `pivot` and the `source` have of them; `counted_by`, the steps
    that made these."""
    stage, name, directory = place
    settings = recipe.align.model_dump(exclude={"processes"})

    def work(directory: Path) -> dict[str, Any]:
        own = {part: [step.directory] for part, step in parts.items()}
        return _align(directory, own, recipe, source, counted={part: list(found) for part, found in counted.items()})

    upstream = {**parts, **{f"counted/{key}": step for key, step in counted_by.items()}}
    return Step(stage, name, directory, settings, work, upstream, FORMAT, counted=_counted, bulk="aligned.arrow")


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of steps written before `min_mass` existed."""
    return {"min_mass": 0.0, **settings}


def directories(step: Step, part: str) -> list[Path]:
    """The directories of an align step's upstream steps of kind `part`, one for each set of conversations."""
    return _directories(step.upstream, part)


def _directories(upstream: Mapping[str, Step], part: str) -> list[Path]:
    return [step.directory for key, step in upstream.items() if key.rpartition("/")[2] == part]


def models(recipe: Recipe, source: str) -> tuple[Any, Any, dict[str, Any]]:
    """Both models' tokens with the alignment strategy; the pivot's back-off; the names and vocabulary sizes of both models."""
    from fusechat.align.aligner import Pair, Side, Strategy
    from fusechat.align.back_off import BackOff
    from fusechat.align.vocabulary import same_tokens
    from fusechat.models.token_bytes import token_bytes

    chat_models: tuple[ChatModel, ChatModel] = (recipe.chat_model(PIVOT), recipe.chat_model(source))
    sizes = tuple(each.vocabulary_size() for each in chat_models)
    pivot, teacher = (
        Side.of(token_bytes(each.tokenizer()), each.template().end_of_turn, rows=rows)
        for each, rows in zip(chat_models, sizes, strict=True)
    )
    about = {"names": tuple(f"{each.name} ({each.reference})" for each in chat_models), "sizes": sizes}
    same = same_tokens(pivot.tokens, teacher.tokens)
    return Pair(pivot, teacher, Strategy.of(recipe.align), same), BackOff(pivot.tokens, sizes[0]), about


def _align(
    directory: Path,
    parts: dict[str, list[Path]],
    recipe: Recipe,
    source: str,
    *,
    counted: dict[str, list[Path]] | None = None,
) -> dict[str, Any]:
    """`counted`: directories of the conversations that the map is counted on, where these are others."""
    from fusechat.align.blocks import Blocks, Conversations
    from fusechat.align.stats import AlignmentStats

    pair, back_off, about = models(recipe, source)
    if counted is not None:
        kind = "condition" if recipe.align.unaligned == "condition" else "skip"
        pair = replace(pair, strategy=replace(pair.strategy, unaligned=kind, gold=False))
    if pair.same_tokens:
        log.info("align %s: has the pivot's tokenizer, so every token maps to itself", source)
    data = Conversations(*(parts[part] for part in PARTS), fill=parts.get(FILL, []), **about)
    common, total = len(data.common()), len(data.ids)
    k = recipe.align.top_k or open_distributions(*parts["capture"], verify=False).k
    sums = AlignmentStats()
    options: dict[str, Any] = {"processes": recipe.align.processes, "directory": directory}
    with ExitStack() as opened:
        blocks = opened.enter_context(Blocks(pair, data, **options))
        with progress(f"count {source}", 2 * common, "conversations") as advance:
            if counted is None:
                vocabulary_map, is_open = blocks.build_map(back_off, advance)
            else:
                others = Conversations(counted["pivot"], counted["source"], [], checked=True, **about)
                before = opened.enter_context(Blocks(pair, others, **options)).see(lambda amount=1, note="": None)
                vocabulary_map, is_open = blocks.build_further(before, back_off, advance)
        vocabulary_map.save(directory / "vocabulary_map.arrow")
        with progress(f"transfer {source}", total, "conversations") as advance:
            targets = blocks.align(vocabulary_map, is_open, k=k, advance=advance, figures=sums)
            write_distributions(directory / TARGETS, targets)
    write_store(directory, k=k, files=TARGETS)
    figures = {
        **sums.summary(),
        "same_tokenizer": pair.same_tokens,
        "map_rows": len(vocabulary_map.origin),
        "map_entries": len(vocabulary_map.pivot),
        "map_entropy_bits": round(vocabulary_map.entropy(), 6),
        "map_rows_by_origin": vocabulary_map.rows_by_origin(),
    }
    write_json(directory / FIGURES, figures)
    if total and not common:
        log.warning("align %s: no conversation is usable for both the pivot and this source", source)
    return figures
