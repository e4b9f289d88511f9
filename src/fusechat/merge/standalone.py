"""Merges by a configuration file in mergekit's format into a model directory, which appears only when it is complete."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat import __version__
from fusechat.errors import FuseChatError, ModelError, StorageError, WorkdirError, storage_error
from fusechat.merge.checkpoint import INDEX, Checkpoint
from fusechat.merge.compatibility import configuration_lines, token_lines
from fusechat.merge.engine import PART, SHARD_BYTES, SQUARES, MergeJob, forget_parts, merge_tensors
from fusechat.merge.merge_file import MergeFile, read_merge_file
from fusechat.merge.methods import load_method
from fusechat.merge.output import copy_files, merge_card
from fusechat.merge.parameters import Values
from fusechat.merge.plan import WIDEST, Plan, make_plan
from fusechat.merge.report import make_report
from fusechat.merge.values import stack_of, stacks_of
from fusechat.models.companion_files import beside
from fusechat.models.reference import Reference
from fusechat.models.resolve import local_directory
from fusechat.run.files import digest_json, read_json, write_json, write_text
from fusechat.run.lock import exclusive_lock
from fusechat.run.progress import log
from fusechat.run.unfinished import lost, seconds_spent

REPORT, BEGUN, FORMAT = "merge_report.json", "begun.json", 1


@dataclass(frozen=True)
class Summary:
    """The result of a merge. `read` and `written`: bytes of tensors. `seconds`: None if it was already done."""

    report: dict[str, Any]
    read: int
    written: int
    seconds: float | None


def merge(
    config: Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    allow_vocab_resize: bool = False,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Merges models as `config`, a mapping or file in mergekit's format, says; writes a plain model directory to `out`.

    Arithmetic is float32 for all dtypes; `dtype` is the output's. `allow_vocab_resize` merges the rows that all vocabularies
    share and keeps the base's others. `threads` defaults to all cores and does not change the result. Output shards have at most
    `shard_bytes`. Call it again to resume a killed merge. Returns the content of `merge_report.json`. Raises FuseChatError.
    """
    file = Path(config) if isinstance(config, str) else config
    return run(file, Path(out), allow_vocab_resize=allow_vocab_resize, threads=threads, shard_bytes=shard_bytes).report


def run(
    config: Mapping[str, Any] | Path, out: Path, *, allow_vocab_resize: bool, threads: int | None, shard_bytes: int
) -> Summary:
    """As `merge`, and returns bytes and time too."""
    settings = read_merge_file(config)
    job = open_job(settings, allow_vocab_resize=allow_vocab_resize, shard_bytes=shard_bytes)
    identity = _identity(settings, job, allow_vocab_resize)
    try:
        place = _place(out)
        hidden = place.with_name(f".{place.name}.merging")  # renamed to `place` when complete
        with exclusive_lock(hidden.with_suffix(".lock"), out, remove=True):
            began = time.monotonic()
            report, seconds = _finished(place, job, identity), None
            if report is None:
                for difference in (*token_lines(job.inputs), *configuration_lines(job.inputs)):
                    log.warning("%s", difference)
                try:
                    report = _build(settings, job, hidden, identity, threads)
                except (FuseChatError, OSError):
                    _tell_rest(job, hidden)
                    raise
                hidden.rename(place)
                seconds = time.monotonic() - began
            else:
                log.info("%s: is there already, merged by the same configuration from the same models", out)
    except OSError as error:
        line = storage_error(error, place="OUT")
        if line is None:
            raise
        raise StorageError(line) from error
    pieces = job.plan.pieces
    read = sum(c.entries[name].bytes for piece in pieces for c, name in zip(job.inputs, piece.sources, strict=False))
    return Summary(report, read, sum(piece.bytes for piece in pieces), seconds)


