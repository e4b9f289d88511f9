"""evaluate/results.json: what every suite found, in one schema; and the suites' own files, of which it is put together.

Schema 2: `{"schema": 2, "scores": [record, …]}`, a record for each model, data set and metric:

- `suite`, `data`, `metric`; `role` (pivot, source, target, fused; empty for a model given by itself) and `model`
- `identity`: a fingerprint of the model's weights, tokenizer and template; of a server, the model's name there
- `value`, `standard_error`: null where there is none, with `why`
- `n`: judgements, responses or samples measured; `missing`: how many of them there are none of; `items`: how many were drawn
  independently, which an interval depends on
- `higher_is_better`: null where neither
- `compared_with`: the pivot's name, null where there is none, and its fingerprint `pivot_identity`
- `difference_to_pivot`, `difference_standard_error`: over the `difference_n` items that both have
- `sft_target`, `sft_identity`: the run's target of plain fine-tuning, null where it has none or that is not measured; the paired
  difference to it, as to the pivot: `difference_to_sft`, `difference_to_sft_standard_error`, `difference_to_sft_n`
- `settings`, `versions`: what the value depends on
- of bits per byte also `bytes`

Standard errors are of what was drawn: of questions with both their turns, of conversations with all their responses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.errors import WorkdirError
from fusechat.evaluate.statistics import Estimate, Items, paired_difference, ratio
from fusechat.run.files import read_json, write_json
from fusechat.run.progress import log

SCHEMA, RECORDS, RESULTS = 2, "records.json", "results.json"
ASKED = 2  # raised when models are asked by another text, so that older answers do not count; 2: by what they are taught after
DRAWN = 2  # raised when answers at a temperature are drawn by other numbers; 2: each by its own
Record = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One metric of one model on one data set: Σ sum / Σ weight over `items`, or `value` and `standard_error` where the suite's own
    library says them. `missing`: judgements that there are none of. `higher_is_better`: None for neither."""

    data: str
    metric: str
    items: Items
    missing: int
    value: float | None = None
    standard_error: float | None = None
    why: str | None = None
    higher_is_better: bool | None = True
    n: int | None = None  # judgements, responses or samples, where these are not the items
    more: Mapping[str, Any] | None = None  # what else a record of this suite holds

    @property
    def drawn(self) -> int:
        """How many independent items the value is of, as far as that is known."""
        return ratio(self.items).n or self.n or 0

    @property
    def estimate(self) -> Estimate:
        found = ratio(self.items)
        n = found.n if self.n is None else self.n
        if self.why is not None:
            return Estimate(None, None, n)
        if self.value is None:
            return Estimate(found.value, found.standard_error, n)
        return Estimate(self.value, self.standard_error, n)


@dataclass(frozen=True)
class About:
    """What records say of a model. `label`: its name there; `identity`: None for one that is known by its name alone."""

    role: str
    label: str
    identity: str | None


