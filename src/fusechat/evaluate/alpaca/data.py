"""Instructions with the baseline's outputs, and annotations (judgements) of a model, in the published files' formats.

    alpaca_eval_gpt4_baseline.json   a list of objects: instruction, output, generator, dataset
    *.annotations.json               a list of objects: instruction, output_1 and generator_1 (the baseline's), output_2 and
                                     generator_2 (the model's), preference, annotator, dataset
    df_gamed.csv                     what the length-controlled rate needs to know of the 805 instructions

A preference is 1 where the baseline is better, 2 where the model is, anything between for a judge that is not sure; 0 in old
files means 1.5; null where there is no judgement.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.errors import DataError, first_line
from fusechat.run.files import digest_json, write_json

HUB = "tatsu-lab/alpaca_eval"
BASELINE, GAMED, ANNOTATIONS = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv", ".annotations.json"
INSTRUCTIONS = 805
# Of the 805 instructions in their order: SHA-256 of a list of their words.
_OFFICIAL = "e16ff607369e336c8dfba308705be039c868163fcf9069589f41f43a8743f5d3"
_GAMED_COLUMNS = {"preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"}


@dataclass(frozen=True)
class AlpacaData:
    """`instructions`, `baseline` (its outputs) and `sets` (which set each is of, empty if unknown) are as long as each other.
    `generator`: who wrote the baseline. `gamed`: df_gamed.csv, None where it is on the hub."""

    instructions: tuple[str, ...]
    baseline: tuple[str, ...]
    sets: tuple[str, ...]
    generator: str
    gamed: Path | None

    def first(self, limit: int | None) -> "AlpacaData":
        instructions, baseline, sets = self.instructions[:limit], self.baseline[:limit], self.sets[:limit]
        return AlpacaData(instructions, baseline, sets, self.generator, self.gamed)

    @property
    def digest(self) -> str:
        return digest_json([self.instructions, self.baseline])


@dataclass(frozen=True)
class Annotation:
    """One judgement. `output_2` None: the model gave no answer. `preference` None: there is no judgement, `missing` tells why."""

    instruction: str
    output_1: str
    output_2: str | None
    generator_1: str
    generator_2: str
    annotator: str
    preference: float | None
    dataset: str = ""
    missing: str | None = None


def load(path: Path | None) -> AlpacaData:
    """From a file of either format, from a directory that holds one, or without a path from the hub. Raises DataError."""
    if path is None:
        file = _from_hub(BASELINE)
    elif path.is_dir():
        found = [path / BASELINE] if (path / BASELINE).is_file() else sorted(path.glob(f"*{ANNOTATIONS}"))
        if not found:
            raise DataError(f"{path}: holds neither {BASELINE} nor *{ANNOTATIONS}")
        file = found[0]
    else:
        file = path
    return _outputs(file, None if path is None else beside(file))


def baseline_at_hand() -> Path | None:
    """The baseline's outputs where the hub's client has fetched them before; asks no network, and imports no client."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = (
        Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser() / f"datasets--{HUB.replace('/', '--')}"
    )
    current = cache / "refs" / "main"
    file = cache / "snapshots" / (current.read_text() if current.is_file() else "") / BASELINE
    return file if file.is_file() else None


def beside(file: Path) -> Path | None:
    """df_gamed.csv in the directory of `file`, if it is there."""
    gamed = file.parent / GAMED
    return gamed if gamed.is_file() else None


def gamed_file(path: Path | None, advice: str) -> Path:
    """df_gamed.csv, checked: `path`, else the hub's. `advice`: what to do where that cannot be fetched. Raises DataError."""
    file = path or _from_hub(GAMED, advice)
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            if not set(rows.fieldnames or ()) >= _GAMED_COLUMNS:
                raise DataError(f"{file}: lacks one of the columns {', '.join(sorted(_GAMED_COLUMNS))}")
            numbers = [(int(row["index"]), float(row["instruction_difficulty"])) for row in rows]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{file}: not the difficulties of AlpacaEval's instructions ({first_line(error)})") from error
    # The library finds the difficulty of instruction i in the i-th row.
    if [index for index, _ in numbers[:INSTRUCTIONS]] != list(range(INSTRUCTIONS)):
        raise DataError(f"{file}: its first {INSTRUCTIONS} rows are not those of instructions 0 to {INSTRUCTIONS - 1}")
    if not all(math.isfinite(difficulty) for _, difficulty in numbers):
        raise DataError(f"{file}: a difficulty is not finite")
    return file


