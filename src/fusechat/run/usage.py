"""The cores that this process may use, and the memory that it used at most. Child processes are not counted."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_PEAK = "5"  # written to clear_refs to reset the peak, see proc_pid_clear_refs(5)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def watch() -> Callable[[], dict[str, int]]:
    """Starts measuring. The returned function gives `peak_memory_bytes`, the maximum resident memory of the process, and
    `peak_gpu_bytes`, the maximum of PyTorch's tensors on one GPU, each only if known."""
    counted = _reset()
    gpus = _cuda()
    for device in range(gpus.device_count()) if gpus else ():
        gpus.reset_peak_memory_stats(device)

    def peaks() -> dict[str, int]:
        found = {"peak_memory_bytes": _resident()} if counted else {}
        used = _cuda()  # may have started since
        if used:
            found["peak_gpu_bytes"] = max(used.max_memory_allocated(device) for device in range(used.device_count()))
        return {name: size for name, size in found.items() if size}

    return peaks


def _reset() -> bool:
    try:
        _RESET.write_text(_PEAK)
    except OSError:  # not Linux, or not allowed
        return False
    return bool(_resident())


def _resident() -> int:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _cuda() -> Any:
    """`torch.cuda` if it is in use, else None; initialises neither."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None
