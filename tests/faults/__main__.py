"""`make faults`: harms runs of the tiny pipeline in every way there is, and tells what came of it; see docs/reliability.md.

    python -m faults [--seed N] [--scratch DIR] [--docs FILE] [--json FILE] [--only KIND]… [--quick]

Ends with status 1 where anything was lost: other weights, a traceback, a run that hangs, an error that does not name the damage.
`--quick`: some of each, in a minute or two.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numba  # noqa: F401
import torch
import transformers.trainer  # noqa: F401  (slow: imported before the forks, as what follows)
from rich import console, table  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import fusechat.fuse.trainer
import fusechat.generate.chosen
import fusechat.merge.standalone
import fusechat.models.generator
import fusechat.pipeline
import fusechat.report.page
import fusechat.rounds.kept  # noqa: F401
from faults import beside, damage, disks, figures, kills
from faults.place import LAUNCHES, LOST, Place, fused
from fusechat.recipe.schema import STAGES

ONE, TWO = LAUNCHES
KILLED = {
    "generate": 8,
    "prepare": 3,
    "capture": 10,
    "align": 3,
    "fuse": 25,
    "rounds": 20,
    "merge": 15,
    "evaluate": 3,
    "report": 2,
}


def plan(place: Place, *, quick: bool) -> dict[str, Callable[[], None]]:
    """Everything that is tried, by the name of its kind."""

    def every_kill() -> None:
        for launch, wanted, at_once in ((ONE, 15, 10), (TWO, 2, 3)) if quick else ((ONE, 140, 12), (TWO, 65, 10)):
            kills.series(place, launch, 0, ("fuse", "merge") if quick and launch == TWO else STAGES)
            number = 1
            while sum((fault.kind, fault.launch) == ("SIGKILL", launch) for fault in place.faults) < wanted:
                kills.series(place, launch, number, kills.drawn(place.chance("stages", launch, number), at_once))
                number += 1
        if not quick:
            kills.torchrun(place, 8)

    def every_alteration() -> None:
        damage.finished(place, ONE, most=3 if quick else None)
        for stage in ("fuse", "merge") if quick else STAGES:
            damage.unfinished(place, ONE, stage, 2 if quick else KILLED[stage])
        if not quick:
            damage.finished(place, TWO, most=10)
            for stage in ("capture", "fuse", "merge"):
                damage.unfinished(place, TWO, stage, 4)
        damage.remembered(place, ONE, 1 if quick else 10)
        damage.unseen(place, ONE, 1 if quick else 5)

    def every_removal() -> None:
        damage.removed(place, ONE, most=2 if quick else 60)
        if not quick:
            damage.removed(place, TWO, most=5)

    def every_disk() -> None:
        disks.limited(place, ONE, 1 if quick else 5)
        if not disks.can_mount():
            print("disks of their own are not tried: mounting needs root", file=sys.stderr)
            return
        disks.full(place, ONE, 1 if quick else 2, ("fuse",) if quick else STAGES)
        if not quick:
            disks.full(place, TWO, 1)
            disks.read_only(place, ONE)
            disks.forbidden(place, ONE)
            disks.cache(place, ONE)

    def every_pair() -> None:
        for number in range(1 if quick else 12):
            beside.two_at_once(place, ONE, number, kill=bool(number % 4) or quick)
        for number in range(0 if quick else 3):
            beside.two_at_once(place, TWO, number, kill=bool(number % 4))

    return {
        "kills": every_kill,
        "altered": every_alteration,
        "removed": every_removal,
        "disks": every_disk,
        "next to": every_pair,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__.split(";")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="an empty directory to work in [default: a temporary one]")
    parser.add_argument("--docs", type=Path, help="a page between whose marks the tables go")
    parser.add_argument("--json", type=Path, help="where every fault goes, with what came of it")
    parser.add_argument("--only", action="append", help="only this kind, as often as wanted")
    parser.add_argument("--quick", action="store_true", help="some of each, in a minute or two")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fusechat-faults-") as temporary:
        Path(temporary).chmod(0o755)
        scratch = (given.scratch or Path(temporary) / "scratch").resolve()
        os.environ["FUSECHAT_CACHE"] = str(scratch.with_name(f"{scratch.name}-cache"))
        place = Place(scratch, given.seed)
        wanted = plan(place, quick=given.quick)
        for kind in given.only or wanted:
            began, before = time.monotonic(), len(place.faults)
            wanted[kind]()
            print(f"{kind}: {len(place.faults) - before} in {time.monotonic() - began:.0f} s", file=sys.stderr)
        same = len({fused(reference.workdir) for reference in place.references.values()}) == 1
    text = figures.tables(place.faults)
    bits = "the same bits" if same else "bits of their own"
    text += f"\nSeed {given.seed}, Python {platform.python_version()}, PyTorch {torch.__version__}; two processes gave {bits}.\n"
    print(text)
    lost = [fault for fault in place.faults if fault.outcome == LOST]
    for fault in lost:
        print(f"LOST: {fault.kind}, {fault.launch}, {fault.what}\n  {fault.why}", file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps([asdict(fault) for fault in place.faults], indent=1) + "\n", encoding="utf-8")
    if given.docs:
        figures.write(given.docs, text)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
