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

from fusechat.errors import FuseChatError, StorageError, storage_error

T = TypeVar("T")
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo's words, and NCCL's
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
    """What `compute` gives on the first rank, on every rank (it is pickled). A FuseChatError is raised on every rank, and so is
    what says that the disk cannot be written to."""
    if world() == 1:
        return compute()
    outcome: tuple[bool, Any] | None = None
    if is_first():
        try:
            outcome = True, compute()
        except Exception as error:
            told = None if isinstance(error, FuseChatError) else storage_error(error)
            if told is None and not isinstance(error, FuseChatError):
                raise
            outcome = False, error if told is None else StorageError(told)
    done, value = _broadcast(outcome)
    if done:
        return value
    if isinstance(value, FuseChatError):
        value.reported = not is_first()
    raise value


def on_every_machine(do: Callable[[], object]) -> None:
    """The first rank of each machine does what its processes share and other machines do not see, such as filling the cache;
    the others wait. A FuseChatError is raised on every rank, and told by the first that had one."""
    error: FuseChatError | None = None
    if local_rank() == 0:
        try:
            do()
        except FuseChatError as found:
            error = found
    failed = [(number, found) for number, found in enumerate(gather(error)) if found is not None]
    if failed:
        number, raised = failed[0]
        raised.reported = number != rank()
        raise raised


def gather(value: T) -> list[T]:
    """Every rank's value, in their order, on every rank. It waits until all are there."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_group())
    return found


def share(pieces: int, *, one_a_machine: bool = False) -> list[int]:
    """Which pieces of work this process does: every so many-th. `one_a_machine`: the first process of each machine does the work,
    and the others wait. Every process has to call it."""
    local = gather(local_rank())
    working = [number for number, on_machine in enumerate(local) if not one_a_machine or on_machine == 0]
    return [piece for piece in range(pieces) if working[piece % len(working)] == rank()]


def _broadcast(value: Any) -> Any:
    import torch.distributed as dist

    box = [pickle.dumps(value) if is_first() else None]
    dist.broadcast_object_list(box, src=0, group=_group())
    assert box[0] is not None
    return pickle.loads(box[0])


@lru_cache(maxsize=1)
def _group() -> Any:
    """A group of all ranks over gloo, in addition to the one that training uses, which is made here as well."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def peer_died(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has ended, which tells why itself, or was killed."""
    seen: BaseException | None = error
    while seen is not None and world() > 1:
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _GONE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def shut_down() -> None:
    """Takes leave of the other ranks, at the end of a run that went well."""
    if world() == 1 or not _group.cache_info().currsize:
        return
    import torch.distributed as dist

    gather(None)
    dist.destroy_process_group()
    _group.cache_clear()
