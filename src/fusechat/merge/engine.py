"""Merges whole models out of core: shard by shard, tensor by tensor, block by block.

    plan ─► for each shard, for each tensor:  measure (passes over all inputs) ─► combine, block by block ─► into the file

No tensor is held in memory: each thread has a block of each input, and `selection.py` gathers a bounded number of keys.
"""

import itertools
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from fusechat.errors import ModelError, StorageError
from fusechat.merge.checkpoint import FLOATS, INDEX, Checkpoint
from fusechat.merge.kernels import CHUNK, count_not_finite, encode_bfloat16, encode_float16, update_squares
from fusechat.merge.methods import load_method
from fusechat.merge.parameters import Values
from fusechat.merge.plan import OutputTensor, Plan
from fusechat.merge.shard import Shard, new_shard
from fusechat.merge.stats import TensorStats, shares
from fusechat.merge.tensor import Tensor, Workers, scratch
from fusechat.merge.values import stack_of
from fusechat.run.files import remove_partial, seen, write_json
from fusechat.run.integrity import read_sealed, write_sealed
from fusechat.run.progress import BYTES, log, progress

SHARD_BYTES = 5_000_000_000
SQUARES, PART = "squares.json", ".report.json"
COPIED = 1 << 24  # bytes of a buffer copied at once


@dataclass(frozen=True)
class MergeJob:
    """A merge of open models. `inputs`: the base, if the method has one, then the targets, which reports call `names`."""

    method: str
    inputs: list[Checkpoint]
    names: list[str]
    plan: Plan
    values: Callable[[str], Values]
    granularity: str = "tensor"
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class _Work:
    """What all tensors of a merge share. `pooled`: coefficients by layer or model; `advance` takes the bytes written."""

    job: MergeJob
    workers: Workers
    pooled: dict[str, list[float]]
    advance: Callable[[int], None]


def merge_tensors(job: MergeJob, output: Path, threads: int | None = None) -> dict[str, Any]:
    """Writes the merged tensors to `output` and returns the report of each, by name. `threads`: default all cores. Keeps whole
    shards of an earlier, killed merge. Raises ModelError for values that are not finite, in an input or in the output's dtype."""
    size = sum(piece.bytes for piece in job.plan.pieces)
    with closing(Workers(threads)) as workers, progress(f"merge ({job.method})", size, BYTES) as advance:
        return _merge_all(job, output, workers, advance)


def _merge_all(job: MergeJob, output: Path, workers: Workers, advance: Callable[[int], None]) -> dict[str, Any]:
    remove_partial(output)
    shards = job.plan.shards(job.shard_bytes)
    parts = {file: part for file, pieces in shards if (part := _sound_part(output, file, pieces)) is not None}
    missing = [(file, pieces) for file, pieces in shards if file not in parts]
    _check_room(output, sum(piece.bytes for _, pieces in missing for piece in pieces))
    pooled = _pooled(job, output, workers) if job.granularity != "tensor" and missing else {}
    work = _Work(job, workers, pooled, advance)
    report: dict[str, Any] = {}
    for file, pieces in shards:
        if file in parts:
            advance(sum(piece.bytes for piece in pieces))
            report |= parts[file]
            continue
        part = _write_shard(work, output / file, pieces)
        write_sealed(_part(output, file), {"shard": seen(output / file), "tensors": part})
        report |= part
    if len(shards) > 1:
        size = sum(piece.bytes for piece in job.plan.pieces)
        names = {piece.name: file for file, pieces in shards for piece in pieces}
        write_json(output / INDEX, {"metadata": {"total_size": size}, "weight_map": names})
    return report


def forget_parts(job: MergeJob, output: Path) -> None:
    """Removes the files that only a resumed merge needs, as the last step."""
    for file, _ in job.plan.shards(job.shard_bytes):
        _part(output, file).unlink(missing_ok=True)
    (output / SQUARES).unlink(missing_ok=True)


