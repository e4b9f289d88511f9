"""The order of conversations: epochs of weighted sets, and whole batches when several processes train together."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, RandomSampler, Sampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from fusechat.fuse.dataset import PAD_INDEX, FusionData

Epoch = Callable[[], int]  # returns the number of the epoch that begins, from 0


def _seeded(sampler: Any, seed: int | None) -> Any:
    """A random sampler as Accelerate makes it for one process; other samplers unchanged."""
    if not isinstance(sampler, RandomSampler):
        return sampler
    from accelerate.data_loader import SeedableRandomSampler

    return SeedableRandomSampler(sampler.data_source, data_seed=seed)


def _at(sampler: Any, epoch: int, seed: int | None) -> Any:
    """The sampler with the order of an epoch. The order by length is seeded too: the global random state would differ in a run
    that resumes within an epoch."""
    if isinstance(sampler, LengthGroupedSampler):
        sampler.generator = torch.Generator().manual_seed((seed or 0) + epoch)
    elif hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return sampler


class WeightedSampler(Sampler[int]):
    """Indices of each epoch's conversations, ordered by the sampler that `order` makes."""

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
    """The indices of `sampler`, padded with `PAD_INDEX` to a multiple of `multiple`; with `drop_last`, cut to one.

    Accelerate would instead repeat conversations from the beginning of the epoch. It also does not set the epoch of samplers of
    several processes that resume within one.
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