def records(
    suite: str,
    measured: Mapping[str, Sequence[Measurement]],
    *,
    models: Mapping[str, About],
    pivot: str | None,
    sft: str | None = None,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> list[Record]:
    """The records of a suite. `measured`: model → its measurements; `models`: what more than their names is known of them; `pivot`,
    `sft`: those that the others are compared with, None for none."""
    sft = sft if sft in measured else None
    nobody = About("", "", None)
    about: dict[str | None, About] = {name: About("", name, None) for name in measured}
    about.update((name, one) for name, one in models.items())
    base, plain = about.get(pivot, nobody), about.get(sft, nobody)
    references = {name: {(one.data, one.metric): one for one in measured.get(name or "", ())} for name in (pivot, sft)}
    found = []
    for model, measurements in measured.items():
        for one in measurements:
            estimate = one.estimate
            difference, to_sft = (
                _difference(one, references[name].get((one.data, one.metric)) if model != name else None)
                for name in (pivot, sft)
            )
            found.append(
                {
                    "suite": suite,
                    "data": one.data,
                    "metric": one.metric,
                    "role": about[model].role,
                    "model": about[model].label,
                    "identity": about[model].identity,
                    "value": estimate.value,
                    "standard_error": estimate.standard_error,
                    "n": estimate.n,
                    "items": one.drawn,
                    "missing": one.missing,
                    "why": one.why if estimate.value is None else None,
                    "higher_is_better": one.higher_is_better,
                    "compared_with": (base.label or pivot) if model != pivot else None,
                    "pivot_identity": base.identity,
                    "difference_to_pivot": difference.value,
                    "difference_standard_error": difference.standard_error,
                    "difference_n": difference.n,
                    "sft_target": (plain.label or None) if model != sft else None,
                    "sft_identity": plain.identity,
                    "difference_to_sft": to_sft.value,
                    "difference_to_sft_standard_error": to_sft.standard_error,
                    "difference_to_sft_n": to_sft.n,
                    "settings": dict(settings),
                    "versions": dict(versions),
                    **(one.more or {}),
                }
            )
    return found


def without_sft(record: Record) -> Record:
    """The record without its difference to a target of plain fine-tuning that is another now."""
    nothing = {"difference_to_sft": None, "difference_to_sft_standard_error": None, "difference_to_sft_n": 0}
    return {**record, "sft_target": None, "sft_identity": None, **nothing}


def _difference(one: Measurement, other: Measurement | None) -> Estimate:
    """Over common items; of metrics that are no ratio over items, of the stated values, without a standard error. None where one
    of the two has no value."""
    if other is None or one.estimate.value is None or other.estimate.value is None:
        return Estimate(None, None, 0)
    if one.items and other.items:
        return paired_difference(one.items, other.items)
    assert one.value is not None
    assert other.value is not None
    return Estimate(one.value - other.value, None, 0)


def keep(directory: Path, new: Sequence[Record]) -> None:
    """Puts a suite's records in `directory`/records.json. What is there of other models, data or metrics stays; but not where it
    was measured with other settings, or compared with another pivot, than what stands next to it now."""
    file = directory / RECORDS
    before = {_key(record): record for record in read_records(file)}
    merged = before | {_key(record): record for record in new}
    kept = {key: record for key, record in merged.items() if all(_comparable(record, one) for one in new)}
    for model in dict.fromkeys(merged[key]["model"] for key in merged if key not in kept):
        log.warning("%s: results of %s with other settings or another pivot are left out", file, model)
    write_json(file, list(kept.values()))


def _comparable(one: Record, new: Record) -> bool:
    """Whether a record may stand in one column with a new one."""
    if (one["data"], one["metric"]) != (new["data"], new["metric"]):
        return True
    settings = [{key: value for key, value in each["settings"].items() if key not in _HARMLESS} for each in (one, new)]
    pivots = {each["pivot_identity"] for each in (one, new)}
    return settings[0] == settings[1] and len(pivots) == 1


def gather(root: Path) -> list[Record]:
    """The records of all suites below `root`, in the order of their names."""
    return [record for file in sorted(root.glob(f"*/{RECORDS}")) for record in read_records(file)]


def read_records(file: Path) -> list[Record]:
    """Nothing where the file is not there. Raises WorkdirError for a file of another kind."""
    try:
        found = read_json(file)
    except FileNotFoundError:
        return []
    except ValueError:
        found = None
    if not isinstance(found, list) or any(not isinstance(one, dict) or not one.keys() >= _KEY for one in found):
        raise WorkdirError(f"{file}: holds no results of an evaluation; remove it to start again")
    return found


def write_results(file: Path, found: Sequence[Record]) -> None:
    write_json(file, {"schema": SCHEMA, "scores": list(found)})


_HARMLESS = {"judge_address", "device", "batch_tokens", "batch_size"}  # settings that change the last digits at most
_KEY = {"suite", "data", "metric", "role", "model"}


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in sorted(_KEY))