def _part(output: Path, file: str) -> Path:
    return output / f"{file}{PART}"


def _sound_part(output: Path, file: str, pieces: list[OutputTensor]) -> dict[str, Any] | None:
    """The report of a finished shard, if its size and time are unchanged and it has these tensors; else None."""
    part = read_sealed(_part(output, file))
    whole = part is not None and (output / file).is_file() and part["shard"] == seen(output / file)
    if part is not None and whole and part["tensors"].keys() == {piece.name for piece in pieces}:
        return dict(part["tensors"])
    if _part(output, file).exists():
        log.warning("%s: is not what was written, or its report is not: merged again", output / file)
    return None


def _write_shard(work: _Work, path: Path, pieces: list[OutputTensor]) -> dict[str, Any]:
    """Writes one file of the output and returns the report of its tensors."""
    entries = {}
    with new_shard(path, pieces) as shard:
        for piece, following in itertools.zip_longest(pieces, pieces[1:]):
            for checkpoint, name in zip(work.job.inputs, following.sources if following else (), strict=False):
                checkpoint.read_ahead(name)
            entries[piece.name] = _piece(work, piece, shard)
    return entries


def _piece(work: _Work, piece: OutputTensor, shard: Shard) -> dict[str, Any]:
    """Merges one tensor and returns its report."""
    first = work.job.inputs[0]
    if piece.dtype not in FLOATS or first.entries[piece.sources[0]].dtype not in FLOATS:
        return _copy_bytes(work, piece, shard)
    entry: dict[str, Any] = {"copied": True}
    if piece.merged:
        entry = _merge(work, piece, shard)
    if piece.merged < piece.size:
        _copy_rest(work, piece, shard)
        entry["elements_copied"] = piece.size - piece.merged
    return entry


