"""Stage 5, merge: target LLMs become one model in parameter space. `merge` is public."""

from typing import Any

__all__ = ["merge"]


def __getattr__(name: str) -> Any:
    if name == "merge":  # brings numba, which the command line's start should not wait for
        from fusechat.merge.standalone import merge

        return merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
