"""The order of conversations when several processes train together: that of one process, filled up to whole batches."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import RandomSampler, Sampler

from fusechat.fuse.dataset import NOBODY


class FilledSampler(Sampler[int]):
    """`sampler`'s indices, then as many of `NOBODY` as make their number a multiple of `multiple`.

    Accelerate would fill up with conversations from the beginning of the epoch, which then counted twice.
    """

    def __init__(self, sampler: Any, multiple: int, *, seed: int | None) -> None:
        if isinstance(sampler, RandomSampler):  # the order that Accelerate makes of it for one process
            from accelerate.data_loader import SeedableRandomSampler

            sampler = SeedableRandomSampler(sampler.data_source, data_seed=seed)
        self.sampler, self.multiple = sampler, multiple

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [NOBODY] * (len(self) - len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
