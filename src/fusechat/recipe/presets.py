"""Groups of settings that a recipe selects by `preset: NAME`; its own settings override them."""

from copy import deepcopy
from typing import Any

# The paper's (arXiv 2408.07990, sections 3 and 4.1): alignment by dynamic time warping and the most frequent token, one-hot gold
# tokens at unaligned rows, cross-entropies per token, the published training, SCE's τ for 7B models.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "data": {"max_length": 2048, "truncate": "token"},
        "capture": {"top_k": 10},
        "align": {
            "sequence": "dtw",
            "vocabulary": "statistics",
            "top_1": True,
            "unaligned": "label",
            "look_ahead": False,
            "chain_rule": False,
            "min_mass": 0.0,
        },
        "fuse": {
            "function": "mince",
            "unit": "token",
            "level": "conversation",
            "against": "pivot",
            "loss": "cross_entropy",
            "tail": "renormalise",
            "temperature": 1.0,
            "sft_weight": 0.9,
            "training": {
                "num_train_epochs": 3,
                "learning_rate": 5e-6,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03,
            },
        },
        "merge": {
            "method": "sce",
            "granularity": "tensor",
            "select_topk": 0.1,
            "select_deltas": True,
            "normalize": True,
        },
    },
}


def with_preset(raw: Any) -> Any:
    """A raw recipe with its preset's settings as defaults. Other forms are left to validation."""
    if not isinstance(raw, dict) or not isinstance(raw.get("preset"), str) or raw["preset"] not in PRESETS:
        return raw
    preset = deepcopy(PRESETS[raw["preset"]])
    merge = raw.get("merge")
    if isinstance(merge, dict) and merge.get("method", "sce") != "sce":
        del preset["merge"]  # another method has other parameters
    return _filled(raw, preset)


def _filled(own: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    filled = dict(own)
    for key, value in preset.items():
        if isinstance(value, dict) and isinstance(own.get(key), dict):
            filled[key] = _filled(own[key], value)
        elif key not in own:
            filled[key] = value
    return filled
