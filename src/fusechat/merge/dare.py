"""DARE (arXiv 2311.03099): drops each update with probability 1 - density and rescales the rest.

As in mergekit, the rest is scaled to the update's original sum of magnitudes (`rescale`, the default): the paper's 1 / density,
but exact for the drawn mask. `random.keep_mask` draws the mask from seed and tensor.
"""

import numpy as np

from fusechat.merge.parameters import DENSITY, LAMBDA, SEED, WEIGHT, Parameter, Values
from fusechat.merge.random import keep_mask, tensor_key
from fusechat.merge.stats import TensorStats
from fusechat.merge.task_vectors import Sparsify, combine_updates, drop, rescaling
from fusechat.merge.tensor import Tensor, scratch

PARAMETERS = (
    WEIGHT,
    DENSITY,
    Parameter("normalize", kind=bool, default=False),
    Parameter("rescale", kind=bool, default=True),
    LAMBDA,
    SEED,
)


def measure(tensor: Tensor, values: Values) -> TensorStats:
    """The weights, and the factor of each target's sparse update."""
    key = tensor_key(values["seed"], tensor.name)
    sparse = any(density < 1 for density in values["density"])
    scales = rescaling(tensor, _dropping(key, values)) if sparse and values["rescale"] else None
    return TensorStats(np.array(values["weight"], np.float64), scales=scales, key=key)


def combine(
    block: np.ndarray, start: int, measured: TensorStats, values: Values, out: np.ndarray, *, consensus: bool
) -> tuple[int, int, int]:
    """Drops updates, rescales, and adds them up; with `consensus` by TIES' sign election."""
    return combine_updates(
        block, start, values, out, sparsify=_dropping(measured.key, values), scales=measured.scales, consensus=consensus
    )


def _dropping(key: int, values: Values) -> Sparsify:
    def sparsify(block: np.ndarray, start: int) -> int:
        n = block.shape[1]
        mask = scratch("mask", (n,), np.bool_)
        count = 0
        for target, density in enumerate(values["density"]):
            if density >= 1:
                count += n
                continue
            keep_mask(key, target, start, density, mask)
            count += drop(block[target + 1], mask)
        return count

    return sparsify
