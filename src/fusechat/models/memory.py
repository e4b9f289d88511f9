"""Running out of memory: recognise it, and free what can be freed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_LIMITS = Path("/sys/fs/cgroup")


def out_of_memory(error: Exception) -> bool:
    """Whether `error` is an out-of-memory error of PyTorch or one of its backends."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)


def if_it_fits(work: Callable[[], T]) -> T | None:
    """The result of `work`, or None if it runs out of memory."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
    free_memory()  # after the exception and its frames are gone
    return None


def free_memory() -> None:
    """Frees cached memory. Call it when the exception and its frames are gone."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def free_bytes() -> int:
    """Bytes of memory available to this process; all of the machine's if the system does not say."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found = 1024 * int(told["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    try:
        used = int((_LIMITS / "memory.current").read_text())
        stat = dict(line.split() for line in (_LIMITS / "memory.stat").read_text().splitlines())
        found = min(found, int((_LIMITS / "memory.max").read_text()) - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no such file, or "max"
        pass
    return max(found, 0)
