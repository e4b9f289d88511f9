"""What a run came to, in three answers: did it work, by how much, and what did the sources bring beyond plain fine-tuning.

The fused model is compared with the pivot and with the target of plain fine-tuning on each data set, by the paired difference and
its 95% interval. A metric that is better neither way is left out, and so are the parts of a suite that has a whole as well.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fusechat.recipe.schema import FUSED, PIVOT
from fusechat.report.intervals import half_interval, is_better
from fusechat.report.results import DECIMALS, RIGHT, TITLES, result_tables, terminal_tables, with_interval, words
from fusechat.run.files import read_json

_WHOLE = "all"  # of a suite, in addition to its turns and categories
_FEW = 4  # comparisons of a suite that are told one by one
_SAME, _NO_INTERVAL, _NOT_MEASURED = "no measurable difference", "no interval", "not measured"
_VERDICTS: dict[bool | None, str] = {True: "better", False: "worse", None: _SAME}
_LESS_AND_MORE = {
    "bits per byte": ("fewer", "more"),
    "right answers": ("fewer", "more"),
}  # of other metrics lower and higher
_DIFFERENCES = {
    "pivot": ("difference_to_pivot", "difference_standard_error", "difference_n"),
    "sft": ("difference_to_sft", "difference_to_sft_standard_error", "difference_to_sft_n"),
}
_RELATIVE = (
    "In percent of the pivot's value as it was measured. ± is half of the 95% interval of the paired difference."
)
_WITHOUT_RESULT = (
    "No result has both the fused model and the pivot. Held-out conversations (data.validation) give one, unless "
    "evaluate.bits_per_byte is off."
)
_WITHOUT_SFT = (
    "The recipe has no target without sources. This line adds one; the next run trains it and keeps the rest:"
)
_SFT_NOT_MEASURED = "No result has both the fused model and target {}. Name both in fusechat eval, or no model at all."
_SFT = (
    "Plain fine-tuning is target {}: the pivot, trained on the same conversations without the sources' "
    "distributions. The difference includes what merging changes."
)


@dataclass(frozen=True)
class Comparison:
    """The fused model's `value` next to another model's on one data set, shares in percent. `difference`: paired, None without one;
    `half`: half of its 95% interval, None without one; `why`: the reason where the fused model has no value."""

    suite: str
    data: str
    metric: str
    value: float | None
    other: float | None
    difference: float | None
    half: float | None
    higher_is_better: bool
    why: str = ""

    @property
    def better(self) -> bool | None:
        """None where the interval does not exclude 0, or there is none."""
        return None if self.difference is None else is_better(self.difference, self.half, self.higher_is_better)

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return _NOT_MEASURED
        return _NO_INTERVAL if self.half is None else _VERDICTS[self.better]

    @property
    def percent(self) -> float | None:
        """The difference in percent of the other model's value, of shares in points; None where that value is not above 0."""
        if self.suite == RIGHT:
            return self.difference
        if self.difference is None or self.other is None or self.other <= 0:
            return None
        return 100 * self.difference / self.other


@dataclass(frozen=True)
class Line:
    """`good`: whether the verdict is a good one, None for neither."""

    verdict: str
    good: bool | None
    text: str


@dataclass(frozen=True)
class Answer:
    """`code`: a line of a recipe that would tell more."""

    question: str
    headline: str
    lines: tuple[Line, ...] = ()
    note: str = ""
    code: str = ""


def summarise(results: Mapping[str, Any] | None, sft: str | None) -> list[Answer]:
    """Three answers from `evaluate/results.json`; one where nothing compares the fused model with the pivot. `results`: None where
    nothing was measured; `sft`: the recipe's target of plain fine-tuning, None without one."""
    scores = results["scores"] if results else []
    found = list(_comparisons(scores, "pivot"))
    if all(one.difference is None for one in found):
        return [Answer("Did it work?", "Not measured", _lines(found), _WITHOUT_RESULT)]
    return [
        Answer("Did it work?", _did_it_work(found), _lines(found)),
        Answer("By how much?", _sentence(_by_how_much(found)), _values(found), _RELATIVE),
        _beyond_sft(list(_comparisons(scores, "sft")), sft),
    ]


