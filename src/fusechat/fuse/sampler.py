"""The order of conversations: of sets with weights, epoch by epoch; and when several processes train together, that of one process,
filled up to whole batches."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, RandomSampler, Sampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from fusechat.fuse.dataset import PAD_INDEX, FusionData

Epoch = Callable[[], int]  # which epoch begins, from 0 on


def _seeded(sampler: Any, seed: int | None) -> Any:
    """A random order as the one that Accelerate makes of it for one process; any other as it is."""
    if not isinstance(sampler, RandomSampler):
        return sampler
    from accelerate.data_loader import SeedableRandomSampler

    return SeedableRandomSampler(sampler.data_source, data_seed=seed)


def _at(sampler: Any, epoch: int, seed: int | None) -> Any:
    """The sampler with the order of an epoch. That by lengths would draw it from where the random numbers happen to be, which in a
    run that continues within an epoch is not where they were when it began."""
    if isinstance(sampler, LengthGroupedSampler):
        sampler.generator = torch.Generator().manual_seed((seed or 0) + epoch)
    elif hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return sampler


class WeightedSampler(Sampler[int]):
    """Indices of the conversations that each epoch holds, in the order that the sampler which `order` makes gives them."""

    def __init__(self, data: FusionData, order: Callable[[Dataset[Any]], Any], *, seed: int, epoch: Epoch) -> None:
        self.data, self.order, self.seed, self.epoch = data, order, seed, epoch

    def __len__(self) -> int:
        return self.data.examples_per_epoch

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        members = self.data.epoch(epoch, seed=self.seed)
        sampler = _seeded(self.order(Subset(self.data, members)), self.seed)
        return (members[index] for index in _at(sampler, epoch, self.seed))


class FilledSampler(Sampler[int]):
    """`sampler`'s indices, padded with `PAD_INDEX` to a multiple of `multiple`; with `drop_last`, without the last ones that make
    no whole multiple.

    Accelerate would fill up with conversations from the beginning of the epoch, which then counted twice; nor does it tell the
    epoch to samplers of several processes that continue in the middle of one.
    """

    def __init__(self, sampler: Any, multiple: int, *, seed: int | None, epoch: Epoch, drop_last: bool = False) -> None:
        self.sampler, self.multiple, self.seed, self.epoch = _seeded(sampler, seed), multiple, seed, epoch
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, left = divmod(len(self.sampler), self.multiple)
        return (whole + (left > 0 and not self.drop_last)) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from islice(_at(self.sampler, self.epoch(), self.seed), len(self))
        yield from [PAD_INDEX] * (len(self) - len(self.sampler))
