"""From judgements to measurements: over all, by turn and by category. What was not judged is counted as missing, never as 0."""

from collections.abc import Iterable, Mapping, Sequence

from fusechat.evaluate.mt_bench.data import TURNS, Question
from fusechat.evaluate.mt_bench.judge import Outcome
from fusechat.evaluate.records import Measurement

Case = tuple[int, int]  # question id, turn
ALL = "all"
# Metric → what an outcome counts, in percent, and whether more of it is better.
_SHARES: dict[str, tuple[dict[Outcome, float], bool | None]] = {
    "win_rate": ({"win": 100.0, "tie": 50.0, "loss": 0.0}, True),
    "wins": ({"win": 100.0, "tie": 0.0, "loss": 0.0}, True),
    "ties": ({"win": 0.0, "tie": 100.0, "loss": 0.0}, None),
    "losses": ({"win": 0.0, "tie": 0.0, "loss": 100.0}, False),
}


def of_scores(questions: Sequence[Question], scores: Mapping[Case, float | None]) -> list[Measurement]:
    """Metric `score`, from 1 to 10: the mean over judgements of both turns, as published; an item is a question."""
    return _measured(questions, scores, metric="score", higher_is_better=True)


def of_outcomes(questions: Sequence[Question], outcomes: Mapping[Case, Outcome | None]) -> list[Measurement]:
    """In percent of the turns that both orders have a verdict for: `win_rate` (a tie is half a win); over all also `wins`, `ties`
    and `losses`."""
    found = []
    for metric, (worth, better) in _SHARES.items():
        shares = {case: None if outcome is None else worth[outcome] for case, outcome in outcomes.items()}
        measured = _measured(questions, shares, metric=metric, higher_is_better=better)
        found += measured if metric == "win_rate" else [one for one in measured if one.data == ALL]
    return found


def _measured(
    questions: Sequence[Question], values: Mapping[Case, float | None], *, metric: str, higher_is_better: bool | None
) -> list[Measurement]:
    found = []
    for data, cases in _slices(questions).items():
        items: dict[str, tuple[float, float]] = {}
        missing = 0
        for case in cases:
            value = values[case]
            if value is None:
                missing += 1
            else:
                total, weight = items.get(str(case[0]), (0.0, 0.0))
                items[str(case[0])] = total + value, weight + 1
        why = None if items else "no judgement could be obtained"
        had = len(cases) - missing
        found.append(Measurement(data, metric, items, missing, why=why, higher_is_better=higher_is_better, n=had))
    return found


def _slices(questions: Sequence[Question]) -> dict[str, list[Case]]:
    """Name → its cases: all, each turn, each category that there is, in the order of the questions."""
    turns = range(1, TURNS + 1)
    slices = {ALL: _cases(questions, turns)} | {f"turn {turn}": _cases(questions, [turn]) for turn in turns}
    for category in dict.fromkeys(question.category for question in questions):
        slices[category] = _cases([one for one in questions if one.category == category], turns)
    return slices


def _cases(questions: Sequence[Question], turns: Iterable[int]) -> list[Case]:
    return [(question.id, turn) for question in questions for turn in turns]
