"""`kill -9` at any moment, then the same command again: the same bytes as a run that was never interrupted."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import runs
from fusechat.config import STAGES


def test_a_killed_run_ends_with_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    """Three kills in every stage and some at random times; `killer.py` says how."""
    recipe = runs.write_recipe(tmp_path, models)
    killer = Path(__file__).with_name("killer.py")
    done = subprocess.run(
        [sys.executable, str(killer), str(recipe), str(tmp_path / "reference"), str(tmp_path / "scratch"), "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for stage in STAGES:
        assert report[stage]["kills"] == 3, stage
        assert report[stage]["differing"] == [], stage
    assert report["random times"]["kills"] >= 3
    assert report["random times"]["differing"] == []


def test_status_tells_running_from_begun(models: dict[str, Path], tmp_path: Path) -> None:
    recipe, work = runs.write_recipe(tmp_path, models), tmp_path / "work"
    assert runs.fusechat("run", recipe, "--workdir", work, "--until", "prepare").returncode == 0
    manifest = json.loads((work / "prepare" / "pivot" / "data" / "manifest.json").read_text())
    begun = work / "prepare" / "pivot" / "data" / "started.json"
    begun.write_text(json.dumps({"fingerprint": manifest["fingerprint"]}))
    (begun.parent / "manifest.json").unlink()

    def state() -> str:
        states = json.loads(runs.fusechat("status", work, "--json").stdout)
        return next(entry["state"] for entry in states if entry["step"] == "prepare pivot/data")

    assert state() == "partial"
    with (begun.parent.parent / ".data.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert state() == "running"
