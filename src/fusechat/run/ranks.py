"""Several processes ("ranks") started by `torchrun` or `accelerate launch`, and how they agree.

The first one decides and does unshared work while the others wait. A process that fails ends, and the launcher ends the others.
With one process nothing here has a cost, and PyTorch is not imported.
"""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from fusechat.errors import FuseChatError, StorageError, storage_error

T = TypeVar("T")
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # messages of gloo and NCCL
_PATIENCE = timedelta(days=14)  # maximum wait for another rank; the launcher ends failed runs sooner


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def is_first() -> bool:
    """Whether this is process 0."""
    return rank() == 0


def from_first(compute: Callable[[], T]) -> T:
    """Runs `compute` on the first rank and returns its (pickled) result on every rank. FuseChatErrors, and errors of the disk,
    are raised on every rank."""
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
    """Runs `do` on the first rank of each machine, such as filling its cache; the others wait. A FuseChatError is raised on
    every rank, and reported by the first that had it."""
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
    """Every rank's value, in order, on every rank. Waits for all."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_group())
    return found


def share(pieces: int, *, one_a_machine: bool = False) -> list[int]:
    """The numbers of the pieces of work that this process does, every n-th. All processes must call it. `one_a_machine`: only
    the first process of each machine works."""
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
    """A gloo group of all ranks, in addition to the one for training, which is created here too."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def peer_died(error: BaseException) -> bool:
    """Whether an error only means that another rank ended, which reports why itself, or was killed."""
    seen: BaseException | None = error
    while seen is not None and world() > 1:
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _GONE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def shut_down() -> None:
    """Leaves the process groups after a successful run."""
    if world() == 1 or not _group.cache_info().currsize:
        return
    import torch.distributed as dist

    gather(None)
    dist.destroy_process_group()
    _group.cache_clear()
