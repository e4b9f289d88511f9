"""When a target's rounds end, and which of their models is the target: the last whose own answers raised no alarm."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.rounds.alarms import NOTHING
from fusechat.run.files import atomic_directory

STOPPED = "stopped"  # a count of steps that did nothing, for the rounds had ended
Counts = Mapping[str, Any]


def why_stopped(before: Counts, kept: Counts, *, stop_on_alarm: bool) -> str:
    """Why a round is not trained; empty where it is. `before`: counts of the round before; `kept`: of what would be learnt."""
    if before.get(STOPPED):
        return "the round before was the last"
    if not kept["kept"]:
        return NOTHING
    return "; ".join(kept["alarms"]) if stop_on_alarm else ""


def sound_round(trained: Sequence[Counts], kept: Sequence[Counts], *, stop_on_alarm: bool) -> int:
    """The round whose model is the target, 0 for the first training. `trained`: counts of all models from that on; `kept`: of the
    answers of each of them, in order."""
    last = max(number for number, counts in enumerate(trained) if not counts.get(STOPPED))
    wrong = next((number for number, counts in enumerate(kept) if counts.get("alarms")), None)
    return last if wrong is None or not stop_on_alarm else min(last, max(0, wrong - 1))


def link_model(model: Path, target: Path) -> None:
    """The directory of a model under another name, with the same files, or copies where the file system cannot share them."""
    with atomic_directory(target) as building:
        shutil.copytree(model, building, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
