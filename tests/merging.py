"""One tensor merged as the engine does it, but from arrays to an array: measured, then combined block by block."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusechat.merge.methods import Method, load_method
from fusechat.merge.parameters import Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.tensor import BLOCK, Stored, Tensor, Workers

Row = Sequence[float] | np.ndarray  # of an array, the dtype says how it is stored: uint16 has the bits of bfloat16


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def merged(
    method: str,
    base: Row | None,
    targets: Sequence[Row],
    *,
    values: Mapping[str, Any] | None = None,
    threads: int = 1,
    block: int = BLOCK,
    name: str = "tensor",
) -> tuple[np.ndarray, TensorStats, tuple[int, int, int]]:
    """(float32 [n], what was measured, what `combine` counted); no base where the method has none."""
    module = load_method(method)
    assert (base is not None) == module.BASE
    workers = Workers(threads)
    try:
        tensor = tensor_of([*([] if base is None else [base]), *targets], workers, block=block, name=name)
        return merged_tensor(module, tensor, values_of(module, len(targets), values or {}))
    finally:
        workers.close()


def merged_tensor(
    module: Method, tensor: Tensor, values: Values
) -> tuple[np.ndarray, TensorStats, tuple[int, int, int]]:
    measured = module.measure(tensor, values)
    out = np.full(tensor.size, np.nan, np.float32)

    def work(start: int, rows: np.ndarray) -> tuple[int, int, int]:
        return module.combine(rows, start, measured, values, out[start : start + rows.shape[1]])

    counts = np.array(tensor.blocks(work), np.int64).reshape(-1, 3).sum(axis=0)
    return out, measured, tuple(counts.tolist())


def tensor_of(rows: Sequence[Row], workers: Workers, *, block: int = BLOCK, name: str = "tensor") -> Tensor:
    arrays = [row if isinstance(row, np.ndarray) else floats(*row) for row in rows]
    stored = tuple(Stored.of(array, f"model {number}") for number, array in enumerate(arrays))
    return Tensor(name, stored, arrays[0].size, workers, block)


def values_of(module: Method, targets: int, given: Mapping[str, Any]) -> Values:
    """What is given and the defaults of the rest; one value stands for all models."""
    assert given.keys() <= {parameter.name for parameter in module.PARAMETERS}
    values: Values = {}
    for parameter in module.PARAMETERS:
        value = given[parameter.name] if parameter.required else given.get(parameter.name, parameter.default)
        values[parameter.name] = [value] * targets if parameter.per_model and not isinstance(value, list) else value
    return values
