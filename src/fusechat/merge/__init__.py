"""Stage 5, merge: merges target LLMs in parameter space. Public: `merge`."""

from typing import Any

__all__ = ["merge"]


def __getattr__(name: str) -> Any:
    if name == "merge":  # imports numba, which would slow down the command line's start
        from fusechat.merge.standalone import merge

        return merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
