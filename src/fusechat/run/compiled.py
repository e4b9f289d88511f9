"""Functions compiled by Numba, with the machine code cached where the directory is writable."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba

from fusechat.run.progress import log


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As `numba.njit(cache=True, nogil=True, **options)`. Without a writable cache it compiles in every run, with one log line."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        _say()
        return numba.njit(nogil=True, **options)(function)

    return decorate


@cache
def _say() -> None:
    log.warning(
        "compiled code cannot be kept, neither next to FuseChat nor in your home directory: set NUMBA_CACHE_DIR to keep it"
    )
