"""The report page: one self-contained HTML file, which opens from disk without a network."""

from pathlib import Path
from typing import Any

import jinja2

from fusechat.report.choices import ChoiceRow
from fusechat.report.coefficients import heat_map
from fusechat.report.results import ResultTable

_COLOURS = {"loss": "#5b8def", "sft_loss": "#3fa57a", "fusion_loss": "#d9822b", "eval_loss": "#b45bcf"}
_NAMES = {"loss": "loss", "sft_loss": "SFT term", "fusion_loss": "fusion term", "eval_loss": "held-out (SFT term)"}

_ALIGNMENT = {
    "pivot positions": "positions",
    "covered: share of positions": "coverage_of_positions",
    "mass mapped to pivot tokens": "coverage_of_mass",
    "mass kept": "kept_mass",
    "positions inside a source token": "positions_inside_a_source_token",
    "of these conditioned": "positions_conditioned",
    "where the source rarely cuts": "positions_where_the_source_rarely_cuts",
    "rows of W": "map_rows",
    "entropy of W (bits)": "map_entropy_bits",
    "back-offs, by mass": "back_off_mass",
}


def render_page(
    *,
    name: str,
    table: ResultTable | None,
    models: list[dict[str, str]],
    losses: dict[str, list[dict[str, float]]],
    alignment: dict[str, dict[str, Any]],
    choices: list[ChoiceRow],
    merged: dict[str, Any],
    recipe: str,
    versions: dict[str, str],
) -> str:
    """The page as HTML. Every text in it is escaped; the only scripts are Plotly and the plots' own data."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        name=name,
        table=table,
        models=models,
        plots=loss_plots(losses),
        alignment=alignment,
        alignment_rows=list(_ALIGNMENT.items()),
        choices=choices,
        coefficients=merged["mean_coefficients"],
        heat_map=heat_map(merged),
        recipe=recipe,
        versions=versions,
    )


def loss_plots(losses: dict[str, list[dict[str, float]]]) -> list[str]:
    """A plot for each target, its loss and the two terms of it over the steps, as HTML; Plotly itself comes with the first."""
    from plotly.graph_objects import Figure, Scatter

    plots: list[str] = []
    for target, entries in losses.items():
        figure = Figure()
        for key, colour in _COLOURS.items():
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if not points:
                continue
            line = {"color": colour, "width": 3 if key == "loss" else 1.5}
            figure.add_trace(
                Scatter(x=[x for x, _ in points], y=[y for _, y in points], name=_NAMES[key], mode="lines", line=line)
            )
        figure.update_layout(
            title=target,
            xaxis_title="step",
            yaxis_title="nats per response token",
            height=340,
            margin={"l": 55, "r": 15, "t": 45, "b": 45},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            font={"color": "#808890"},
            legend={"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"},
        )
        figure.update_xaxes(gridcolor="rgba(128,136,144,0.25)", zeroline=False)
        figure.update_yaxes(gridcolor="rgba(128,136,144,0.25)", zeroline=False, rangemode="tozero")
        plots.append(
            figure.to_html(
                full_html=False,
                include_plotlyjs=not plots,
                div_id=f"loss-{len(plots)}",
                config={"responsive": True, "displayModeBar": False},
            )
        )
    return plots
