"""Merging as `fusechat merge` does it, and SCE with its steps left out, one tensor at a time in NumPy
(arXiv 2408.07990, Algorithm 1)."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

STEPS = ("select", "calculate", "erase")


def merge(config: dict[str, Any], pivot: Path, targets: list[Path], out: Path) -> None:
    """`config`: `method` and its parameters, of SCE also `without`: the steps to leave out."""
    config = dict(config)
    if "without" in config:
        _sce_without(config["without"], config["select_topk"], pivot, targets, out)
        return
    from fusechat.merge import merge as fusechat_merge

    method = config.pop("method")
    if method == "linear":
        config.setdefault("weight", 1.0)
    own = {name: config.pop(name) for name in ("weight", "density") if name in config}
    whole: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(target), **({"parameters": own} if own else {})} for target in targets],
        "parameters": config,
        "dtype": "float32",
    }
    if method != "linear":
        whole["base_model"] = str(pivot)
    fusechat_merge(whole, out)


def _sce_without(without: list[str], select_topk: float, pivot: Path, targets: list[Path], out: Path) -> None:
    shutil.copytree(pivot, out)
    base = load_file(pivot / "model.safetensors")
    others = [load_file(target / "model.safetensors") for target in targets]
    merged = {
        name: (tensor + sce(np.stack([other[name] - tensor for other in others]), select_topk, without)).astype(
            np.float32
        )
        for name, tensor in base.items()
    }
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def sce(updates: np.ndarray, select_topk: float, without: list[str]) -> np.ndarray:
    """The merged update of one tensor. `updates`: float32 [targets, *shape]."""
    kept = updates.reshape(len(updates), -1).astype(np.float64)
    if "select" not in without and select_topk < 1 and len(kept) > 1:
        variances = len(kept) * (kept**2).sum(axis=0) - kept.sum(axis=0) ** 2  # times a constant
        count = int(select_topk * np.count_nonzero(variances))
        mask = np.zeros(kept.shape[1], bool)
        mask[np.argsort(-variances, kind="stable")[:count]] = True
        kept = kept * mask
    squares = (kept**2).sum(axis=1)
    shares = np.full(len(kept), 1 / len(kept))
    if "calculate" not in without and squares.sum() > 0:
        shares = squares / squares.sum()
    left = kept != 0
    if "erase" not in without:
        left &= (kept > 0) == (kept.sum(axis=0) >= 0)
    weights = shares[:, None] * left
    total = weights.sum(axis=0)
    merged = (weights * kept).sum(axis=0) / np.where(total > 0, total, 1)
    return merged.reshape(updates.shape[1:])
