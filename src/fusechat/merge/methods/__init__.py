"""One merging method a file, named as in a configuration: to add a method is to add a file.

A method's module has `PARAMETERS`, `BASE` (whether it works on updates from a base model; else every model is an input),
`TARGETS` (how many it takes; None: any number) and two functions, which know arrays only:

- `measure(tensor, values) -> Measured`: what must be known of the whole tensor before any of it can be merged;
- `combine(block, start, measured, values, out) -> (selected, kept, left)`: merges the float32 block [inputs, n], whose first
  element is number `start` of the tensor, into `out` float32 [n]; it may overwrite the targets' rows. Of the targets' entries,
  `selected` were not dropped, `kept` of those took part (updates of zero do not, where signs are asked), `left` were not erased.

One that does not take all values may have `check(name, values)`, which is asked of every tensor before anything is merged, and
raises RecipeError. One whose coefficients are the targets' shares in the squared updates may have `GRANULARITIES`, over what they
can be added up.
"""

import importlib
import pkgutil
from typing import Any, Protocol

import numpy as np

from fusechat.merge.parameters import Parameter, Values
from fusechat.merge.stats import TensorStats
from fusechat.merge.tensor import Tensor


class Method(Protocol):
    PARAMETERS: tuple[Parameter, ...]
    BASE: bool
    TARGETS: int | None

    def measure(self, tensor: Tensor, values: Values) -> TensorStats: ...

    def combine(
        self, block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray
    ) -> tuple[int, int, int]: ...


def method_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> Method:
    module: Any = importlib.import_module(f"{__name__}.{name}")
    method: Method = module
    return method
