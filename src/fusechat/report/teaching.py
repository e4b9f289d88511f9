"""Which model taught how much of each target's conversations, as rows of a table."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ASIDE = ("ties", "without comparison")  # counted in addition to who taught, not a part of it


@dataclass(frozen=True)
class ChoiceRow:
    """A target on one set of conversations: the total of conversations, responses or positions (`level`), who taught which share
    of them (empty for plain fine-tuning), and how many were ties."""

    target: str
    data: str
    level: str
    total: float
    taught_by: tuple[tuple[str, float, float], ...]
    ties: float


def choice_rows(counts: dict[str, dict[str, Any]], joined: Mapping[str, str] | None = None) -> list[ChoiceRow]:
    """From the counts in the manifests of the fuse steps; what nobody taught is named if there is any. `joined`: sets that are one
    for the reader, by the name of that."""
    rows = []
    for target, found in counts.items():
        sets: dict[str, Counter[str]] = {}
        for data, chosen in found["chosen"].items():
            sets.setdefault((joined or {}).get(data, data), Counter()).update(chosen)
        for data, chosen in sets.items():
            taught = {who: count for who, count in chosen.items() if who not in _ASIDE and (count or who != "none")}
            total = sum(taught.values())
            plain = set(taught) == {"none"}
            shares = () if plain else tuple((who, count, count / total) for who, count in taught.items() if total)
            rows.append(ChoiceRow(target, data, found["level"], total, shares, chosen.get("ties", 0)))
    return rows
