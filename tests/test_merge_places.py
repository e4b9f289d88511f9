"""Where a merged model is written to: what is there already is kept, disks may be full or read-only."""

import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runs
from checkpoints import INDEX, configuration, read, relative, write
from forks import Command
from fusechat.errors import FuseChatError, StorageError, WorkdirError
from fusechat.merge import merge
from test_bad_input import PREFIX, complaints
from test_disk import mounted

SHARD = 12_000  # bytes
Config = dict[str, Any]


@pytest.fixture
def config(models: dict[str, Path], tmp_path: Path) -> Config:
    """Of a model with all that there may be in a directory, next to the tests' places."""
    base = write(tmp_path / "models" / "base", read(models["llama"]), models["llama"])
    return configuration("sce", [base, relative(base, tmp_path / "models" / "one", 1)], {"select_topk": 0.5})


def refusal(config: Config, out: Path) -> str:
    """What the command line complains of; nothing new is in the directory that OUT is in."""
    file = Path(config["base_model"]).parent / "merge.yaml"
    file.write_text(yaml.safe_dump(config))
    above = out.parent
    before = sorted(above.iterdir()) if above.is_dir() else None
    [line] = complaints("merge", file, out)
    assert (sorted(above.iterdir()) if above.is_dir() else None) == before
    return line


def test_what_is_there_already_is_kept(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = f"{out}: exists, and was not made by this configuration; delete it or choose another place"
    out.write_text("mine")
    assert refusal(config, out) == expected
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert refusal(config, out) == expected
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    shutil.rmtree(out)
    merge(config | {"parameters": {"select_topk": 0.4}}, out)
    before = runs.digests(out)
    assert refusal(config, out) == expected, "a merge by another configuration"
    (out / "merge_report.json").write_text("{}")
    assert refusal(config, out) == expected
    (out / "merge_report.json").unlink()
    assert runs.digests(out) == {name: digest for name, digest in before.items() if name != "merge_report.json"}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "model.safetensors"])
def test_models_that_changed_since_give_another_merge(config: Config, tmp_path: Path, name: str) -> None:
    merge(config, tmp_path / "out")
    base = Path(config["base_model"])
    (base / name).write_bytes((base / name).read_bytes())
    with pytest.raises(WorkdirError, match="was not made by this configuration"):
        merge(config, tmp_path / "out")


