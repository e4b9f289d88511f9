"""Several runs in one work directory: a job for each source, two of the same, one that is killed while another waits."""

import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import runs
from forks import Command
from fusechat.pipeline import build_steps, load_recipe

STEPS = 32


def start(finished: Path, work: Path, *options: str) -> Command:
    return Command("run", finished / "recipe.yaml", "--workdir", work, *options)


def end(process: Command) -> str:
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    return stderr


def done_now(stderr: str) -> int:
    return int(stderr.rpartition(" steps done now")[0].split()[-1])


def same_weights(work: Path, finished: Path) -> bool:
    return all(
        (work / name).read_bytes() == (finished / "work" / name).read_bytes()
        for name in ("merge/model/model.safetensors", "fuse/gemma/model/model.safetensors")
    )


def test_a_job_for_each_source_and_one_for_the_rest(finished: Path, tmp_path: Path) -> None:
    """Side by side, and with one that does it all: what they share is done once, and the outcome is that of one run."""
    work = tmp_path / "work"
    every = [
        start(finished, work, "--only", "mistral"),
        start(finished, work, "--only", "gemma"),
        start(finished, work),
    ]
    assert sum(done_now(end(process)) for process in every) == STEPS
    assert {step.state()[0] for step in build_steps(load_recipe(finished / "recipe.yaml"), work)} == {"done"}
    assert same_weights(work, finished)
    assert not list(work.rglob(".*.lock"))


def test_a_run_goes_on_where_the_one_it_waits_for_was_killed(finished: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = start(finished, work)
    place = work / "capture"
    while not any(place.rglob("started.json")) and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it holds its step, and does nothing
    second = start(finished, work)
    deadline = time.monotonic() + 120
    waiting = ""
    while f"process {first.pid} is doing it" not in waiting and time.monotonic() < deadline:
        waiting += second.stderr.readline()
    assert f"process {first.pid} is doing it; waiting" in waiting
    states = json.loads(runs.here("status", work, "--json").stdout)
    assert "running" in {step["state"] for step in states}
    first.kill()
    first.wait()
    end(second)
    assert same_weights(work, finished)


def test_a_file_system_without_locks_is_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = runs.here("run", finished / "recipe.yaml", "--workdir", tmp_path / "work")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"fusechat: error: {tmp_path / 'work' / '.starting.lock'}: cannot be locked (No locks available): its file system must "
        "support locks; choose another --workdir"
    )


def test_another_recipe_waits_its_turn(finished: Path, tmp_path: Path) -> None:
    """While a run continues, one of a changed recipe is refused, and so is what needs the work directory for itself."""
    work = tmp_path / "work"
    first = start(finished, work)
    while not (work / "prepare").is_dir() and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        other = runs.here("run", finished / "recipe.yaml", "--workdir", work, "--set", "fuse.sft_weight=0.1")
        assert other.returncode == 2
        assert other.stderr.splitlines()[-1] == (
            f"fusechat: error: {work}: another recipe is being run in it; wait for that, or choose another --workdir"
        )
    finally:
        os.kill(first.pid, signal.SIGCONT)
    end(first)
    assert same_weights(work, finished)
