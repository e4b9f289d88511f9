"""Files of models that are damaged, hostile or elsewhere, places that no model can be written to: told in a line, status 2."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runs
from checkpoints import INDEX, configuration, read, relative, write
from fusechat.errors import FuseChatError
from fusechat.merge import merge
from fusechat.merge import standalone as command
from test_bad_input import PREFIX
from test_merge_bad_models import refused

NORM, FILE = "model.norm.weight", "model.safetensors"
WHOLE = "not a whole safetensors file: Error while deserializing header:"
Change = Callable[[Path], Any]


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A base and a relative, which tests spoil."""
    base = write(tmp_path / "base", read(models["llama"]), models["llama"])
    return [base, relative(base, tmp_path / "one", 1)]


# -- weights ------------------------------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], Any], data: int | None = None) -> Change:
    """Rewrites the header of the weights, byte by byte, with so many bytes of data after it."""

    def spoil(directory: Path) -> None:
        whole = (directory / FILE).read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        found = json.loads(whole[8 : 8 + length])
        found = change(found) or found
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        rest = whole[8 + length :][:data]
        (directory / FILE).write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return spoil


def raw(data: bytes) -> Change:
    return lambda directory: (directory / FILE).write_bytes(data)


def one_entry(start: int, end: int, **changes: Any) -> Change:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [start, end], **changes}
    return header(lambda found: {"a": entry}, 8)


def overlap(found: dict[str, Any]) -> None:
    """The second tensor begins where the first does."""
    first, second = sorted((part["data_offsets"] for name, part in found.items() if name != "__metadata__"))[:2]
    second[:] = [first[0], first[0] + second[1] - second[0]]


def cut(directory: Path) -> None:
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(whole[:-1])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (raw(b""), f"{WHOLE} header too small"),
        (raw(b"\0" * 7), f"{WHOLE} header too small"),
        (raw(struct.pack("<Q", 100) + b"{}"), f"{WHOLE} invalid header length"),
        (raw(struct.pack("<Q", 2**63) + b"{}      "), f"{WHOLE} header too large"),
        (raw(struct.pack("<Q", 10**8 + 1) + b"{}"), f"{WHOLE} header too large"),
        (raw(b"\x80\x02}q\x00." * 20), f"{WHOLE} header too large"),  # a pickle by another name
        (header(lambda found: b"\xff\xfe"), f"{WHOLE} invalid UTF-8 in header"),
        (header(lambda found: b"{" * 50), f"{WHOLE} invalid JSON in header"),
        (header(lambda found: b'{"a":' * 100_000), f"{WHOLE} invalid JSON in header"),
        (header(overlap), f"{WHOLE} invalid offset for tensor `"),
        (header(lambda found: None, 1000), f"{WHOLE} incomplete metadata, file not fully covered"),
        (cut, f"{WHOLE} incomplete metadata, file not fully covered"),
        (one_entry(0, 12), f"{WHOLE} invalid shape, data type, or offset for tensor"),
        (one_entry(4, 12), f"{WHOLE} invalid offset for tensor `a`"),
        (one_entry(8, 0), f"{WHOLE} invalid offset for tensor `a`"),
        (one_entry(0, 8, shape=[3]), f"{WHOLE} invalid shape, data type, or offset for tensor"),
        (one_entry(0, 8, shape=[-2]), f"{WHOLE} invalid JSON in header"),
        (one_entry(0, 8, shape=[2**40, 2**40]), f"{WHOLE} overflow computing buffer size"),
        (one_entry(0, 8, dtype="F99"), f"{WHOLE} invalid JSON in header"),
        (one_entry(0, 2**62, shape=[2**60]), f"{WHOLE} overflow computing buffer size"),
        (one_entry(0, 2**50, shape=[2**48]), f"{WHOLE} incomplete metadata, file not fully covered"),
    ],
)
def test_headers_that_overlap_overrun_or_are_none(pair: list[Path], change: Change, expected: str) -> None:
    change(pair[1])
    [line] = refused(pair)
    assert line.startswith(f"one/{FILE}: {expected}"), line


def index(weight_map: Any, text: str | None = None) -> Change:
    """An index in the place of one file; what it says of the norm, the rest of the tensors are where it does not say."""

    def spoil(directory: Path) -> None:
        tensors = read(directory)
        (directory / FILE).unlink()
        write(directory, tensors, directory, shards=2)
        known = json.loads((directory / INDEX).read_text())["weight_map"]
        mapped = known | weight_map if isinstance(weight_map, dict) else weight_map
        (directory / INDEX).write_text(text if text is not None else json.dumps({"weight_map": mapped}))

    return spoil


NOT_ONE = "not an index of safetensors files"
OUTSIDE = "which is no safetensors file in that directory"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def in_another_file(directory: Path) -> None:
    index({})(directory)
    names = json.loads((directory / INDEX).read_text())["weight_map"]
    names[NORM] = SECOND if names[NORM] == FIRST else FIRST
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))


