"""`fusechat eval alignment`: compares alignment strategies on conversations that their maps were not counted on."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fusechat.align.aligner import Aligner, Pair, Strategy, with_strategy
from fusechat.align.back_off import BackOff
from fusechat.align.blocks import Blocks, Conversations
from fusechat.align.boundary_bias import RARE_BOUNDARY, boundary_probability
from fusechat.align.quality import Quality
from fusechat.align.stage import models
from fusechat.capture import stage as capture
from fusechat.commands.run import lock
from fusechat.errors import WorkdirError
from fusechat.generate import stage as generate
from fusechat.pipeline import RECIPE, of_day
from fusechat.prepare import stage as prepare
from fusechat.recipe.load import save_recipe
from fusechat.recipe.pinned import pin
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.progress import Advance, progress
from fusechat.run.steps import Step

STRATEGIES = (
    Strategy("dtw", "exact"),
    Strategy("dtw", "edit"),
    Strategy("dtw", "statistics", top_1=True),
    Strategy("dtw", "statistics"),
    Strategy("boundary", "exact"),
    Strategy("boundary", "edit"),
    Strategy("boundary", "statistics", top_1=True),
    Strategy("boundary", "statistics"),
    Strategy("boundary", "statistics", unaligned="condition"),
    Strategy("boundary", "statistics", unaligned="condition", look_ahead=True),
    Strategy("boundary", "statistics", unaligned="condition", look_ahead=True, chain_rule=True),
)

_COLUMNS = (
    ("coverage_of_positions", "rows"),
    ("coverage_of_mass", "mass"),
    ("little_mass", "little"),
    ("common", "common"),
    ("transferred", "there"),
    ("own_there", "own"),
    ("ratio", "ratio"),
)
_CAPTION = (
    "rows, mass: covered; little: rows left out for less mass than align.min_mass. "
    "common: bits per byte of the gold tokens on the rows that all have, less is better; "
    "there: on all that is covered; own: the source's own on the same bytes; ratio: of the two before."
)
_MORE = (("unaligned", "condition", "condition"), ("look_ahead", True, "ahead"), ("chain_rule", True, "chain"))


def evaluate_alignment(recipe: Recipe, workdir: Path, *, top_ks: list[int]) -> list[dict[str, Any]]:
    """Returns a record for each source, k and strategy: counts on the training set, measures on the held-out one. The source
    runs once over the held-out set. Raises RecipeError for a source without one."""
    recipe = of_day(recipe, workdir)
    held_out = {source: recipe.validation_set(source) for source in recipe.models}
    records = []
    with lock(recipe, workdir):
        recipe = pin(recipe, workdir, begin=True)
        save_recipe(recipe, workdir / RECIPE)
        for source in recipe.models:
            data = _conversations(recipe, workdir, source, held_out[source], k=max(top_ks))
            records += [{"source": source, **record} for record in _compare(recipe, source, *data, top_ks)]
    return records


def _conversations(recipe: Recipe, workdir: Path, source: str, held_out: Any, *, k: int) -> tuple[Any, Any]:
    """Runs the steps if needed. Returns the directories of prepared training sets, and of the held-out set."""

    def done(step: Step) -> list[Path]:
        step.run(needed=True)
        return [step.directory]

    chosen = generate.chosen_step(recipe, workdir) if recipe.generate is not None else None
    if chosen is not None and not chosen.finished:
        raise WorkdirError(f"{workdir}: no answers were chosen to count on; run the recipe with --until generate first")
    chat_models = recipe.chat_model(PIVOT), recipe.chat_model(source)
    training, measured = (
        [[prepare.step(recipe, workdir, chat_model, data, chosen) for data in sets] for chat_model in chat_models]
        for sets in (recipe.sets_of(source), [held_out])
    )
    captured = capture.step(recipe, workdir, chat_models[1], measured[1][0], at_least=k)
    counted, judged = (
        [[path for step in side for path in done(step)] for side in part] for part in (training, measured)
    )
    return (*counted, []), (*judged, done(captured))


def _compare(recipe: Recipe, source: str, training: Any, measured: Any, top_ks: list[int]) -> list[dict[str, Any]]:
    pair, back_off, about = models(recipe, source)
    held_out = Conversations(*measured, **about)
    data = Conversations(*training, **about, without=held_out.pivot.ids)  # excludes what maps are evaluated on
    records = []
    counted, measured_on = len(data.common()), len(held_out.common())
    total = measured_on + len(STRATEGIES) * (2 * counted + (1 + len(top_ks)) * measured_on)
    with progress(f"compare {source}", total, "conversations") as advance:
        Blocks(with_strategy(pair, Strategy()), held_out, processes=1).count(advance)  # checks the stored rows
        for strategy in STRATEGIES:
            compared = with_strategy(pair, replace(strategy, min_mass=recipe.align.min_mass))
            for k, quality in _measure(compared, back_off, data, held_out, top_ks, advance, recipe.align.processes):
                records.append({"k": k, **asdict(compared.strategy), **quality.summary()})
    return records


def _measure(
    pair: Pair,
    back_off: BackOff,
    data: Conversations,
    held_out: Conversations,
    top_ks: list[int],
    advance: Advance,
    processes: int | None,
) -> list[tuple[int, Quality]]:
    """One strategy's quality at each k."""
    with Blocks(pair, data, processes=processes) as training:
        counts = training.count(advance)
        is_open = pair.extendable_tokens(counts)
        counted = training.survey(is_open, advance)
    seen = Blocks(pair, held_out, processes=1).survey(is_open, advance)
    seen.pairs, seen.parts = counts, counted.parts  # from the training set only
    vocabulary_map = pair.build_map(seen, back_off)
    return [(k, _quality(Aligner(pair, vocabulary_map, is_open), held_out, k, advance)) for k in top_ks]


