"""What is trained how: the settings that all rows share, and what a row changes in them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from miniature.chatters import PIVOT, SOURCES

ALL, SFT = "all", "sft"  # targets beside one of each source: taught by all of them, and by none
Changes = dict[str, Any]  # sections of a recipe, and `conversations`, `sources`

RECIPE: dict[str, Any] = {
    "data": {"max_length": 512},
    "capture": {"top_k": 10, "dtype": "float32", "batch_tokens": 8192},
    "align": {"processes": 1},
    "fuse": {
        "sft_weight": 0.3,
        "training": {
            "num_train_epochs": 2,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
        },
    },
    "evaluate": {"bits_per_byte": False, "answers": 0},
    "device": "cpu",
}
CONVERSATIONS: dict[str, Any] = {"a_skill": 200, "wrong": 0.2, "rare": 1.0}  # see `corpus.lesson`


def recipe(changes: Changes, *, seed: int, models: Path, train: Path) -> dict[str, Any]:
    """A recipe as a user would write it. `changes` go into its sections, key by key."""
    names = sources(changes)
    whole = {
        "name": "miniature",
        "pivot": str(models / PIVOT),
        "sources": {name: str(models / name) for name in names},
        "targets": {ALL: names, SFT: []},
        **deepcopy(RECIPE),
        "seed": seed,
    }
    whole["data"]["train"] = str(train)
    for section in ("capture", "align", "fuse"):
        given = deepcopy(changes.get(section, {}))
        training = {**whole[section].get("training", {}), **given.pop("training", {})}
        whole[section] |= given
        if training:
            whole[section]["training"] = training
    return whole


def sources(changes: Changes) -> list[str]:
    return list(changes.get("sources", SOURCES))


def conversations(changes: Changes) -> dict[str, Any]:
    return {**CONVERSATIONS, **changes.get("conversations", {})}