def cut(out: Path) -> None:
    file = min(out.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out: min(out.glob("*.safetensors")).unlink(), "{out}: {shard} is missing"),
        (lambda out: (out / INDEX).unlink(), "{out}: model.safetensors.index.json is missing"),
        (lambda out: (out / "config.json").unlink(), "{out}: config.json is missing"),
        (lambda out: (out / "tokenizer.json").unlink(), "{out}: tokenizer.json is missing"),
        (cut, "{out}/{shard}: not a whole safetensors file: "),
    ],
)
def test_a_merged_model_that_is_not_whole_any_more_is_not_taken_for_done(
    config: Config, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    out = tmp_path / "out"
    merge(config, out, shard_bytes=SHARD)
    shard = min(out.glob("*.safetensors")).name
    damage(out)
    with pytest.raises(WorkdirError) as raised:
        merge(config, out, shard_bytes=SHARD)
    [line] = raised.value.messages
    assert line.startswith(expected.format(out=out, shard=shard)), line
    assert line.endswith("to merge again")


def test_places_that_are_made_or_empty_or_links(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(config, tmp_path / "reference" / "out")
    expected = runs.digests(tmp_path / "reference" / "out")
    (tmp_path / "empty" / "out").mkdir(parents=True)
    (tmp_path / "to-empty" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("to-empty/out")
    (tmp_path / "dangling").symlink_to("new/out")
    monkeypatch.chdir(tmp_path)
    for given, place in {
        "missing/and/more/out": "missing/and/more/out",
        "empty/out": "empty/out",
        "link": "to-empty/out",
        "dangling": "new/out",
        "a/../b/out/": "b/out",
        "dots/v1.0.out": "dots/v1.0.out",
    }.items():
        merge(config, given)
        found = runs.digests(tmp_path / place)
        assert {n: d for n, d in found.items() if n != "README.md"} == {
            n: d for n, d in expected.items() if n != "README.md"
        }
        assert [path.name for path in (tmp_path / place).parent.iterdir()] == [Path(place).name], (
            "nothing is next to it"
        )
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()


def test_places_that_cannot_be_made(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert (
        refusal(config, tmp_path / "file" / "out")
        == f"{tmp_path}/file/out: cannot be made, since {tmp_path}/file is a file"
    )
    assert refusal(config, tmp_path / "file" / "a" / "b").endswith(f"since {tmp_path}/file is a file")
    assert refusal(config, Path("/")) == "/: is where a disk is mounted; name a directory in it"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(config: Config, tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir(mode=0o500)
    assert refusal(config, above / "out").startswith(f"Permission denied ({above}")


# -- disks --------------------------------------------------------------------------------------------------------------


def test_where_a_disk_is_mounted_and_read_only_disks(config: Config, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        assert refusal(config, disk) == f"{disk}: is where a disk is mounted; name a directory in it"
        line = refusal(config, disk / "out")
        assert line.startswith(f"Read-only file system ({disk}/.out")
        assert line.endswith("; make it writable or choose another OUT, then run again to resume")


def size_of(config: Config) -> int:
    return sum(tensor.nbytes for tensor in read(Path(config["base_model"])).values())


def test_a_disk_without_room_is_known_beforehand(config: Config, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=60k") as disk:
        expected = f"{disk}/.out.merging: the merged model needs 0.00 GB more and the disk has 0.00 GB left"
        file = tmp_path / "models" / "merge.yaml"
        file.write_text(yaml.safe_dump(config))
        assert complaints("merge", file, disk / "out") == [expected]
        assert not list(disk.rglob("*.safetensors"))


@pytest.mark.parametrize("beyond", [0, 4, 12, 20])
def test_a_disk_that_fills(config: Config, tmp_path: Path, beyond: int) -> None:
    """While shards are written, or what comes after them; with more room the same command ends, and keeps what is done."""
    merge(config, tmp_path / "reference" / "out", shard_bytes=SHARD)
    pages = -(-size_of(config) // 4096) + 2 + beyond
    with mounted(tmp_path / "disk", f"size={4 * pages}k") as disk:
        with pytest.raises(StorageError) as raised:
            merge(config, disk / "out", shard_bytes=SHARD)
        [line] = raised.value.messages
        assert line.startswith(f"No space left on device ({disk}/.out.merging/")
        assert line.endswith("; free some room or choose another OUT, then run again to resume")
        assert not (disk / "out").exists()
        assert not list(disk.rglob("*.partial"))
        kept = {file.name: file.stat().st_mtime_ns for file in disk.rglob("*.safetensors")}
        assert len(kept) > 2
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        merge(config, disk / "out", shard_bytes=SHARD)
        assert runs.digests(disk / "out") == runs.digests(tmp_path / "reference" / "out")
        times = {file.name: file.stat().st_mtime_ns for file in disk.rglob("*.safetensors")}
        assert sum(times[name] == kept[name] for name in kept) >= len(kept) - 1, "all that had their report"


def test_a_limit_on_the_size_of_files(config: Config, tmp_path: Path) -> None:
    """As a quota has it, and without root: in a process, with all that a user sees."""
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    ended = Command("merge", file, out, limits={resource.RLIMIT_FSIZE: 40_000}).ended()
    assert (ended.returncode, ended.stdout) == (2, "")
    started, error = ended.stderr.splitlines()
    assert started == "merge (sce) …"
    what = "free some room or choose another OUT, then run again to resume"
    assert error == f"{PREFIX}File too large ({tmp_path}/.out.merging/model.safetensors); {what}"
    assert not out.exists()


def test_a_merge_that_ends_with_an_error_says_what_it_left(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards, by number and size, or nothing; the same command continues from them."""
    monkeypatch.setattr(logging.getLogger("fusechat"), "propagate", True)
    norm = "model.norm.weight"  # in the last shard
    one = Path(config["models"][0]["model"])
    write(one, {**read(one), norm: torch.full((32,), 80_000.0)}, one)
    narrow = {**config, "merge_method": "linear", "parameters": {"weight": 1, "normalize": False}, "dtype": "float16"}
    hidden, out = tmp_path / ".out.merging", tmp_path / "out"
    with pytest.raises(FuseChatError, match=f"{norm}: 32 merged values"):
        merge(narrow, out, shard_bytes=SHARD)
    files = list(hidden.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    what = f"has {len(files)} finished files of {len(files) + 1} ({size / 1e9:.2f} GB), which the same command reuses"
    assert len(files) >= 3
    assert caplog.messages[-1] == f"{hidden}: {what}; delete it to free the disk"
    shutil.rmtree(hidden)
    caplog.clear()
    with pytest.raises(FuseChatError, match=f"{norm}: 32 merged values"):
        merge(narrow, out)
    assert not hidden.exists(), "of one file nothing is left to continue from"
    assert not [line for line in caplog.messages if "finished" in line]


def test_errors_that_are_no_ones_fault_are_not_hidden(config: Config, tmp_path: Path) -> None:
    """A user of Python sees FuseChatError for what can be mended, and everything else as it is."""
    assert issubclass(StorageError, FuseChatError)
    assert issubclass(WorkdirError, FuseChatError)
    with pytest.raises(TypeError):
        merge(config, None)  # type: ignore[arg-type]