def _merge(work: _Work, piece: OutputTensor, shard: Shard) -> dict[str, Any]:
    job = work.job
    method = load_method(job.method)
    tensor = _tensor(job, piece, work.workers)
    values = job.values(piece.name)
    measured = method.measure(tensor, values)
    if piece.name in work.pooled:
        measured = replace(measured, coefficients=np.array(work.pooled[piece.name]))
    put = _writer(work, piece, shard)

    def one(start: int, block: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
        chunks = -(-block.shape[1] // CHUNK)
        moved, merged = np.zeros((len(block) - 1, chunks)), np.zeros((1, chunks))
        both = scratch("both", (2, block.shape[1]))  # the base, and the result
        if method.BASE:
            update_squares(block, moved)
            both[0] = block[0]
        counts = method.combine(block, start, measured, values, both[1])
        if method.BASE:
            update_squares(both, merged)
        put(start, both[1])
        return counts, moved, merged

    blocks = tensor.blocks(one)
    counts = np.array([found[0] for found in blocks], np.int64).reshape(-1, 3).sum(axis=0)
    squares = [_total([found[1] for found in blocks]), _total([found[2] for found in blocks])] if method.BASE else []
    return _entry(job, tensor, measured, counts, squares)


def _total(parts: list[np.ndarray]) -> np.ndarray:
    """float64 [rows]: the sums of all chunks."""
    total: np.ndarray = np.concatenate(parts, axis=1).sum(axis=1)
    return total


def _entry(
    job: MergeJob, tensor: Tensor, measured: TensorStats, counts: np.ndarray, squares: list[np.ndarray]
) -> dict[str, Any]:
    """The report of a merged tensor."""
    names = job.names
    selected, kept, left = (int(count) for count in counts)
    if measured.selection is not None:
        share = float(measured.selection.counts.mean()) / tensor.size if tensor.size else 1.0
    else:
        share = selected / (len(names) * tensor.size) if tensor.size else 1.0
    entry: dict[str, Any] = {
        "coefficients": {name: _rounded(value) for name, value in zip(names, measured.coefficients, strict=True)},
        "selected": _rounded(share),
        "erased": _rounded(1 - left / kept) if kept else 0.0,
    }
    if squares:
        moved, merged = (np.sqrt(part / tensor.size) for part in squares)
        entry["updates"] = {name: _rounded(size) for name, size in zip(names, moved, strict=True)}
        entry["merged_update"] = _rounded(merged[0])
    return entry


def _rounded(value: float) -> float:
    """Nine significant digits."""
    return float(f"{value:.9g}")


def _tensor(job: MergeJob, piece: OutputTensor, workers: Workers) -> Tensor:
    stored = tuple(checkpoint.stored(name) for checkpoint, name in zip(job.inputs, piece.sources, strict=True))
    return Tensor(piece.name, stored, piece.merged, workers)


def _writer(work: _Work, piece: OutputTensor, shard: Shard) -> Callable[[int, np.ndarray], None]:
    """A function that writes float32 values from an element on, in the output's dtype. Raises ModelError if they are not finite."""
    lock = Lock()

    def put(start: int, values: np.ndarray) -> None:
        if piece.dtype == "F32":
            lost, stored = count_not_finite(values), values
        else:
            stored = scratch("stored", values.shape, np.uint16)
            lost = (encode_bfloat16 if piece.dtype == "BF16" else encode_float16)(values, stored)
        if lost:
            raise ModelError(
                f"{piece.name}: {lost} merged values near element {start} are too large for {piece.dtype}; "
                "choose a wider dtype, or smaller weights"
            )
        shard.put(piece, start, stored)
        with lock:
            work.advance(stored.nbytes)
            shard.flush_behind(stored.nbytes)

    return put


def _copy_rest(work: _Work, piece: OutputTensor, shard: Shard) -> None:
    """Copies the elements that are not merged from the first input."""
    rest = work.job.inputs[0].stored(piece.sources[0]).rest(piece.merged)
    put, whole = _writer(work, piece, shard), Tensor(piece.name, (rest,), rest.size, work.workers)
    whole.blocks(lambda start, block: put(piece.merged + start, block[0]))


def _copy_bytes(work: _Work, piece: OutputTensor, shard: Shard) -> dict[str, Any]:
    """Copies an integer buffer from the first input."""
    job, differs = work.job, False
    for start in range(0, piece.bytes, COPIED):
        first, *others = (c.bytes(name, start, COPIED) for c, name in zip(job.inputs, piece.sources, strict=False))
        shard.put_bytes(piece, start, first)
        differs |= any(first != other for other in others)
        work.advance(len(first))
    if differs:
        log.warning(
            "%s: a buffer of whole numbers that differs between the models; %s's is kept",
            piece.name,
            job.inputs[0].label,
        )
    return {"copied": True, "differs": differs}


def _pooled(job: MergeJob, output: Path, workers: Workers) -> dict[str, list[float]]:
    """Each tensor's coefficients from updates summed over its layer or the whole model. Saved for a resumed merge."""
    method = load_method(job.method)
    file = output / SQUARES
    found = read_sealed(file)
    if found is None:
        found = {}
        for piece in job.plan.pieces:
            if piece.merged:
                squares = method.measure(_tensor(job, piece, workers), job.values(piece.name)).squares
                assert squares is not None, f"{job.method} has no coefficients to be pooled"
                found[piece.name] = squares.tolist()
        write_sealed(file, found)
    by_tensor = {name: np.array(squares) for name, squares in found.items()}

    def group(name: str) -> str:
        found = stack_of(name)
        if job.granularity == "model":
            return ""
        return name if found is None else f"{found[0]}.{found[1]}"

    total: dict[str, np.ndarray] = {}
    for name, squares in by_tensor.items():
        total[group(name)] = total.get(group(name), 0) + squares
    return {name: shares(total[group(name)]).tolist() for name in by_tensor}


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if free < needed:
        raise StorageError(
            f"{output}: the merged model needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB left"
        )
