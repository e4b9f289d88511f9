"""Runs that are killed, altered, starved of disk, run twice at once: the short form of `make faults`; see docs/reliability.md."""

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import runs
from faults import disks
from faults.figures import BEGIN, END, tables, write
from faults.place import LOST, NAMED, SAME, Fault
from fusechat.recipe.schema import STAGES

HERE = Path(__file__).parent


@pytest.mark.slow
def test_whatever_happens_the_next_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Kills in every stage by both launches, and some of every other fault; `python -m faults` says how."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "faults",
            "--quick",
            "--scratch",
            tmp_path / "scratch",
            "--json",
            tmp_path / "faults.json",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert {fault["outcome"] for fault in faults} <= {SAME, NAMED}
    assert [fault for fault in faults if fault["others"]] == []
    times = Counter((fault["kind"], fault["launch"]) for fault in faults)
    assert times["SIGKILL", "one process"] >= 15
    assert times["SIGKILL", "two processes"] >= 2
    assert {fault["stage"] for fault in faults if fault["kind"] == "SIGKILL"} == set(STAGES)
    tried = {"altered when done", "altered after a kill", "altered unseen, empty cache", "cache altered", "removed"}
    tried |= {"files limited", *(["disk full"] if disks.can_mount() else [])}
    assert tried <= {kind for kind, _ in times}
    assert {"two at once", "two at once, one killed"} & {kind for kind, _ in times}, (
        "one may be done before its time comes"
    )


def test_the_tables_count_what_came_of_every_fault(tmp_path: Path) -> None:
    faults = [
        Fault("SIGKILL", "one process", "fuse", "", SAME),
        Fault("SIGKILL", "one process", "fuse", "", LOST, "hung", ["report/index.html"]),
        Fault("SIGKILL", "torchrun", "merge", "", SAME, "", ["report/index.html"]),
        Fault("removed", "one process", "", "", NAMED),
    ]
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write(page, tables(faults))
    assert page.read_text().startswith(f"above\n{BEGIN}\n")
    assert page.read_text().endswith(f"{END}\nbelow\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    assert rows[2:6] == [
        ["SIGKILL", "one process", "2", "1", "0", "0", "1"],
        ["SIGKILL", "torchrun", "1", "1", "0", "1", "0"],
        ["removed", "one process", "1", "0", "1", "0", "0"],
        ["**all**", "", "4", "2", "1", "1", "1"],
    ]
    assert rows[8:] == [
        ["one process", "0", "0", "0", "0", "2", "0", "0", "0", "0", "2"],
        ["torchrun", "0", "0", "0", "0", "0", "0", "1", "0", "0", "1"],
    ]


def test_status_tells_running_from_begun(copied: Path) -> None:
    work = copied / "work"
    manifest = json.loads((work / "prepare" / "pivot" / "data" / "manifest.json").read_text())
    begun = work / "prepare" / "pivot" / "data" / "started.json"
    begun.write_text(json.dumps({"fingerprint": manifest["fingerprint"]}))
    (begun.parent / "manifest.json").unlink()

    def state() -> str:
        states = json.loads(runs.here("status", work, "--json").stdout)
        return next(entry["state"] for entry in states if entry["step"] == "prepare pivot/data")

    assert state() == "partial"
    with (begun.parent.parent / ".data.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert state() == "running"
