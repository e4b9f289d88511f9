"""Merge methods, one file each, named as in a configuration. To add a method, add a file.

A method's module has `PARAMETERS`, `BASE` (whether it works on updates from a base model; else every model is an input),
`TARGETS` (how many it takes; None for any number) and two functions on arrays:

- `measure(tensor, values) -> TensorStats`: what the whole tensor determines, before any of it is merged;
- `combine(block, start, measured, values, out) -> (selected, kept, left)`: merges the float32 block [inputs, n], whose first
  element is number `start` of the tensor, into `out` float32 [n], and may overwrite the targets' rows. It counts entries of the
  targets: `selected`, not dropped; `kept`, of these not zero, if signs are elected; `left`, of these not erased.

Optional: `check(name, values)`, called for every tensor before anything is merged, raises RecipeError for unsuitable values;
`GRANULARITIES`, if coefficients are the targets' shares in the squared updates: what these can be summed over.
"""

import importlib
import pkgutil
from typing import Any, Protocol

import numpy as np

from fusechat.merge.parameters import Parameter, Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.tensor import Tensor


class Method(Protocol):
    """A merge method's module; see above."""

    PARAMETERS: tuple[Parameter, ...]
    BASE: bool
    TARGETS: int | None

    def measure(self, tensor: Tensor, values: Values) -> TensorStats: ...

    def combine(
        self, block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
    ) -> tuple[int, int, int]: ...


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> Method:
    """Imports a method's module."""
    module: Any = importlib.import_module(f"{__name__}.{name}")
    method: Method = module
    return method
