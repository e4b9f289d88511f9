"""Work directories that are another's, in use or no directories at all; disks that are full or read-only."""

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import runs
from forks import Command
from fusechat.commands.run import run
from fusechat.data.tables import write_table
from fusechat.errors import storage_error
from fusechat.pipeline import load_recipe
from fusechat.run.files import atomic_file, write_json
from test_bad_input import PREFIX, complaints, done


def test_a_work_directory_of_another_recipe(tmp_path: Path, models: dict[str, Path]) -> None:
    work = tmp_path / "work"
    recipe = runs.write_recipe(tmp_path, models)
    assert run(load_recipe(recipe), work, until="prepare") == 11
    before = runs.digests(work)
    [line] = complaints("run", recipe, "--workdir", work, "--set", "name=other")
    assert line == f"{work / 'recipe.yaml'}: is of a recipe with name tiny, not other; choose another --workdir"
    [line] = complaints("run", recipe, "--workdir", work, "--set", f"pivot={models['gemma']}")
    assert line.startswith(f"{work / 'recipe.yaml'}: is of a recipe with pivot ")
    assert str(models["llama"]) in line
    assert str(models["gemma"]) in line
    assert runs.digests(work) == before
    with (work / ".lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        held.write("4711")
        held.flush()
        assert complaints("run", recipe, "--workdir", work) == [f"{work}: process 4711 is using it"]
    assert runs.digests(work) == before


def test_a_work_directory_that_is_none(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.write_text("mine")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    assert complaints("run", recipe, "--workdir", file) == [f"{file}: is a file, not a directory"]
    [line] = complaints("run", recipe, "--workdir", file / "below")
    assert str(file / "below") in line
    [line] = complaints("run", recipe, "--workdir", foreign)
    assert line == f"{foreign}: is not empty and no work directory of FuseChat; choose another --workdir"
    for verb in ("status", "report"):
        [line] = complaints(verb, foreign)
        assert line.startswith(f"{foreign}: no work directory of FuseChat")
    assert file.read_text() == "mine"
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["pivot: org/other\n", "[]\n", "name: [\n", ""])
def test_a_work_directory_whose_recipe_is_damaged(tmp_path: Path, models: dict[str, Path], text: str) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(text)
    [line] = complaints("run", recipe, "--workdir", work)
    assert line.startswith(str(work))
    assert (work / "recipe.yaml").read_text() == text


# -- disks --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `directory`, in memory; skips the test where mounting is not permitted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if found.returncode:
        pytest.skip(f"mounting is not permitted: {found.stderr.strip()}")
    try:
        yield directory
    finally:
        gc.collect()  # what was mapped into memory
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def assert_whole(workdir: Path) -> None:
    """Every step that is marked done has all that its manifest names, byte for byte; nothing has a temporary name."""
    for manifest in workdir.rglob("manifest.json"):
        for name, expected in json.loads(manifest.read_text())["outputs"].items():
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == expected["sha256"]
    assert list(workdir.rglob("*.partial")) == []


@pytest.fixture
def recipe(finished: Path) -> Path:
    """The recipe of all tests on disks, next to `work`, what it gives on a disk with room."""
    return finished / "recipe.yaml"


@pytest.mark.parametrize(
    ("size", "begun", "until"), [("60k", None, "prepare"), ("500k", "align", None), ("2m", "merge", None)]
)
def test_a_full_disk(recipe: Path, copied: Path, tmp_path: Path, size: str, begun: str | None, until: Any) -> None:
    """It is full while preparing, while training and while writing the report; with more room the same command ends."""
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        work, there = disk / "work", set()
        if begun:
            shutil.copytree(runs.cut(copied / "work", begun), work)
            there = set(done(work))
        [line] = complaints("run", recipe, "--workdir", work)
        assert line.endswith("free some room or choose another --workdir, then run again to resume")
        finished = set(done(work))
        assert there <= finished
        assert (len(finished) == 31) == (begun == "merge")
        assert {name.split("/")[0] for name in finished - there} <= {"prepare" if until else "fuse", "evaluate"}
        assert_whole(work)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert run(load_recipe(recipe), work, until=until) == (11 if until else 32) - len(finished)
        whole = runs.digests(recipe.parent / "work")
        assert runs.digests(work).items() <= whole.items() if until else runs.digests(work) == whole


def test_a_read_only_disk(recipe: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        for workdir in (disk, disk / "work"):
            [line] = complaints("run", recipe, "--workdir", workdir)
            assert line.startswith(f"Read-only file system ({workdir}")
        assert list(disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(recipe: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith(f"Permission denied ({tmp_path / 'work'}")


# For root too, what may not be read or written cannot be: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
WITHOUT_RIGHTS = """
import ctypes
from fusechat.commands.cli import main
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(header, sets) == 0
sets[0] &= ~0b110  # effective
sets[1] &= ~0b110  # permitted
assert ctypes.CDLL(None).capset(header, sets) == 0
main()
"""


def test_an_input_that_may_not_be_read_is_named_as_such(models: dict[str, Path], tmp_path: Path) -> None:
    """It is no fault of the work directory's."""
    here = {name: shutil.copytree(models[name], tmp_path / name) for name in ("llama", "mistral", "gemma")}
    recipe, work, closed = runs.write_recipe(tmp_path, here), tmp_path / "work", tmp_path / "closed"
    for directory in (work, closed):
        directory.mkdir()
    file = Path(shutil.copyfile(tmp_path / "train.jsonl", closed / "train.jsonl"))

    (tmp_path / "script.py").write_text(WITHOUT_RIGHTS)

    def refusal(*arguments: str | Path) -> str:
        ended = Command(*arguments, script=tmp_path / "script.py", FUSECHAT_CACHE=str(tmp_path / "cache")).ended()
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith(PREFIX)
        return ended.stderr.removeprefix(PREFIX)

    run_it = ("run", recipe, "--workdir", work / "w", "--until", "prepare")
    tokenizer = here["llama"] / "tokenizer.json"
    for unread, command in (
        (tmp_path / "train.jsonl", run_it),
        (here["gemma"] / "model.safetensors", run_it),
        (tokenizer, ("chat", here["llama"])),
    ):
        unread.chmod(0)
        assert refusal(*command) == f"{unread}: cannot be read (Permission denied): make it readable\n"
        unread.chmod(0o644)
    closed.chmod(0o600)
    said = f"{file}: cannot be read (Permission denied): {closed} may not be entered\n"
    assert refusal(*run_it, "--set", f"data.train={file}") == said
    closed.chmod(0o700)
    work.chmod(0o555)
    said = (
        f"Permission denied ({work / 'new'}); make it writable or choose another --workdir, then run again to resume\n"
    )
    assert refusal("run", recipe, "--workdir", work / "new") == said


def test_a_limit_on_the_size_of_files(recipe: Path, tmp_path: Path) -> None:
    """As a quota has it, and without root: in a process, with all that a user sees."""
    arguments = ("run", recipe, "--workdir", tmp_path / "work", "--until", "prepare")
    ended = Command(*arguments, limits={resource.RLIMIT_FSIZE: 4000}).ended()
    assert ended.returncode == 2
    assert ended.stdout == ""
    errors = [line for line in ended.stderr.splitlines() if not line.startswith("prepare ")]
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith(PREFIX)
    assert "File too large" in errors[0]
    assert_whole(tmp_path / "work")
    finished = done(tmp_path / "work")
    assert run(load_recipe(recipe), tmp_path / "work", until="prepare") == 11 - len(finished)


def write_with_pyarrow(path: Path) -> None:
    write_table(path, pa.schema([("x", pa.list_(pa.int64()))]), [{"x": list(range(10_000))}])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: write_json(path, "x" * 100_000),
        lambda path: torch.save({"x": torch.zeros(100_000)}, path),
        lambda path: torch.save({"x": torch.zeros(10_000 // 4 + 200)}, path),  # what does not fit is at the very end
        lambda path: save_file({"x": torch.zeros(100_000)}, path),
        write_with_pyarrow,
    ],
    ids=["bytes", "JSON", "torch", "end of torch", "safetensors", "Arrow"],
)
def test_every_librarys_way_to_say_that_a_file_cannot_be_written(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = storage_error(raised.value)
    assert line is not None, repr(raised.value)
    assert str(tmp_path) in str(storage_error(raised.value, where=tmp_path)), (
        "whether the library names its file or not"
    )
    assert line.endswith("; free some room or choose another --workdir, then run again to resume")


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), FileNotFoundError(2, "No such file"), RuntimeError("CUDA error")]
)
def test_other_errors_are_not_laid_on_the_disk(error: Exception) -> None:
    assert storage_error(error) is None


def test_two_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As two runs do that share the cache."""
    path = tmp_path / "file"
    code = (
        "import pathlib, sys; from fusechat.run.files import write_text; write_text(pathlib.Path(sys.argv[1]), 'other')"
    )
    with atomic_file(path) as temporary:
        temporary.write_text("own")
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        assert path.read_text() == "other"
    assert path.read_text() == "own"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