def open_job(
    settings: MergeFile,
    donor: Path | None = None,
    *,
    dtype: str = WIDEST,
    names: list[str] | None = None,
    allow_vocab_resize: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> MergeJob:
    """Opens the models and checks everything that needs no weights. Raises FuseChatError. `donor`: a directory that gives the
    configuration, if it is not a model of the settings. `dtype`: the default. `names`: the targets' names in the report."""
    targets = list(settings.targets)
    order = sorted(range(len(targets)), key=lambda index: targets[index] != settings.donor)  # the donor first
    references = [*([settings.base] if settings.base else []), *(targets[index] for index in order)]
    inputs = [Checkpoint.open(local_directory(reference), str(reference)) for reference in references]
    settings.conditions.check(inputs)
    plan = make_plan(
        inputs,
        Checkpoint.open(donor, str(donor)) if donor else inputs[0],
        dtype=settings.dtype or dtype,
        has_base=settings.base is not None,
        allow_vocab_resize=allow_vocab_resize,
    )
    layers = _layers(inputs[0], plan)
    per_model = {parameter.name for parameter in load_method(settings.method).PARAMETERS if parameter.per_model}

    def values(tensor: str) -> Values:
        found = settings.values(tensor, layers.get((stack_of(tensor) or ("", 0))[0], 0))
        return {name: [value[i] for i in order] if name in per_model else value for name, value in found.items()}

    check = getattr(load_method(settings.method), "check", None)
    for piece in plan.pieces:
        if piece.merged:
            found = values(piece.name)  # raises if a value is missing
            if check:
                check(piece.name, found)
    names = names or _names(targets)
    return MergeJob(
        settings.method, inputs, [names[index] for index in order], plan, values, settings.granularity, shard_bytes
    )


def _layers(donor: Checkpoint, plan: Plan) -> dict[str, int]:
    """The number of layers of each stack: of a single stack by the configuration, else by the names of the tensors."""
    counts = stacks_of(piece.name for piece in plan.pieces)
    if len(counts) == 1 and donor.depth is not None:
        return dict.fromkeys(counts, donor.depth)
    return counts


def _names(targets: list[Reference]) -> list[str]:
    """The models' short names if they are distinct, else their whole references."""
    short = [target.label for target in targets]
    found = short if len(set(short)) == len(set(targets)) else [str(target) for target in targets]
    before = [found[:number].count(name) for number, name in enumerate(found)]  # a model may be listed twice
    return [f"{name} ({count + 1})" if count else name for name, count in zip(found, before, strict=True)]


def _identity(settings: MergeFile, job: MergeJob, resize: bool) -> str:
    """A hash of everything that changes the output. Models' files enter by size and time: reading terabytes would take too long."""
    donor = job.inputs[0].directory
    files = [file for checkpoint in job.inputs for file in (checkpoint.directory / "config.json", *checkpoint.files)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in (*files, *beside(donor))]
    return digest_json([FORMAT, __version__, json.dumps(_plain(settings.source)), stats, resize, job.shard_bytes])


def _plain(source: dict[str, Any]) -> Any:
    """The configuration with values that JSON and YAML can write; dates become text."""
    return json.loads(json.dumps(source, default=str))


def _place(out: Path) -> Path:
    """The directory of the merged model. Raises WorkdirError if nothing can be renamed to it."""
    place = out.resolve()
    if place.is_mount():
        raise WorkdirError(f"{out}: is where a disk is mounted; name a directory in it")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise WorkdirError(f"{out}: cannot be made, since {above} is a file")
    return place


def _finished(out: Path, job: MergeJob, identity: str) -> dict[str, Any] | None:
    """The report of a finished merge. Raises WorkdirError if `out` has something else, or is damaged."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = _report(out, identity)
    if report is None or report["tensors"].keys() != {piece.name for piece in job.plan.pieces}:
        raise WorkdirError(f"{out}: exists, and was not made by this configuration; delete it or choose another place")
    shards = [file for file, _ in job.plan.shards(job.shard_bytes)]
    copied = [str(file.relative_to(job.inputs[0].directory)) for file in beside(job.inputs[0].directory)]
    for name in ("config.json", *shards, *([INDEX] if len(shards) > 1 else []), *copied):
        if not (out / name).is_file():
            raise WorkdirError(f"{out}: {name} is missing; delete the directory to merge again")
    try:
        Checkpoint.open(out, str(out))
    except ModelError as error:
        raise WorkdirError(f"{error}; delete {out} to merge again") from error
    return report


def _report(directory: Path, identity: str) -> dict[str, Any] | None:
    """The report in the directory, if it is of the same merge."""
    try:
        report: dict[str, Any] = read_json(directory / REPORT)
        return report if report["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(settings: MergeFile, job: MergeJob, building: Path, identity: str, threads: int | None) -> dict[str, Any]:
    """Writes everything to the directory `building`, resuming a killed merge of the same identity."""
    begun = building / BEGUN
    report = _report(building, identity)
    if report is not None:  # killed during cleanup
        return _tidied(job, building, report)
    if building.exists() and not (begun.is_file() and begun.read_text(encoding="utf-8") == identity):
        since = {"spent": 0, "began": begun.stat().st_mtime} if begun.is_file() else {}
        what = lost(sorted(building.iterdir()), seconds_spent(since, [building]))
        log.info("%s: begun by another configuration, or with other models: merging again, without %s", building, what)
        shutil.rmtree(building)
    building.mkdir(parents=True, exist_ok=True)
    write_text(begun, identity)
    report = make_report(job, merge_tensors(job, building, threads)) | {"identity": identity}
    donor = job.inputs[0].directory
    copy_files(donor, building, job.plan)
    card = merge_card(
        settings.name or building.name.removeprefix(".").removesuffix(".merging"),
        base=str(settings.base) if settings.base else None,
        targets=[str(target) for target in settings.targets],
        donor=str(settings.donor),
        donor_card=donor / "README.md",
        config=_plain(settings.source),
        report=report,
    )
    write_text(building / "README.md", card)
    write_json(building / REPORT, report)
    return _tidied(job, building, report)


def _tell_rest(job: MergeJob, building: Path) -> None:
    """Says after an error whether a further merge can resume from what is left."""
    files = [part.with_name(part.name.removesuffix(PART)) for part in building.glob(f"*{PART}")]
    if not files and not (building / SQUARES).is_file():
        shutil.rmtree(building, ignore_errors=True)
        return
    size = sum(file.stat().st_size for file in files if file.is_file())
    shards = len(job.plan.shards(job.shard_bytes))
    what = f"has {len(files)} finished files of {shards} ({size / 1e9:.2f} GB), which the same command reuses"
    log.warning("%s: %s; delete it to free the disk", building, what)


def _tidied(job: MergeJob, building: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Removes all but the merged model from the directory and returns the report."""
    forget_parts(job, building)
    (building / BEGUN).unlink(missing_ok=True)
    return report
