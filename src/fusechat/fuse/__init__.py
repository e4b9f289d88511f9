"""Stage 4, fuse: the pivot is fine-tuned against each source's aligned distributions. `fusion_loss` is public."""

from typing import Any

__all__ = ["fusion_loss"]


def __getattr__(name: str) -> Any:
    if name == "fusion_loss":  # brings torch, which the command line's start should not wait for
        from fusechat.fuse.loss import fusion_loss

        return fusion_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