def is_official(instructions: Sequence[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order, whatever white space a file keeps."""
    return digest_json([text.split() for text in instructions]) == _OFFICIAL


def read_annotations(path: Path) -> dict[str, list[Annotation]]:
    """Model (generator_2) → its annotations in the file's order. Raises DataError."""
    found: dict[str, list[Annotation]] = {}
    seen: dict[tuple[str, str], str] = {}
    for where, record in _records(path):
        one = Annotation(
            instruction=_text(record, "instruction", where),
            output_1=_text(record, "output_1", where),
            output_2=None if record.get("output_2", "") is None else _text(record, "output_2", where),
            generator_1=_text(record, "generator_1", where),
            generator_2=_text(record, "generator_2", where),
            annotator=str(record.get("annotator", "unknown")),
            preference=_preference(record, where),
            dataset=str(record.get("dataset", "")),
            missing=str(record["missing"]) if record.get("missing") else None,
        )
        _once(seen, (one.generator_2, one.instruction), where)
        found.setdefault(one.generator_2, []).append(one)
    return found


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """In the published format; `missing` is in records without a preference only."""
    records = []
    for one in annotations:
        record = dict(vars(one))
        if one.missing is None:
            del record["missing"]
        records.append(record)
    write_json(path, records)


def _outputs(file: Path, gamed: Path | None) -> AlpacaData:
    """The baseline's outputs; of annotations of several models, the first one's."""
    records = list(_records(file))
    annotated = "output_1" in records[0][1]
    output, generator = ("output_1", "generator_1") if annotated else ("output", "generator")
    model = records[0][1].get("generator_2")
    seen: dict[tuple[str, str], str] = {}
    found: list[tuple[str, ...]] = []
    for where, record in records:
        if annotated and record.get("generator_2") != model:
            continue
        one = tuple(_text(record, key, where) for key in ("instruction", output, generator))
        _once(seen, ("", one[0]), where)
        if found and one[2] != found[0][2]:
            raise DataError(
                f"{where}: its {generator} is {one[2]!r}, that of others {found[0][2]!r}; a baseline is of one"
            )
        found.append((*one, str(record.get("dataset", ""))))
    instructions, outputs, generators, sets = zip(*found, strict=True)
    return AlpacaData(instructions, outputs, sets, generators[0], gamed)


def _once(seen: dict[tuple[str, str], str], key: tuple[str, str], where: str) -> None:
    if key in seen:
        raise DataError(f"{where}: has the instruction of {seen[key]} again")
    seen[key] = where


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it is, and the record. At least one."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: holds no list of records")
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: is {type(record).__name__}, not an object")
        yield where, record


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise DataError(f'{where}: lacks "{key}"')
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f'{where}: "{key}" is {type(text).__name__}, not text')
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise DataError(f'{where}: "{key}" holds half a surrogate pair, which is not text')
    return text


def _preference(record: dict[str, Any], where: str) -> float | None:
    if "preference" not in record:
        raise DataError(f'{where}: lacks "preference"')
    preference = record["preference"]
    if preference is None or preference != preference:  # NaN, as some write null
        return None
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        raise DataError(f'{where}: "preference" is {type(preference).__name__}, not a number')
    if preference != 0 and not 1 <= preference <= 2:
        raise DataError(f'{where}: "preference" is {preference}; it is 0, 1 to 2, or null')
    return float(preference)


def _from_hub(name: str, advice: str = "give --data a directory that holds it") -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB, name, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; all mean that the file is unavailable
        raise DataError(f"{name}: not fetched from data set {HUB} ({first_line(error)}); {advice}") from error
