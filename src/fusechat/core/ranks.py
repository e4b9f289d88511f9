"""More than one process: what `torchrun` or `accelerate launch` started, and how its processes ("ranks") agree.

One process decides and does what is not shared, the first; the others wait for its word. A process that fails ends, and the
launcher ends the others. With one process nothing here costs anything, and PyTorch is not imported.
"""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from fusechat.errors import FuseChatError

T = TypeVar("T")
_PATIENCE = timedelta(days=14)  # how long one rank may work while the others wait; the launcher ends them sooner


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` gives on the first rank, on every rank (it is pickled). A FuseChatError is raised on every rank."""
    if world() == 1:
        return compute()
    outcome: tuple[bool, Any] | None = None
    if is_first():
        try:
            outcome = True, compute()
        except FuseChatError as error:
            outcome = False, error
    done, value = _broadcast(outcome)
    if done:
        return value
    if isinstance(value, FuseChatError):
        value.told = not is_first()
    raise value


def gather(value: T) -> list[T]:
    """Every rank's value, in their order, on every rank. It waits until all are there."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_group())
    return found


def _broadcast(value: Any) -> Any:
    import torch.distributed as dist

    box = [pickle.dumps(value) if is_first() else None]
    dist.broadcast_object_list(box, src=0, group=_group())
    assert box[0] is not None
    return pickle.loads(box[0])


@lru_cache(maxsize=1)
def _group() -> Any:
    """A group of all ranks over gloo, beside the one that training uses, which is made here as well."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def leave() -> None:
    """Takes leave of the other ranks, at the end of a run that went well."""
    if world() == 1 or not _group.cache_info().currsize:
        return
    import torch.distributed as dist

    gather(None)
    dist.destroy_process_group()
    _group.cache_clear()
