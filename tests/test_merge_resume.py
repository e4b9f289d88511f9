"""Merges that are killed, interrupted or begun twice: the same bytes as ever, finished shards kept, nothing half-made in OUT."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

import runs
from checkpoints import configuration, read, relative, write
from forks import Command
from fusechat.commands import cli
from fusechat.errors import WorkdirError
from fusechat.merge import merge
from test_bad_input import PREFIX

SHARD = 12_000  # bytes
POINTS = 20  # at which a merge is killed, spread over it
LAST = 12  # operations at its end, at each of which it is killed: parts of the report go, the directory gets its name
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
Config = dict[str, Any]


@pytest.fixture(scope="module")
def family(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("family")
    return [models["llama"], *(relative(models["llama"], root / name, len(name)) for name in ("one", "three"))]


@pytest.fixture
def config(family: list[Path]) -> Config:
    return configuration("sce", family, {"select_topk": 0.3})


def build(config: Config, out: Path, **options: Any) -> dict[str, Any]:
    return merge(config, out, shard_bytes=SHARD, **options)


def in_child(work: Callable[[], Any], root: Path, at: int, sign: int, counted: Path | None = None) -> int:
    """Forks, and sends the child the signal at its `at`-th operation on a file below `root`; its process id.

    Operations are what opens a file to write, writes a part of a shard, renames, removes, makes directories.
    """
    pid = os.fork()
    if pid:
        return pid
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), sign)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and (arguments[2] or 0) & _WRITES):
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(f"{root}/"):
                count()

    pwrite = os.pwrite

    def counting(*arguments: Any) -> int:
        count()
        return pwrite(*arguments)

    status = 1
    try:
        sys.addaudithook(hook)
        os.pwrite = counting
        work()
        if counted is not None:
            counted.write_text(str(seen))
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status, or minus the signal that ended the child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def operations(config: Config, directory: Path) -> int:
    """How many there are in an undisturbed merge to `directory/out`, which is done as well."""
    directory.mkdir()
    counted = directory.with_suffix(".count")
    assert ended(in_child(lambda: build(config, directory / "out", threads=1), directory, 0, 0, counted)) == 0
    return int(counted.read_text())


def finished_shards(root: Path) -> dict[Path, tuple[int, int]]:
    """Those that the hidden directory has with their part of the report, or with all of it: when they were written, and as
    which file."""
    hidden = root / ".out.merging"
    shards = [file.with_name(file.name.removesuffix(".report.json")) for file in hidden.glob("*.report.json")]
    if (hidden / "merge_report.json").exists():
        shards = list(hidden.glob("*.safetensors"))
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in shards}


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_killed_merge_goes_on_at_the_shard_it_was_at(config: Config, tmp_path: Path, granularity: str) -> None:
    config["parameters"]["granularity"] = granularity
    count = operations(config, tmp_path / "reference")
    expected = runs.digests(tmp_path / "reference" / "out")
    assert count > 60
    shards = sum(name.endswith(".safetensors") for name in expected)
    assert shards > 5
    kept_most = 0
    spread = {1 + round(step * (count - 1) / (POINTS - 1)) for step in range(POINTS)}
    for at in sorted(spread | set(range(count - LAST, count + 1))):
        root = tmp_path / str(at)
        root.mkdir()
        pid = in_child(lambda root=root: build(config, root / "out", threads=1), root, at, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        if (root / "out").exists():
            assert runs.digests(root / "out") == expected
        for file in root.rglob("*.safetensors"):
            with safe_open(file, "np") as opened:
                assert all(opened.get_tensor(name).size for name in opened.keys())  # noqa: SIM118
        kept = finished_shards(root)
        kept_most = max(kept_most, len(kept))
        build(config, root / "out")
        assert runs.digests(root / "out") == expected, at
        for file, was in kept.items():
            now = (root / "out" / file.name).stat()
            assert (now.st_mtime_ns, now.st_ino) == was, f"{at}: {file.name} is written again"
        assert [path.name for path in root.iterdir()] == ["out"]
        shutil.rmtree(root)
    assert kept_most == shards


def killed_half_way(config: Config, root: Path) -> None:
    count = operations(config, root / "counting")
    shutil.rmtree(root / "counting")
    pid = in_child(lambda: build(config, root / "out", threads=1), root, count // 2, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    assert len(finished_shards(root)) > 2
    assert not (root / "out").exists()


@pytest.mark.parametrize("name", ["*.safetensors", "*.report.json", "squares.json"])
def test_what_was_altered_after_the_kill_is_made_again(config: Config, tmp_path: Path, name: str) -> None:
    """One bit, with the time of change put back; what was not altered is kept."""
    config["parameters"]["granularity"] = "model"
    root = tmp_path / "work"
    root.mkdir()
    killed_half_way(config, root)
    kept = finished_shards(root)
    [altered] = [file for file in sorted((root / ".out.merging").glob(name)) if file in kept or "json" in name][:1]
    before, data = altered.stat(), bytearray(altered.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    altered.write_bytes(data)
    os.utime(altered, ns=(before.st_atime_ns, before.st_mtime_ns))
    build(config, root / "out")
    build(config, tmp_path / "reference" / "out")
    assert runs.digests(root / "out") == runs.digests(tmp_path / "reference" / "out")
    again = [file for file, (_, inode) in kept.items() if (root / "out" / file.name).stat().st_ino != inode]
    assert [file.name for file in again] == ([] if name == "squares.json" else [sorted(kept)[0].name])


@pytest.mark.parametrize("change", [{"parameters": {"select_topk": 0.4}}, {"dtype": "bfloat16"}, {"name": "other"}])
def test_another_configuration_begins_anew(config: Config, tmp_path: Path, change: Config) -> None:
    root = tmp_path / "work"
    root.mkdir()
    killed_half_way(config, root)
    other = config | change
    build(other, root / "out")
    build(other, tmp_path / "reference" / "out")
    assert runs.digests(root / "out") == runs.digests(tmp_path / "reference" / "out")


def test_models_that_changed_since_are_merged_anew(family: list[Path], tmp_path: Path) -> None:
    one = write(tmp_path / "models" / "one", read(family[1]), family[1])
    config = configuration("varm", [family[0], one, family[2]])
    root = tmp_path / "work"
    root.mkdir()
    killed_half_way(config, root)
    write(one, read(family[2]), family[2])
    build(config, root / "out")
    build(config, tmp_path / "reference" / "out")
    assert runs.digests(root / "out") == runs.digests(tmp_path / "reference" / "out")


def test_another_size_of_shards_begins_anew(config: Config, tmp_path: Path) -> None:
    root = tmp_path / "work"
    root.mkdir()
    killed_half_way(config, root)
    merge(config, root / "out")
    merge(config, tmp_path / "reference" / "out")
    assert runs.digests(root / "out") == runs.digests(tmp_path / "reference" / "out")


def test_what_is_done_is_not_done_again(config: Config, tmp_path: Path) -> None:
    first = build(config, tmp_path / "out")
    before = written(tmp_path)
    assert build(config, tmp_path / "out", threads=1) == first
    assert written(tmp_path) == before


def written(directory: Path) -> dict[Path, tuple[int, int, int]]:
    """When each file was made and last changed; it may be read."""
    found = {path: path.stat() for path in directory.rglob("*")}
    return {path: (one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found.items()}


# -- two at once --------------------------------------------------------------------------------------------------------


def test_of_two_at_once_one_is_refused(config: Config, tmp_path: Path) -> None:
    """The first stands still in the midst of its work while the second one comes."""
    root, out = tmp_path / "work", tmp_path / "work" / "out"
    count = operations(config, tmp_path / "reference")
    root.mkdir()
    pid = in_child(lambda: build(config, out, threads=1), root, count // 2, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    before = finished_shards(root)
    try:
        with pytest.raises(WorkdirError) as raised:
            build(config, out)
    finally:
        os.kill(pid, signal.SIGCONT)
        status = ended(pid)
    assert raised.value.messages == (f"{out}: process {pid} is using it",)
    assert status == 0
    assert before
    assert {file: (out / file.name).stat().st_ino for file in before} == {
        file: inode for file, (_, inode) in before.items()
    }
    assert runs.digests(out) == runs.digests(tmp_path / "reference" / "out")
    assert [path.name for path in root.iterdir()] == ["out"]


def test_two_processes_started_together(config: Config, tmp_path: Path) -> None:
    """One does the work; the other is refused, or finds it done."""
    file, out = tmp_path / "merge.yaml", tmp_path / "work" / "out"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    both = [Command("merge", file, out) for _ in range(2)]
    results = [(process.communicate()[1], process.returncode) for process in both]
    assert 0 in [status for _, status in results]
    for process, (stderr, status) in zip(both, results, strict=True):
        other = next(one.pid for one in both if one is not process)
        said = [
            f"{PREFIX}{out}: process {who} is using it\n" for who in (other, "?")
        ]  # it may not have said yet who it is
        assert status == 0 or (status == 2 and stderr in said)
    merge(config, tmp_path / "reference" / "out")
    assert runs.digests(out) == runs.digests(tmp_path / "reference" / "out")


# -- Ctrl-C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c(config: Config, tmp_path: Path, threads: int) -> None:
    """Nothing looks whole, and the same command continues; status 130."""
    file, out, said = tmp_path / "merge.yaml", tmp_path / "work" / "out", tmp_path / "said"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    count = operations(config, tmp_path / "reference")
    arguments = ["merge", str(file), str(out), "--threads", str(threads), "--shard-size", str(SHARD / 1e9)]

    def command() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv[:] = ["fusechat", *arguments]
        sys.stderr = said.open("w", buffering=1)
        cli.main()

    for _ in range(3):  # each continues where the one before it was interrupted
        pid = in_child(command, tmp_path / "work", count // 4, signal.SIGINT)
        assert ended(pid) == 130
        assert said.read_text().splitlines()[-1] == f"{PREFIX}interrupted; run the same command again to continue"
        assert not out.exists()
        assert not list((tmp_path / "work").rglob("*.partial"))
        assert [path.name for path in (tmp_path / "work").iterdir()] == [".out.merging"]
    kept = finished_shards(tmp_path / "work")
    assert len(kept) > 3
    ended_well = runs.here(*arguments, "--json")
    assert json.loads(ended_well.stdout)["method"] == "sce", ended_well.stderr
    assert runs.digests(out) == runs.digests(tmp_path / "reference" / "out")
    assert {name: (out / name.name).stat().st_ino for name in kept} == {
        name: inode for name, (_, inode) in kept.items()
    }
