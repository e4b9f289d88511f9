"""Several processes share a capture among them: the same bytes as by one, whatever their number."""

from pathlib import Path

import pytest

import runs
from forks import together
from fusechat.run.steps import MANIFEST

CAPTURE = "capture/mistral/data"


def capture(finished: Path, work: Path, number: int, *options: str) -> str:
    """Captures mistral and the pivot by so many processes, three shards each; what they say. Whatever they wrote one wrote too."""
    arguments = ("run", finished / "recipe.yaml", "--workdir", work, "--until", "capture", "--only", "mistral")
    said = together(number, *arguments, *options)
    assert len(list((work / CAPTURE).glob("shard-*"))) == 3
    assert runs.digests(work / "capture").items() <= runs.digests(finished / "work" / "capture").items()
    assert options or runs.digests(work).items() <= runs.digests(finished / "work").items()
    return said


@pytest.mark.parametrize("number", [2, 4])  # 4: one has nothing to do
def test_captured_by_several_processes(finished: Path, tmp_path: Path, number: int) -> None:
    capture(finished, tmp_path / "work", number)


def test_a_run_goes_on_with_another_number_of_processes(finished: Path, tmp_path: Path) -> None:
    """What is left of a killed run is shared again; one shard is missing, one cut short, one sound. The killed one had a model
    for all processes together, which one of them ran."""
    work = tmp_path / "work"
    said = capture(finished, work, 3, "--set", 'capture.device_map={"": disk}')
    assert said.count("one process on each machine runs the model") == 2, "told once of each model"
    directory = work / CAPTURE
    (directory / MANIFEST).rename(directory / "started.json")  # it has the fingerprint
    first, second, third = sorted(directory.glob("shard-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    untouched = third.stat().st_mtime_ns
    assert f"{second}: is damaged" in capture(finished, work, 2)
    assert third.stat().st_mtime_ns == untouched
