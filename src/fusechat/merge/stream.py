"""Merging whole models tensor by tensor, shard by shard: memory-mapped safetensors in, safetensors out."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusechat.core.files import atomic_file, write_json
from fusechat.core.models import DTYPES
from fusechat.errors import ModelError
from fusechat.merge.methods import Merged

SHARD_BYTES = 4_000_000_000
Method = Callable[[Any, list[Any]], Merged]


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a model directory are: name → file."""

    directory: Path
    files: dict[str, Path]

    @classmethod
    def open(cls, directory: Path) -> "Weights":
        """Reads the index, or the headers where there is none. Raises ModelError for a file outside the directory."""
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
        else:
            names = {}
            for file in sorted(directory.glob("*.safetensors")):
                try:
                    with safe_open(str(file), framework="pt") as tensors:
                        names.update(dict.fromkeys(tensors.keys(), file.name))
                except SafetensorError as error:
                    raise ModelError(f"{file}: not a whole safetensors file: {error}") from error
        for name in set(names.values()):
            if Path(name).name != name or not (directory / name).is_file():
                raise ModelError(f"{directory}: the index names {name!r}, which is no file in that directory")
        return cls(directory, {tensor: directory / name for tensor, name in names.items()})


def shards(pivot: Weights, names: list[str]) -> list[tuple[str, list[str]]]:
    """(file name, tensors) of the output: `names` in their order, at most `SHARD_BYTES` of float32 a file."""
    groups: list[list[str]] = [[]]
    filled = 0
    with ExitStack() as stack:
        handles = _handles(pivot, stack)
        for name in names:
            size = 4 * _elements(handles[pivot.files[name]].get_slice(name).get_shape())
            if groups[-1] and filled + size > SHARD_BYTES:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", names) for i, names in enumerate(groups, 1)]


def merge_models(
    pivot: Path,
    targets: dict[str, Path],
    output: Path,
    *,
    method: Method,
    dtype: str | None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Writes the merged tensors to `output` and returns what happened to each, by name.

    Shards that an earlier, killed merge wrote whole are kept with their part of the report. Raises ModelError where a
    tensor is missing, of another shape, or not finite.
    """
    base = Weights.open(pivot)
    others = {name: Weights.open(directory) for name, directory in targets.items()}
    _same_tensors(base, others)
    report: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    names_of_all = sorted(
        next(iter(others.values())).files
    )  # a copy that the pivot keeps of a tied tensor is not among them
    for file, names in shards(base, names_of_all):
        part = output / f"{file}.report.json"
        if not part.is_file():
            merged = dict(_merge_shard(base, others, names, method, dtype, report, advance))
            with atomic_file(output / file) as temporary:
                save_file(merged, str(temporary), metadata={"format": "pt"})
            write_json(part, {name: report[name] for name in names})
        else:
            advance(len(names))
            report.update(json.loads(part.read_text()))
        weight_map.update(dict.fromkeys(names, file))
    for part in output.glob("*.report.json"):
        part.unlink()
    if len(set(weight_map.values())) > 1:
        size = sum((output / file).stat().st_size for file in set(weight_map.values()))
        write_json(
            output / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    return report


def _merge_shard(
    base: Weights,
    others: dict[str, Weights],
    names: list[str],
    method: Method,
    dtype: str | None,
    report: dict[str, Any],
    advance: Callable[[int], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        opened = {name: _handles(weights, stack) for name, weights in {"pivot": base, **others}.items()}
        for name in names:
            own = opened["pivot"][base.files[name]].get_tensor(name)
            tensors = {
                target: opened[target][weights.files[name]].get_tensor(name) for target, weights in others.items()
            }
            for target, tensor in tensors.items():
                if tensor.shape != own.shape:
                    raise ModelError(
                        f"{name}: is {list(own.shape)} in the pivot and {list(tensor.shape)} in target {target}"
                    )
            if not own.is_floating_point():  # a buffer of integers is not a parameter
                yield name, own
            else:
                for target, tensor in {"the pivot": own, **tensors}.items():
                    if not torch.isfinite(tensor).all():
                        raise ModelError(f"{name}: holds values that are not finite in {target}")
                merged = method(own.float().numpy(), [tensor.float().numpy() for tensor in tensors.values()])
                report[name] = {
                    "coefficients": {
                        target: round(c, 9) for target, c in zip(tensors, merged.coefficients, strict=True)
                    },
                    "selected": round(merged.selected, 9),
                    "erased": round(merged.erased, 9),
                }
                yield name, torch.from_numpy(merged.tensor).to(DTYPES[dtype] if dtype else own.dtype)
            report.setdefault(name, {"copied": True})
            advance(1)


def _same_tensors(base: Weights, others: dict[str, Weights]) -> None:
    first, *rest = others.items()
    for name, weights in rest:
        differing = sorted(first[1].files.keys() ^ weights.files.keys())
        if differing:
            raise ModelError(f"targets {first[0]} and {name} do not have the same tensors: {', '.join(differing[:3])}")
    lacking = sorted(first[1].files.keys() - base.files.keys())
    if lacking:
        raise ModelError(f"the pivot lacks tensors that target {first[0]} has: {', '.join(lacking[:3])}")


def _handles(weights: Weights, stack: ExitStack) -> dict[Path, Any]:
    return {file: stack.enter_context(safe_open(str(file), framework="pt")) for file in set(weights.files.values())}


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
