"""Several runs in one work directory: a job for each source, two of the same, one that is killed while another waits."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fusechat.commands.run import run

import runs
from fusechat.pipeline import build_steps, load_recipe

STEPS = 32


@pytest.fixture(scope="module")
def reference(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, and the work directory `work` of one undisturbed run."""
    directory = tmp_path_factory.mktemp("beside")
    run(load_recipe(runs.write_recipe(directory, models)), directory / "work")
    return directory


def start(reference: Path, work: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "fusechat",
        "run",
        str(reference / "recipe.yaml"),
        "--workdir",
        str(work),
        *options,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def end(process: subprocess.Popen[str]) -> str:
    stderr = process.communicate(timeout=600)[1]
    assert process.returncode == 0, stderr
    return stderr


def done_now(stderr: str) -> int:
    return int(stderr.rpartition(" steps done now")[0].split()[-1])


def same_weights(work: Path, reference: Path) -> bool:
    return all(
        (work / name).read_bytes() == (reference / "work" / name).read_bytes()
        for name in ("merge/model/model.safetensors", "fuse/gemma/model/model.safetensors")
    )


def test_a_job_for_each_source_and_one_for_the_rest(reference: Path, tmp_path: Path) -> None:
    """Side by side, and with one that does it all: what they share is done once, and the outcome is that of one run."""
    work = tmp_path / "work"
    every = [
        start(reference, work, "--only", "mistral"),
        start(reference, work, "--only", "gemma"),
        start(reference, work),
    ]
    assert sum(done_now(end(process)) for process in every) == STEPS
    assert {step.state()[0] for step in build_steps(load_recipe(reference / "recipe.yaml"), work)} == {"done"}
    assert same_weights(work, reference)
    assert not list(work.rglob(".*.lock"))


def test_a_run_goes_on_where_the_one_it_waits_for_was_killed(reference: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = start(reference, work)
    place = work / "capture"
    while not any(place.rglob("started.json")) and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it holds its step, and does nothing
    second = start(reference, work)
    deadline = time.monotonic() + 120
    waiting = ""
    assert second.stderr is not None
    while f"process {first.pid} does it" not in waiting and time.monotonic() < deadline:
        waiting += second.stderr.readline()
    assert f"process {first.pid} does it; waiting for it" in waiting
    states = json.loads(runs.fusechat("status", work, "--json").stdout)
    assert "running" in {step["state"] for step in states}
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    end(second)
    assert same_weights(work, reference)


def test_a_file_system_without_locks_is_named(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = runs.here("run", reference / "recipe.yaml", "--workdir", tmp_path / "work")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"fusechat: error: {tmp_path / 'work' / '.starting.lock'}: cannot be locked (No locks available): its file system has to "
        "have locks; choose another --workdir"
    )


def test_another_recipe_waits_its_turn(reference: Path, tmp_path: Path) -> None:
    """While a run goes on, one of a changed recipe is refused, and so is what needs the work directory for itself."""
    work = tmp_path / "work"
    first = start(reference, work)
    while not (work / "prepare").is_dir() and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        other = runs.fusechat("run", reference / "recipe.yaml", "--workdir", work, "--set", "fuse.sft_weight=0.1")
        assert other.returncode == 2
        assert other.stderr.splitlines()[-1] == (
            f"fusechat: error: {work}: another recipe is being run in it; wait for that, or choose another --workdir"
        )
    finally:
        os.kill(first.pid, signal.SIGCONT)
    end(first)
    assert same_weights(work, reference)
