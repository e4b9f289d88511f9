"""What tells early that a target's answers go wrong: figures of a round's answers, compared with those of the first round."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_N = 4  # tokens of which a repeated sequence has so many
NOTHING = "no row of the answers is taught"


def repetition(tokens: Sequence[int]) -> float:
    """The share of an answer's sequences of four tokens that came before in it; 0 of one that is shorter."""
    found = [tuple(tokens[at : at + _N]) for at in range(len(tokens) - _N + 1)]
    return 1 - len(set(found)) / len(found) if found else 0.0


def of_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a round's answers: `tokens`, the mean length; `repetition`, the mean over answers; `same`, the share of the
    answers that are the commonest text; `ended`, the share that ended by themselves. None where there are no answers."""
    number = len(rows)
    if not number:
        return dict.fromkeys(("tokens", "repetition", "same", "ended"))
    commonest = Counter(row["text"] for row in rows).most_common(1)[0][1]
    return {
        "tokens": round(sum(len(row["tokens"]) for row in rows) / number, 4),
        "repetition": round(sum(repetition(row["tokens"]) for row in rows) / number, 6),
        "same": round(commonest / number, 6),
        "ended": round(sum(row["end"] is not None for row in rows) / number, 6),
    }


def alarms(now: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """A line for each figure that is wrong, against those of the `first` round: rows kept and answers that end less than half as
    often, length less than half or more than twice, repetition or the commonest answer 0.2 more, nats per byte under the teachers
    more than twice."""
    if not now.get("kept"):
        return [NOTHING]
    found = []
    for key, what in (("share_kept", "rows that are kept"), ("ended", "answers that end")):
        if _value(now, key) < 0.5 * _value(first, key):
            found.append(f"{what}: {_value(now, key):.0%}, {_value(first, key):.0%} in round 1")
    tokens, before = _value(now, "tokens"), _value(first, "tokens")
    if not 0.5 * before <= tokens <= 2 * before:
        found.append(f"tokens an answer: {tokens:.0f}, {before:.0f} in round 1")
    for key, what in (("repetition", "repetition within answers"), ("same", "answers that are the same text")):
        if _value(now, key) > _value(first, key) + 0.2:
            found.append(f"{what}: {_value(now, key):.0%}, {_value(first, key):.0%} in round 1")
    nats, before = _value(now, "nats_per_byte"), _value(first, "nats_per_byte")
    if nats > 2 * before:
        found.append(f"nats per byte of the answers under their teachers: {nats:.2f}, {before:.2f} in round 1")
    return found


def _value(figures: Mapping[str, Any], key: str) -> float:
    return float(figures.get(key) or 0.0)
