"""docs/results.md and docs/results/miniature.md: computed tables, between the text of `results.md.j2` and `miniature.md.j2`."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from miniature import settings
from miniature.answered import worth
from miniature.chatters import CHATTERS, PIVOT
from miniature.jobs import Place
from miniature.rows import PIVOT_ROW, Row, Table
from miniature.scores import BITS, EXACT, Interval, Scores
from miniature.skills import SKILLS

SETTING = "; "  # between a method and its settings in a row's label


NOT_YET = "(not computed yet)"


def done(table: Table, place: Place) -> Table:
    """The table with the rows that are measured, for as many seeds as all of them have; of a scale, the places with all rows.
    Without any row where there would be one alone."""
    rows = {label: row for label, row in table.rows.items() if row(0).done(place)}
    if table.x:
        lacking = {label.partition(": ")[0] for label in table.rows if label not in rows}
        rows = {label: row for label, row in rows.items() if label.partition(": ")[0] not in lacking}
    if len({label.partition(": ")[0] for label in rows}) < 2:
        rows = {}
    beside = [PIVOT_ROW, table.gold]
    if not rows or not all(row(0).done(place) for row in beside):
        return replace(table, rows={})
    every = [*rows.values(), *beside]
    seeds = next((seed for seed in range(table.seeds) if not all(row(seed).done(place) for row in every)), table.seeds)
    return replace(table, rows=rows, seeds=seeds, chosen={one: table.chosen[one] for one in rows if table.chosen})


def chosen(table: Table, place: Place) -> dict[str, Row]:
    """The rows; of those that differ in a method's settings alone, the best on the validation questions."""
    judge = Scores(place, "validation")
    groups: dict[str, dict[str, Row]] = {}
    for label, row in table.rows.items():
        groups.setdefault(label.partition(SETTING)[0], {})[label] = row
    found = {}
    for several in groups.values():
        label, row = max(several.items(), key=lambda pair: judge.mean(pair[1], table.seeds, EXACT).mean)
        found[label.removesuffix(SETTING)] = row
    return found


def table_text(table: Table, place: Place, only: Sequence[str] = ()) -> str:
    """Exact match in per cent, bits per byte; differences paired by seed. The pivot is one model for all seeds: a difference
    to it has the interval of the value itself. `only`: rows that begin with one of these words."""
    scores = Scores(place, "test")
    if not table.rows:
        return NOT_YET
    lines = [
        "| row | exact match, % | - pivot | - gold | bits per byte | - pivot | - gold |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, row in chosen(table, place).items():
        if only and not label.startswith(tuple(only)):
            continue
        cells = [label]
        for metric, scale, digits in ((EXACT, 100, 1), (BITS, 1, 4)):
            cells.append(_text(scores.mean(row, table.seeds, metric), scale, digits).replace(" ", ""))
            for other in (PIVOT_ROW, table.beside(label)):
                found = scores.difference(row, other, table.seeds, metric)
                shown = replace(found, half=None) if other is PIVOT_ROW else found
                text = _text(shown, scale, digits, sign=True).replace(" ", "")
                cells.append(text if found.mean or found.half else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def skill_text(table: Table, place: Place, metric: str = EXACT) -> str:
    """Exact match in per cent by skill, means over seeds."""
    scores = Scores(place, "test")
    if not table.rows:
        return NOT_YET
    lines = [f"| row | {' | '.join(SKILLS)} |", f"| --- |{' ---: |' * len(SKILLS)}"]
    for label, row in chosen(table, place).items():
        means = (100 * scores.mean(row, table.seeds, metric, skill).mean for skill in SKILLS)
        lines.append(f"| {label} | {' | '.join(f'{mean:.0f}' for mean in means)} |")
    return "\n".join(lines)


def worth_text(table: Table, place: Place) -> str:
    """What each way to choose brought and took, of the first seed."""
    if not table.rows:
        return NOT_YET
    lines = [
        "| choice | right among the prompts, % | prompts with an answer, % | tokens written | answers scored |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, changes in table.chosen.items():
        one = worth(changes, place)
        shares = f"{100 * one.right:.1f} | {100 * one.chosen:.1f}"
        lines.append(f"| {label} | {shares} | {one.written:,} | {one.scored:,} |")
    return "\n".join(lines)


def difference_text(table: Table, row: str, other: str, place: Place) -> str:
    """Of two rows in one table, by their first words: exact match in points and bits per byte, paired by seed."""
    scores, rows = Scores(place, "test"), chosen(table, place)
    found = [next((job for label, job in rows.items() if label.startswith(words)), None) for words in (row, other)]
    left, right = found
    if left is None or right is None:
        return NOT_YET
    exact, bits = (scores.difference(left, right, table.seeds, metric) for metric in (EXACT, BITS))
    return f"{_text(exact, 100, 1, sign=True)} points and {_text(bits, 1, 4, sign=True)} bits per byte"


def _text(found: Interval, scale: float, digits: int, *, sign: bool = False) -> str:
    mean = f"{scale * found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.half is None else f"{mean} ± {scale * found.half:.{digits}f}"


def _models(place: Place) -> list[dict[str, Any]]:
    """What the page says of each model that was schooled."""
    found = []
    for name, one in CHATTERS.items():
        weights = place.models / name / "model.safetensors"
        if weights.is_file():
            strengths = [skill for skill, weight in one.mixture.items() if weight >= 2] if name != PIVOT else []
            kinds = {"name": name, "pivot": name == PIVOT, "further": one.further, "architecture": one.architecture}
            size = {"millions": weights.stat().st_size / 4e6, "tokens": one.tokens, "vocabulary": one.vocabulary}
            found.append({**kinds, **size, "end": one.end_of_turn, "strengths": ", ".join(strengths)})
    return found


def write(tables: Mapping[str, Table], place: Place, pages: Mapping[str, Path]) -> None:
    """Each template's page. Figures are in the directory `results` next to the first page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    for template, out in pages.items():
        text = environment.get_template(template).render(
            titles={name: one.title for name, one in tables.items()},
            models=_models(place),
            not_yet=NOT_YET,
            skill_names=", ".join(SKILLS),
            conversations=settings.CONVERSATIONS,
            fuse=settings.RECIPE["fuse"],
            questions=place.questions,
            table=lambda name, *only: table_text(tables[name], place, only),
            worth=lambda name: worth_text(tables[name], place),
            skills=lambda name: skill_text(tables[name], place),
            difference=lambda name, row, other: difference_text(tables[name], row, other, place),
            seeds=lambda name: tables[name].seeds,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(wrapped(text), encoding="utf-8")


def wrapped(text: str) -> str:
    """Markdown with its paragraphs and list items broken at 118 characters, all else as it is."""
    found: list[str] = []
    prose: list[str] = []
    in_code = False
    for line in [*text.splitlines(), ""]:
        starts = not line.strip() or in_code or line.startswith(("|", "#", "!", "```", "- "))
        if starts and prose:
            indent = "  " if prose[0].startswith("- ") else ""
            whole = " ".join(part.strip() for part in prose)
            found += textwrap.wrap(whole, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            prose = []
        if starts and not line.startswith("- "):
            found.append(line)
        else:
            prose.append(line)
        in_code ^= line.startswith("```")
    return "\n".join(found).rstrip() + "\n"
