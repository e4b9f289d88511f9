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
            "num_train_epochs": 6,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
        },
    },
    "evaluate": {"bits_per_byte": False, "answers": 0},
    "device": "cpu",
}
CONVERSATIONS: dict[str, Any] = {"a_skill": 1600, "wrong": 0.0, "rare": 1.0}  # see `corpus.lesson`
LONGEST = 48  # tokens of a source's answer
ANSWERED: Changes = {"samples": 1, "temperature": 0.0}  # what a `generate` says that its answers depend on


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
    if "generate" in changes:
        whole["generate"] = {"max_new_tokens": LONGEST, **changes["generate"]}
        if whole["generate"].get("targets") != "each":
            whole["fuse"]["function"] = "author"
    for section in ("capture", "align", "fuse"):
        given = deepcopy(changes.get(section, {}))
        training = {**whole[section].get("training", {}), **given.pop("training", {})}
        whole[section] |= given
        if training:
            whole[section]["training"] = training
    return whole


def sources(changes: Changes) -> list[str]:
    return list(changes.get("sources", SOURCES))


def answering(changes: Changes) -> Changes:
    """Of the changes, those that the sources' answers depend on: not who teaches what of them, and how."""
    how = {key: changes["generate"][key] for key in ANSWERED if key in changes["generate"]}
    kept: Changes = {key: changes[key] for key in ("conversations", "sources") if key in changes}
    return {**kept, "generate": how}


def conversations(changes: Changes) -> dict[str, Any]:
    return {**CONVERSATIONS, **changes.get("conversations", {})}