def print_results(console: Console, file: Path, title: str) -> None:
    """Whether it worked and by how much, and the tables, from `evaluate/results.json`. Raises WorkdirError for another schema."""
    results = read_json(file) if file.is_file() else None
    tables = terminal_tables(result_tables(results), title) if results else []
    worked, *more = summarise(results, None)
    told = [f"{one.question} {one.headline}." for one in (worked, *more[:1])]
    console.print(*told, *([worked.note] if worked.note else []), markup=False, highlight=False)
    for table in tables:
        console.print(table)


def _comparisons(scores: Sequence[Mapping[str, Any]], to: Literal["pivot", "sft"]) -> Iterator[Comparison]:
    values = {(*_place(one), one["role"], one["model"]): one["value"] for one in scores}
    with_whole = {one["suite"] for one in scores if one["data"] == _WHOLE}
    difference, error, items = _DIFFERENCES[to]
    for one in scores:
        is_whole = one["data"] == _WHOLE
        if one["role"] != FUSED or one["higher_is_better"] is None or (one["suite"] in with_whole and not is_whole):
            continue
        other = (PIVOT, one["compared_with"]) if to == "pivot" else ("target", one.get("sft_target"))
        yield Comparison(
            suite=one["suite"],
            data=_title(one["suite"]) if is_whole else one["data"].removesuffix("-held-out"),
            metric=words(one["metric"]),
            value=_shown(one, one["value"]),
            other=_shown(one, values.get((*_place(one), *other))),
            difference=_shown(one, one.get(difference)),  # results of older versions have none to plain fine-tuning
            half=_shown(one, half_interval(one.get(error), one.get(items))),
            higher_is_better=one["higher_is_better"],
            why=one["why"] or "",
        )


def _shown(score: Mapping[str, Any], value: float | None) -> float | None:
    """A value as it is shown: shares in percent."""
    return 100 * value if value is not None and score["suite"] == RIGHT else value


def _place(score: Mapping[str, Any]) -> tuple[str, str, str]:
    return score["suite"], score["data"], score["metric"]


def _title(suite: str) -> str:
    return TITLES.get(suite, suite)


def _did_it_work(found: Sequence[Comparison]) -> str:
    told = _counted(found, "the pivot")
    verdicts = {one.better for one in found if one.half is not None}
    if True in verdicts:
        return f"Yes: {told}" if verdicts == {True} else f"Partly: {told}"
    return f"No: {told}" if False in verdicts else _sentence(told)


def _counted(found: Sequence[Comparison], than: str = "") -> str:
    """On how many data sets the fused model is better, worse, neither: only those count whose difference has an interval."""
    counts = Counter(one.verdict for one in found if one.verdict in _VERDICTS.values())
    total, kinds = sum(counts.values()), [verdict for verdict in _VERDICTS.values() if counts[verdict]]
    if not kinds:
        return "cannot be told: no difference has an interval"
    link = "to" if kinds[0] == _SAME else "than"
    first = f"{kinds[0]} {link} {than}" if than else kinds[0]
    on, what = ("on", "data sets") if {one.suite for one in found} == {"bits-per-byte"} else ("in", "comparisons")
    if len(kinds) == 1:
        return first + {1: "", 2: f" {on} both {what}"}.get(total, f" {on} all {total} {what}")
    rest = [f"{verdict} {on} {counts[verdict]}" for verdict in kinds[1:]]
    return ", ".join([f"{first} {on} {counts[kinds[0]]} of {total} {what}", *rest])


def _by_how_much(found: Sequence[Comparison]) -> str:
    """From the least to the most, in percent, in the first metric that has a measurable difference."""
    told = [(one, one.percent) for one in found if one.better is not None and one.percent is not None]
    if not told:
        return "too little to measure" if any(one.verdict == _SAME for one in found) else "cannot be told"
    first = told[0][0]
    same = [percent for one, percent in told if (one.suite, one.metric) == (first.suite, first.metric)]
    low, high = sorted((min(same), max(same)), key=abs)
    if low == high:
        return f"{_amount(first, low)} {_more(low, first.metric)} {first.metric}"
    if low * high > 0:
        return f"{_amount(first, low)} to {_amount(first, high)} {_more(low, first.metric)} {first.metric}"
    low, high = sorted((low, high))
    less, more = (f"{_amount(first, one)} {_more(one, first.metric)}" for one in (low, high))
    return f"{less} to {more} {first.metric}"


