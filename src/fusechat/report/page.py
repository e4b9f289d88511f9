"""The report page: one self-contained HTML file, which opens from disk without a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fusechat.data.rejected import LeftOut
from fusechat.models.facts import DataFile, Model
from fusechat.report.answers import Card
from fusechat.report.authors import author_figures, colour_numbers, marks
from fusechat.report.coefficients import heat_maps
from fusechat.report.costs import StageCost, together
from fusechat.report.generated import Generated
from fusechat.report.plots import loss_figures
from fusechat.report.results import INTERVAL, ResultTable
from fusechat.report.rounds import Rounds, round_figures
from fusechat.report.samples import Sample
from fusechat.report.scripts import scripts
from fusechat.report.summary import Answer
from fusechat.report.teaching import ChoiceRow
from fusechat.run import units

_HERE = Path(__file__).parent
_ALIGNMENT = {
    "pivot positions": ("positions", "d"),
    "covered: share of positions": ("coverage_of_positions", "%"),
    "mass mapped to pivot tokens": ("coverage_of_mass", "%"),
    "mass kept": ("kept_mass", "%"),
    "positions inside a source token": ("positions_inside_a_source_token", "d"),
    "of these conditioned": ("positions_conditioned", "d"),
    "too little mass for a target": ("positions_of_little_mass", "d"),
    "where the source rarely cuts": ("positions_where_the_source_rarely_cuts", "d"),
    "tokenizer": ("tokenizer", ""),
    "rows of W": ("map_rows", "d"),
    "entropy of W (bits)": ("map_entropy_bits", "f"),
    "back-offs, by mass": ("back_off_mass", ""),
    "tokens before an answer": ("lead_positions", "d"),
    "of these with a source's": ("lead_positions_aligned", "d"),
}


@dataclass(frozen=True)
class Contents:
    """All that the page tells. `left_out`: conversations that models leave out; `notes`: name and line of what was done to
    those that they use; `overlap`: what of each evaluation set is in each training set; `losses`, `alignment` and `samples`
    by target or source; `merged`: merge_report.json; `answers` is empty where nobody was asked, `tables` where nothing was
    measured."""

    name: str
    summary: Sequence[Answer]
    tables: Sequence[ResultTable]
    models: Sequence[Model]
    data: Sequence[DataFile]
    overlap: Sequence[dict[str, Any]]
    losses: dict[str, list[dict[str, float]]]
    alignment: dict[str, dict[str, Any]]
    samples: dict[str, list[Sample]]
    choices: Sequence[ChoiceRow]
    merged: dict[str, Any]
    answers: Sequence[Card]
    costs: Sequence[StageCost]
    recipe: str
    seed: int
    versions: dict[str, str]
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[tuple[str, str]] = ()
    how_to_ask: str | None = None  # the fused model, where its template alone does not see to it
    generated: Generated | None = None
    rounds: Sequence[Rounds] = ()


def render_page(contents: Contents) -> str:
    """The page as HTML. Every text in it is escaped; the only scripts that its policy lets run are ours and Plotly."""
    losses, merging, made = loss_figures(contents.losses), heat_maps(contents.merged), contents.generated
    best = author_figures(made.places, made.unit) if made else []
    rounds = round_figures(contents.rounds)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_HERE, _HERE.parent]),  # show/passage.html.j2 too
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": units.size,
        "amount": units.amount,
        "duration": units.duration,
        "percent": units.percent,
        "short": short,
        "figure": _figure,
        "count_of": lambda value: "–" if value is None else f"{value:,.10g}",
        "score": lambda value: "–" if value is None else f"{value:,.3f}",
    }
    return environment.get_template("page.html.j2").render(
        page=contents,
        interval=INTERVAL,
        alignment_rows=[(title, *place) for title, place in _ALIGNMENT.items()],
        colours=colour_numbers(
            [
                *(made.places[0].authors if made else ()),
                *(who for row in contents.choices for who, _, _ in row.taught_by),
            ]
        ),
        losses=losses,
        best=best,
        rounds=rounds,
        marks=marks(list(made.places[0].authors)) if made else {},
        merging=merging,
        total=together("all", [stage.total for stage in contents.costs]),
        scripts=scripts([*best, *losses, *rounds, *merging]),
    )


def short(identity: str) -> str:
    """The beginning of a hash, with its kind where that is not the usual one."""
    kind, _, value = identity.rpartition(":")
    if kind.startswith("hub"):
        return value.rpartition("@")[2][:12]
    return value[:12]


def _figure(figures: dict[str, Any], key: str, form: str) -> str:
    value = figures.get(key)
    if value is None:
        return "–"
    return {"d": lambda: f"{value:,}", "%": lambda: units.percent(value), "f": lambda: f"{value:.4f}"}.get(
        form, lambda: str(value)
    )()