def beside_a_whole_file(directory: Path) -> None:
    tensors = read(directory)
    write(directory, tensors, directory, shards=2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (index({NORM: "../base/model.safetensors"}), f"names '../base/model.safetensors', {OUTSIDE}"),
        (index({NORM: "/etc/passwd"}), f"names '/etc/passwd', {OUTSIDE}"),
        (index({NORM: "/tmp/model.safetensors"}), f"names '/tmp/model.safetensors', {OUTSIDE}"),
        (index({NORM: "a/model.safetensors"}), f"names 'a/model.safetensors', {OUTSIDE}"),
        (index({NORM: "..\\model.safetensors"}), f"names '..\\\\model.safetensors', {OUTSIDE}"),
        (index({NORM: ".."}), f"names '..', {OUTSIDE}"),
        (index({NORM: ""}), f"names '', {OUTSIDE}"),
        (index({NORM: "pytorch_model.bin"}), f"names 'pytorch_model.bin', {OUTSIDE}"),
        (index({NORM: "x.safetensors"}), "names 'x.safetensors', and there is no such file in that directory"),
        (index({NORM: "x\0.safetensors"}), "names 'x\\x00.safetensors', and there is no such file in that directory"),
        (index({"more.weight": FIRST}), f"says that more.weight is in {FIRST}, which does not hold it"),
        (in_another_file, f"says that {NORM} is in {FIRST}, which does not hold it"),
        (index({NORM: 1}), f"{NOT_ONE} (weight_map is no mapping of tensors to files)"),
        (index([FIRST]), f"{NOT_ONE} (weight_map is no mapping of tensors to files)"),
        (index({}, text='{"weight_map": {}}'), f"{NOT_ONE} (weight_map is no mapping of tensors to files)"),
        (index({}, text="{}"), f"{NOT_ONE} ('weight_map')"),
        (index({}, text="[]"), f"{NOT_ONE} (list indices must be integers or slices, not str)"),
        (
            index({}, text="{"),
            f"{NOT_ONE} (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        (
            index({}, text="[" * 100_000),
            f"{NOT_ONE} (maximum recursion depth exceeded while decoding a JSON array from a ",
        ),
        (beside_a_whole_file, f"does not name {FILE}, which is there too; delete what is not the model"),
    ],
)
def test_an_index_that_does_not_fit(pair: list[Path], change: Change, expected: str) -> None:
    change(pair[1])
    [line] = refused(pair)
    assert line.startswith(f"one/{INDEX}: {expected}"), line
    assert line == f"one/{INDEX}: {expected}" or expected.endswith(" a ")


def test_a_mistake_as_a_user_sees_it(pair: list[Path], tmp_path: Path) -> None:
    """One line, no traceback."""
    cut(pair[1])
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(configuration("sce", pair)))
    ended = runs.here("merge", tmp_path / "merge.yaml", tmp_path / "out")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"{PREFIX}{pair[1] / FILE}: {WHOLE} incomplete metadata, file not fully covered\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merge.yaml", "one"]


def test_links_as_the_hubs_cache_has_them(pair: list[Path], tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(pair[1].iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(f"../blobs/{number}")
    merge(configuration("slerp", pair, {"t": 1}), tmp_path / "out")
    merged, one = read(tmp_path / "out"), read(pair[1])
    assert all(torch.equal(merged[name], one[name]) for name in one)


def replaced(name: str, make: Callable[[Path], Any]) -> Change:
    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return spoil


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replaced(FILE, lambda path: path.symlink_to("nowhere")), "not a whole safetensors file: No such file"),
        (replaced(FILE, lambda path: path.mkdir()), "not a whole safetensors file: No such device"),
    ],
)
def test_weights_that_are_no_file(pair: list[Path], change: Change, expected: str) -> None:
    change(pair[1])
    [line] = refused(pair)
    assert line.startswith(f"one/{FILE}: {expected}"), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_configurations_that_are_none(pair: list[Path], text: str | bytes, expected: str) -> None:
    (pair[1] / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(pair) == [f"one/config.json: cannot be read ({expected})"]
    (pair[1] / "config.json").write_text("[]")
    assert refused(pair) == ["one/config.json: is not a mapping of keys"]
    (pair[1] / "config.json").unlink()
    assert refused(pair) == ["one: no config.json in one"]


def test_pickles_are_not_opened(pair: list[Path]) -> None:
    (pair[1] / FILE).unlink()
    assert refused(pair) == ["one: no safetensors weights in one"]
    (pair[1] / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/run'\ntR.")
    expected = "one: has pickled weights only (pytorch_model.bin), which can run code; convert to safetensors"
    assert refused(pair) == [expected]


def test_no_such_directory(pair: list[Path]) -> None:
    shutil.rmtree(pair[1])
    [line] = refused(pair)
    what = "is neither a directory, a .gguf file, a wheel: reference nor a hub id"
    assert line == f"merge.yaml:4: models.0.model: '{pair[1]}' {what}".replace(f"{pair[1].parent}/", "")


@pytest.mark.parametrize("name", [NORM, "zzz"])
def test_a_file_that_shrinks_while_it_is_read(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is the last tensor that is cut: a file is in the order of types, then of names."""
    for path in pair if name == "zzz" else []:
        write(path, {**read(path), name: torch.arange(1000, dtype=torch.int16)}, path)
    real = command.merge_tensors

    def shrink(*arguments: Any) -> Any:
        os.truncate(pair[1] / FILE, (pair[1] / FILE).stat().st_size - 3)
        return real(*arguments)

    monkeypatch.setattr(command, "merge_tensors", shrink)
    with pytest.raises(FuseChatError) as raised:
        merge(configuration("sce", pair), tmp_path / "out")
    expected = f"{NORM}: cannot be read from {pair[1]}; was a file cut short meanwhile?"
    if name == "zzz":
        expected = f"{pair[1] / FILE}: ends before zzz does; was it cut short meanwhile?"
    assert raised.value.messages == (expected,)
    assert not (tmp_path / "out").exists()
