"""Several processes share a capture among them: the same bytes as by one, whatever their number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from fusechat.run.steps import MANIFEST

SINGLE_CANDIDATE = {"OMP_NUM_THREADS": "1"}  # as torchrun has it


def together(number: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    return subprocess.run(
        [*launcher, "-m", "fusechat", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | SINGLE_CANDIDATE,
        timeout=600,
    )


@pytest.fixture(scope="module")
def place(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and `one`: what a single process captured, three shards a model."""
    directory = tmp_path_factory.mktemp("ranks")
    recipe = runs.write_recipe(directory, models)
    arguments = ("run", recipe, "--workdir", directory / "one", "--until", "capture", "--only", "mistral")
    done = runs.fusechat(*arguments, **SINGLE_CANDIDATE)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("number", [2, 4])  # 4: one has nothing to do
def test_captured_by_several_processes(place: Path, tmp_path: Path, number: int) -> None:
    work = tmp_path / "work"
    arguments = ("run", place / "recipe.yaml", "--workdir", work, "--until", "capture", "--only", "mistral")
    done = together(number, *arguments)
    assert done.returncode == 0, done.stderr
    assert runs.digests(work) == runs.digests(place / "one")
    assert len(list((work / "capture/mistral/data").glob("shard-*"))) == 3


def test_a_run_goes_on_with_another_number_of_processes(place: Path, tmp_path: Path) -> None:
    """What is left of a killed run is shared anew; one shard is missing, one cut short, one sound. The killed one had a model
    for all processes together, which one of them ran."""
    work = tmp_path / "work"
    arguments = ("run", place / "recipe.yaml", "--workdir", work, "--until", "capture", "--only", "mistral")
    begun = together(3, *arguments, "--set", 'capture.device_map={"": disk}')
    assert begun.returncode == 0, begun.stderr
    assert begun.stderr.count("one process on each machine runs it") == 2, "told once of each model"
    assert runs.digests(work / "capture") == runs.digests(place / "one" / "capture")
    directory = work / "capture/mistral/data"
    (directory / MANIFEST).rename(directory / "started.json")  # it has the fingerprint
    first, second, third = sorted(directory.glob("shard-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    untouched = third.stat().st_mtime_ns
    done = together(2, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{second}: is damaged" in done.stderr
    assert runs.digests(work) == runs.digests(place / "one")
    assert third.stat().st_mtime_ns == untouched