def _quality(aligner: Aligner, held_out: Conversations, k: int, advance: Advance) -> Quality:
    quality = Quality()
    boundary, warped = (with_strategy(aligner.pair, Strategy(kind)) for kind in ("boundary", "dtw"))
    for identity in held_out.common():
        pivot, source = held_out.pair(identity)
        assert held_out.captured is not None
        captured = held_out.captured[identity].cut(k)
        alignment, _, result = aligner.transferred(pivot, source, captured, k=k)
        common = boundary.align(pivot, source).aligned & warped.align(pivot, source).aligned
        share = boundary_probability(source, captured, aligner.pair.source.spelling)[alignment.source_row]
        covered, little = aligner.taught(alignment, result)
        quality.add(
            pivot,
            source,
            captured,
            rows=result.rows,
            mapped=result.mapped,
            covered=covered & ~pivot.lead,
            little=little,
            common=common,
            rare=alignment.aligned & (share < RARE_BOUNDARY),
        )
        advance()
    return quality


def strategy_name(record: dict[str, Any]) -> str:
    """A strategy's name in tables."""
    vocabulary = "top 1" if record["top_1"] else record["vocabulary"]
    return " + ".join([f"{record['sequence']}, {vocabulary}", *(name for key, on, name in _MORE if record[key] == on)])


def terminal_tables(records: list[dict[str, Any]]) -> list[Any]:
    """A Rich table for each source and k."""
    from rich import box
    from rich.table import Table

    tables = []
    for source, k in dict.fromkeys((record["source"], record["k"]) for record in records):
        rows = [record for record in records if (record["source"], record["k"]) == (source, k)]
        own = rows[0]["own"]
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{source}, k = {k}: the source's own {_number(own)} bits per byte",
            caption=_CAPTION,
        )
        table.add_column("strategy", overflow="fold")
        for _, heading in _COLUMNS:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(strategy_name(row), *(_number(row[key]) for key, _ in _COLUMNS))
        tables.append(table)
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
