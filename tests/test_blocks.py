"""Alignment over several processes: the same bytes however many there are, and no harm where one of them is killed."""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import runs
from forks import Command
from fusechat.align.blocks import Blocks
from fusechat.commands.run import run
from fusechat.pipeline import build_steps, load_recipe

FILES = ("aligned.arrow", "vocabulary_map.arrow", "figures.json")
SMALL_BLOCKS = """
from fusechat.align.blocks import Blocks
from fusechat.commands.cli import main
Blocks.__init__.__kwdefaults__["size"] = 1
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def captured(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `recipe.yaml` and a work directory `work` in which all is done up to the alignment of one source."""
    directory = tmp_path_factory.mktemp("captured")
    recipe = runs.write_recipe(directory, models)
    runs.write_conversations(directory / "own.jsonl", 160, first=100)
    run(load_recipe(recipe), directory / "work", until="capture", only="gemma")
    return directory


def again(captured: Path, directory: Path) -> list[str]:
    """Arguments of a command that aligns in a fresh copy, `directory / work`."""
    shutil.copytree(captured / "work", directory / "work")
    where = ["--workdir", str(directory / "work"), "--only", "gemma", "--until", "align"]
    return ["run", str(captured / "recipe.yaml"), *where]


def aligned(directory: Path) -> dict[str, str]:
    found = directory / "work" / "align" / "gemma"
    return {name: hashlib.sha256((found / name).read_bytes()).hexdigest() for name in FILES}


@pytest.fixture(scope="module")
def reference(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes in one block."""
    directory = tmp_path_factory.mktemp("reference")
    again(captured, directory)
    run(load_recipe(captured / "recipe.yaml", ["align.processes=1"]), directory / "work", until="align", only="gemma")
    return aligned(directory)


@pytest.mark.parametrize(("processes", "size"), [(1, 1), (1, 7), (3, 3)])
def test_the_same_bytes_for_any_number_of_processes_and_any_size_of_a_block(
    captured: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    size: int,
) -> None:
    assert Blocks.__init__.__kwdefaults__["size"] >= 160, "the reference is one block"
    monkeypatch.setitem(Blocks.__init__.__kwdefaults__, "size", size)
    again(captured, tmp_path)
    recipe = load_recipe(captured / "recipe.yaml", [f"align.processes={processes}"])
    assert run(recipe, tmp_path / "work", until="align", only="gemma") == 1
    assert aligned(tmp_path) == reference
    steps = build_steps(load_recipe(captured / "recipe.yaml"), tmp_path / "work")
    assert {"align gemma": "done"}.items() <= {step.label: step.state()[0] for step in steps}.items()


@pytest.mark.parametrize("kind", ["dtw", "chain rule", "pivot"])
def test_every_way_to_align_gives_the_same_bytes_for_any_size_of_a_block(
    copied: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change = {"dtw": "sequence=dtw", "chain rule": "chain_rule=true", "pivot": "unaligned=pivot"}[kind]
    recipe = load_recipe(copied / "recipe.yaml", ["align.processes=1", f"align.{change}"])
    found = []
    for size in (1, 3, 256):
        monkeypatch.setitem(Blocks.__init__.__kwdefaults__, "size", size)
        run(recipe, runs.cut(copied / "work", "capture"), until="align", only="gemma")
        found.append(aligned(copied))
    assert found[0] == found[1] == found[2]


# -- killed -------------------------------------------------------------------------------------------------------------


def start(captured: Path, directory: Path, processes: int = 2) -> Command:
    """The command line with a conversation a block, in a process group of its own."""
    script = directory / "script.py"
    script.write_text(SMALL_BLOCKS)
    return Command(*again(captured, directory), "--set", f"align.processes={processes}", script=script, session=True)


def workers(pid: int, count: int) -> list[int]:
    """The processes that `pid` started to align, as soon as there are `count`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [child for child in children(pid) if "spawn_main" in command(child)]
        if len(found) >= count:
            return found
        time.sleep(0.01)
    raise AssertionError("no workers within a minute")


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def loaded(pid: int) -> bool:
    """Whether a worker has come as far as to align: it has mapped the stored conversations."""
    try:
        return "conversations.arrow" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def wait_until_loaded(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not any(map(loaded, pids)) and time.monotonic() < deadline and all(map(command, pids)):
        time.sleep(0.005)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to find processes in")


@needs_proc
@pytest.mark.parametrize("when", ["starting", "working"])
def test_a_killed_worker_ends_the_run_with_a_line_and_the_next_run_goes_on(
    captured: Path, reference: dict[str, str], tmp_path: Path, when: str
) -> None:
    process = start(captured, tmp_path)
    found = workers(process.pid, 2)
    if when == "working":
        wait_until_loaded(found)
    else:
        time.sleep(0.1)  # concurrent.futures forgets a process that it is starting while another one dies
    os.kill(found[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if "error" in line]
    assert stderr.splitlines()[-2:] == [line, "see docs/recipe.md#align.processes"]
    assert line.startswith("fusechat: error: align: a process was killed")
    assert "align.processes" in line
    assert not (tmp_path / "work" / "align" / "gemma" / "manifest.json").exists()
    assert run(load_recipe(captured / "recipe.yaml"), tmp_path / "work", until="align", only="gemma") == 1
    assert aligned(tmp_path) == reference


@needs_proc
def test_a_killed_run_leaves_no_workers_behind(captured: Path, tmp_path: Path) -> None:
    process = start(captured, tmp_path)
    found = workers(process.pid, 2)
    wait_until_loaded(found)
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 5
    left = found
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in found if "spawn_main" in command(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert left == []


@needs_proc
def test_an_interrupted_run_says_so_in_a_line(captured: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the workers as well; what they think of it is not shown."""
    process = start(captured, tmp_path)
    workers(process.pid, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "fusechat: error: interrupted; run the same command again to continue"