def _beyond_sft(found: Sequence[Comparison], sft: str | None) -> Answer:
    question = "What did the sources bring beyond plain fine-tuning?"
    if sft is None:
        return Answer(question, "Not known", note=_WITHOUT_SFT, code="targets: {sft: []}")
    if all(one.difference is None for one in found):
        return Answer(question, "Not measured", note=_SFT_NOT_MEASURED.format(sft))
    headline = _sentence(_counted(found, "plain fine-tuning"))
    return Answer(question, headline, _lines(found, relative=True), _SFT.format(sft))


def _lines(found: Sequence[Comparison], *, relative: bool = False) -> tuple[Line, ...]:
    """The verdicts with their differences; of a suite with many only how many there are of each."""
    lines = []
    for suite, several in groupby(found, key=lambda one: one.suite):
        group = list(several)
        if len(group) <= _FEW:
            lines += [Line(one.verdict, one.better, _difference(one, relative=relative)) for one in group]
            continue
        counts = Counter(one.verdict for one in group)
        told = [_counted(group)] if any(one.half is not None for one in group) else []
        told += [f"{counts[verdict]} {verdict}" for verdict in (_NO_INTERVAL, _NOT_MEASURED) if counts[verdict]]
        lines.append(Line("", None, f"{_title(suite)}: {', '.join(told)}"))
    return tuple(lines)


def _difference(one: Comparison, *, relative: bool) -> str:
    if one.difference is None:
        return f"{one.data}: {one.why}" if one.why else f"{one.data}, {one.metric}"
    share = one.percent if relative and one.suite != RIGHT else None
    percent = "" if not share else f", {_rounded(share)} {_more(share, one.metric)}"
    unit = "points of " if one.suite == RIGHT else ""
    return f"{one.data}: {with_interval(one.difference, one.half, _decimals(one), '+')} {unit}{one.metric}{percent}"


def _values(found: Sequence[Comparison]) -> tuple[Line, ...]:
    """The difference in percent, and both values; of a suite with many only from the least to the most."""
    lines = []
    for suite, several in groupby(found, key=lambda one: one.suite):
        group = [one for one in several if one.difference is not None]
        if len(group) > _FEW:
            lines.append(f"{_title(suite)}: {_by_how_much(group)}")
            continue
        for one in group:
            values = [f"{each:.{_decimals(one)}f}" for each in (one.other, one.value) if each is not None]
            share = f"{_percent(one)} {_more(one.difference or 0, one.metric)}, " if one.percent is not None else ""
            lines.append(f"{one.data}: {share}{' → '.join(values)}")
    return tuple(Line("", None, text) for text in lines)


def _decimals(one: Comparison) -> int:
    return DECIMALS.get(one.suite, 4)


def _percent(one: Comparison) -> str:
    """Without its sign, to two digits of its interval: 73.9% ± 9.1%."""
    assert one.percent is not None
    assert one.other is not None
    if one.half is None or one.suite == RIGHT:
        return _amount(one, one.percent)
    half = 100 * one.half / one.other
    decimals = _two_digits(half)
    return f"{abs(one.percent):.{decimals}f}% ± {half:.{decimals}f}%"


def _amount(one: Comparison, percent: float) -> str:
    return f"{abs(percent):.0f} points" if one.suite == RIGHT else _rounded(percent)


def _rounded(percent: float) -> str:
    return f"{abs(percent):.{_two_digits(percent)}f}%"


def _two_digits(value: float) -> int:
    """How many decimals show two digits of a number, four at most."""
    return min(4, max(0, 1 - math.floor(math.log10(abs(value))))) if value else 2


def _more(difference: float, metric: str) -> str:
    return _LESS_AND_MORE.get(metric, ("lower", "higher"))[difference > 0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
