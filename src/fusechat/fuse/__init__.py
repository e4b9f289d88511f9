"""Stage 4, fuse: fine-tunes the pivot against each source's aligned distributions. Public: `fusion_loss`."""

from typing import Any

__all__ = ["fusion_loss"]


def __getattr__(name: str) -> Any:
    if name == "fusion_loss":  # imports torch, which would slow down the command line's start
        from fusechat.fuse.loss import fusion_loss

        return fusion_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
