"""Conversations that a model leaves out: how many, from which data set, why, and what could be changed. Reported once in a run,
and in status and report; more of them than `data.max_rejected` end the run."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fusechat.errors import DataError
from fusechat.run.progress import log
from fusechat.run.steps import Step

PIVOT = "pivot"
REPEATED = "the same conversation came before"
BY_PIVOT = "the pivot leaves it out"
MALFORMED = "malformed: "
IN_A_ROW = "turns of one role in a row: "
TOO_LONG = "its first response ends after max_length"
NOT_FINITE = "its values are not finite"
REJECTED = "rejected.jsonl"
_ADVICE = {
    IN_A_ROW: "data.join_turns: true joins such turns",
    TOO_LONG: "a larger data.max_length keeps more, data.truncate: token what fits of it",
    MALFORMED: "mend these records",
    NOT_FINITE: "capture.dtype: float32 may keep them",
}
# Changes to conversations that are used, by their count in the manifest.
_DONE = {
    "joined": "turns of one role in a row were joined (data.join_turns)",
    "truncated": "the text after data.max_length tokens was cut off",
    "system_folded": "the system message is in front of the first question: the template has no system role",
    "control_tokens": "a text contains the name of a control token, which the model reads as that token",
    "reasoning_dropped": "the template leaves reasoning out, so that it is not trained",
    "tools_dropped": "the template ignores tools, so that the model does not see them",
    "keys_dropped": "the template does not read all keys of the messages",
}
_SHOWN = 3  # reasons shown


@dataclass(frozen=True)
class LeftOut:
    """What one model leaves out of one data set. `reasons`: the count of each, most frequent first; `kept`: conversations that
    remain; `where`: the file that lists them."""

    model: str
    data: str
    kept: int
    reasons: dict[str, int]
    where: Path
    sample: bool = False  # `limit` took some of the records

    @property
    def number(self) -> int:
        """How many are left out."""
        return sum(self.reasons.values())

    @property
    def records(self) -> int:
        """How many there were."""
        return self.kept + self.number

    @property
    def why(self) -> str:
        """The most frequent reasons, with their counts."""
        shown = [f"{reason} ({number})" for reason, number in list(self.reasons.items())[:_SHOWN]]
        more = len(self.reasons) - _SHOWN
        return "; ".join([*shown, f"and {more} more reasons"] if more > 0 else shown)

    @property
    def sentence(self) -> str:
        """How many remain and why, in one line."""
        return f"{self.number} of {self.records} conversations are left out: {self.why}"

    @property
    def counted(self) -> "LeftOut":
        """Without duplicates, which are used once, and for a sample without malformed records, which are of the whole file."""
        own = {reason: n for reason, n in self.reasons.items() if reason != REPEATED}
        if self.sample:
            own = {reason: n for reason, n in own.items() if not reason.startswith(MALFORMED)}
        return replace(self, reasons=own)

    @property
    def share(self) -> float:
        """The share of records that are left out, without duplicates."""
        return self.counted.number / max(1, self.counted.records)


def left_out(step: Step) -> LeftOut | None:
    """What a finished step of prepare or capture left out by itself, or None. A source's step does not include what is left out
    for all models; the pivot's step does."""
    model, _, data = step.name.partition("/")
    counts = (step.manifest() or {}).get("counts", {})
    if step.stage == "capture":
        reasons, file = {NOT_FINITE: len(counts.get("rejected_not_finite", ()))}, "manifest.json"
    elif step.stage == "prepare":
        reasons, file = counts.get("rejected", {}), REJECTED
    else:
        return None
    own = {reason: n for reason, n in reasons.items() if n and (model == PIVOT or not _of_all(reason))}
    if not own:
        return None
    ranked = dict(sorted(own.items(), key=lambda each: -each[1]))
    sample = " limit=" in str(step.settings.get("data", ""))
    return LeftOut(model, data, int(counts["conversations"]), ranked, step.directory / file, sample)


def notes(step: Step) -> list[str]:
    """What a finished prepare step changed in conversations that it kept, and keys of records that nothing reads."""
    counts = (step.manifest() or {}).get("counts", {}) if step.stage == "prepare" else {}
    found = [
        f"in {counts[key]} of {counts['conversations']} conversations {what}"
        for key, what in _DONE.items()
        if counts.get(key)
    ]
    if counts.get("unused_keys") and step.name.startswith(f"{PIVOT}/"):
        found.append(f"keys of the records that nothing reads: {', '.join(counts['unused_keys'])}")
    return found


def advice(reasons: Iterable[str]) -> str:
    """What could be set about the first of these reasons that has a remedy."""
    return next((say for reason in reasons for key, say in _ADVICE.items() if reason.startswith(key)), "")


def tell(steps: Iterable[Step], most: float) -> None:
    """Logs what finished steps left out, a line each. Raises DataError if one left out a larger share than `most`."""
    too_many = []
    for step in steps:
        for line in notes(step):
            log.warning("%s: %s", step.label, line)
        found = left_out(step)
        if found is None:
            continue
        if found.share > most:
            too_many.append(_refusal(found, most))
        else:
            say = advice(found.reasons)
            log.warning("%s: %s: see %s%s", step.label, found.sentence, found.where, f"; {say}" if say else "")
    if too_many:
        raise DataError(*too_many)


def _refusal(found: LeftOut, most: float) -> str:
    counted = found.counted
    reason, number = next(iter(counted.reasons.items()))
    say = advice(counted.reasons)
    return (
        f"{found.model}: {counted.number} of the {counted.records} conversations of {found.data} are left out, "
        f"{found.share:.0%}, more than data.max_rejected allows ({most:g}): {reason} ({number} of them); "
        f"{f'{say}; ' if say else ''}a larger data.max_rejected continues without them; see {found.where}"
    )


def _of_all(reason: str) -> bool:
    """Whether this reason applies to every model, whatever its template."""
    return reason in (REPEATED, BY_PIVOT) or reason.startswith(MALFORMED)
