"""Merging by a configuration of its own: from a file in mergekit's format to a model directory, whole or not there."""

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
    """What a merge came to. `read` and `written`: bytes of tensors. `seconds` is None where it had been done before."""

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
    """Merges models as `config` says, a mapping or file in mergekit's format, and writes a plain model directory to `out`.

    Arithmetic is float32 whatever the models' types; `dtype` is the output's. `allow_vocab_resize` merges the rows that all
    vocabularies have and keeps the base's others. `threads` defaults to all cores and changes no bit. Output is in shards of at
    most `shard_bytes`. Killed and called again, it continues with the same shard. Returns what `merge_report.json` says.
    Raises FuseChatError for what the caller can correct.
    """
    file = Path(config) if isinstance(config, str) else config
    return run(file, Path(out), allow_vocab_resize=allow_vocab_resize, threads=threads, shard_bytes=shard_bytes).report


def run(
    config: Mapping[str, Any] | Path, out: Path, *, allow_vocab_resize: bool, threads: int | None, shard_bytes: int
) -> Summary:
    """As `merge`, and tells how much work it was."""
    settings = read_merge_file(config)
    job = open_job(settings, allow_vocab_resize=allow_vocab_resize, shard_bytes=shard_bytes)
    identity = _identity(settings, job, allow_vocab_resize)
    try:
        place = _place(out)
        hidden = place.with_name(f".{place.name}.merging")  # becomes `place` once it is whole
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
    """Opens the models and checks everything that can be checked without reading weights.

    `donor`: a directory to take the configuration from, where it is no model of the settings. `dtype`: where they name none.
    `names`: what the report calls the targets.
    """
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
            found = values(piece.name)  # raises for one without a value
            if check:
                check(piece.name, found)
    names = names or _names(targets)
    return MergeJob(
        settings.method, inputs, [names[index] for index in order], plan, values, settings.granularity, shard_bytes
    )


def _layers(donor: Checkpoint, plan: Plan) -> dict[str, int]:
    """How many layers each stack of the model has: an only one by the configuration, else by the names of the tensors."""
    counts = stacks_of(piece.name for piece in plan.pieces)
    if len(counts) == 1 and donor.depth is not None:
        return dict.fromkeys(counts, donor.depth)
    return counts


def _names(targets: list[Reference]) -> list[str]:
    """The short names of models where they tell them apart, else the whole references."""
    short = [target.label for target in targets]
    found = short if len(set(short)) == len(set(targets)) else [str(target) for target in targets]
    before = [found[:number].count(name) for number, name in enumerate(found)]  # one may be listed twice
    return [f"{name} ({count + 1})" if count else name for name, count in zip(found, before, strict=True)]


def _identity(settings: MergeFile, job: MergeJob, resize: bool) -> str:
    """Changes with whatever changes the output. Of the models' files, size and time of change: terabytes are not read for it."""
    donor = job.inputs[0].directory
    files = [file for checkpoint in job.inputs for file in (checkpoint.directory / "config.json", *checkpoint.files)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in (*files, *beside(donor))]
    return digest_json([FORMAT, __version__, json.dumps(_plain(settings.source)), stats, resize, job.shard_bytes])


def _plain(source: dict[str, Any]) -> Any:
    """The configuration as JSON and YAML can write it, dates as text."""
    return json.loads(json.dumps(source, default=str))


def _place(out: Path) -> Path:
    """Where the merged model comes to lie. Raises WorkdirError for a place that a directory cannot be put in by renaming it."""
    place = out.resolve()
    if place.is_mount():
        raise WorkdirError(f"{out}: is where a disk is mounted; name a directory in it")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise WorkdirError(f"{out}: cannot be made, since {above} is a file")
    return place


def _finished(out: Path, job: MergeJob, identity: str) -> dict[str, Any] | None:
    """The report of a merge that is there already. Raises WorkdirError for something else in its place, and where it is not
    whole any more."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = _report(out, identity)
    if report is None or report["tensors"].keys() != {piece.name for piece in job.plan.pieces}:
        raise WorkdirError(
            f"{out}: is there already, and not what this configuration gives; delete it or choose another place"
        )
    shards = [file for file, _ in job.plan.shards(job.shard_bytes)]
    copied = [str(file.relative_to(job.inputs[0].directory)) for file in beside(job.inputs[0].directory)]
    for name in ("config.json", *shards, *([INDEX] if len(shards) > 1 else []), *copied):
        if not (out / name).is_file():
            raise WorkdirError(f"{out}: {name} is not there any more; delete the directory to merge again")
    try:
        Checkpoint.open(out, str(out))
    except ModelError as error:
        raise WorkdirError(f"{error}; delete {out} to merge again") from error
    return report


def _report(directory: Path, identity: str) -> dict[str, Any] | None:
    """The report of the merge, where that is what ended in the directory."""
    try:
        report: dict[str, Any] = read_json(directory / REPORT)
        return report if report["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(settings: MergeFile, job: MergeJob, building: Path, identity: str, threads: int | None) -> dict[str, Any]:
    """Everything in the directory `building`, continuing where a killed merge of the same identity stopped."""
    begun = building / BEGUN
    report = _report(building, identity)
    if report is not None:  # killed when all was done but tidying up
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
    """What a merge that ended with an error leaves: what a further one can continue from, or nothing."""
    files = [part.with_name(part.name.removesuffix(PART)) for part in building.glob(f"*{PART}")]
    if not files and not (building / SQUARES).is_file():
        shutil.rmtree(building, ignore_errors=True)
        return
    size = sum(file.stat().st_size for file in files if file.is_file())
    shards = len(job.plan.shards(job.shard_bytes))
    what = f"has {len(files)} finished files of {shards} ({size / 1e9:.2f} GB), from which the same command continues"
    log.warning("%s: %s; delete it if none shall", building, what)


def _tidied(job: MergeJob, building: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report, once nothing but the merged model is in the directory."""
    forget_parts(job, building)
    (building / BEGUN).unlink(missing_ok=True)
    return report
