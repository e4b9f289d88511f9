"""What is learnt of a round's answers: by teacher, conversations with the rows that are kept, and these rows' targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.data.distributions import open_distributions, write_distributions, write_store
from fusechat.data.prepared import FILE, PreparedSet, write_prepared
from fusechat.rounds.alarms import of_answers
from fusechat.rounds.cut import kept_rows, take_rows
from fusechat.run.shards import Row

TARGETS = "aligned.arrow"


@dataclass(frozen=True)
class Judged:
    """What a teacher makes of the answers that it teaches: directories of the target's own rows, of the teacher's, of its
    distributions, and of these aligned to the target's rows."""

    student: Path
    prepared: Path
    captured: Path
    aligned: Path


def keep(directory: Path, judged: Mapping[str, Judged], rows: Sequence[Row], until_wrong: float) -> dict[str, Any]:
    """Writes `<teacher>/` for each; returns the figures of all answers, `rows`, that were read by a teacher or not."""
    counts = dict.fromkeys(("rows", "without_target", "after_a_wrong_token", "kept", "conversations"), 0)
    nats, size, kept = 0.0, 0, dict[str, int]()
    for name, one in judged.items():
        place = directory / name
        place.mkdir(exist_ok=True)
        before = counts["conversations"]
        _keep(place, one, until_wrong, counts)
        kept[name] = counts["conversations"] - before
        more = _likelihood(one)
        nats, size = nats + more[0], size + more[1]
    figures = of_answers([row for row in rows if not row["why"]])
    return {
        **counts,
        **figures,
        "answers": len(rows),
        "taught_by": kept,
        "share_kept": round(counts["kept"] / counts["rows"], 6) if counts["rows"] else None,
        "nats_per_byte": round(nats / size, 6) if size else None,
    }


def _keep(directory: Path, judged: Judged, until_wrong: float, counts: dict[str, int]) -> None:
    """Conversations of which no row is kept are left out."""
    student, aligned = PreparedSet(judged.student), open_distributions(judged.aligned)
    which: dict[str, np.ndarray] = {}
    for one in student:
        targets = aligned[one.id]
        kept = kept_rows(one.gold, targets, until_wrong)
        has = (targets.ids >= 0).any(axis=1)
        counts["rows"] += len(one)
        counts["kept"] += int(kept.sum())
        counts["without_target"] += int((~has).sum())
        counts["after_a_wrong_token"] += int((has & ~kept).sum())
        if kept.any():
            which[one.id] = kept
    counts["conversations"] += len(which)
    write_prepared(directory / FILE, (take_rows(one, which[one.id]) for one in student if one.id in which))
    rows = ((identity, aligned[identity].take(np.flatnonzero(kept))) for identity, kept in which.items())
    write_distributions(directory / TARGETS, rows)
    write_store(directory, k=aligned.k, files=TARGETS)


def _likelihood(judged: Judged) -> tuple[float, int]:
    """Nats of the answers under their teacher, and their bytes, the end of turn left out."""
    captured = open_distributions(judged.captured, verify=False)
    nats, size = 0.0, 0
    for one in _with(PreparedSet(judged.prepared), captured):
        nats += float(captured[one.id].nll[~one.end_of_turn].astype(np.float64).sum())
        size += int(one.content_bytes.sum())
    return nats, size


def _with(prepared: PreparedSet, captured: Any) -> Iterator[Any]:
    return (one for one in prepared if one.id in captured)
