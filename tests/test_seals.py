"""What a run continues from after a kill: every alteration of it is found, and nothing else is taken for one."""

import os
import time
from pathlib import Path

import pytest

from fusechat.run.integrity import matches_record, read_sealed, record, write_sealed

VALUE = {"shard": {"bytes": 3}, "tensors": {"a.weight": [0.1, -2.5e-9], "größe": None}}


def test_a_value_comes_back(tmp_path: Path) -> None:
    write_sealed(tmp_path / "value.json", VALUE)
    assert read_sealed(tmp_path / "value.json") == VALUE


def test_of_a_file_with_one_bit_flipped_nothing_comes_back_or_the_value(tmp_path: Path) -> None:
    """The value itself only where the bit changes no meaning, such as the kind of white space."""
    file = tmp_path / "value.json"
    write_sealed(file, VALUE)
    data, lost = file.read_bytes(), 0
    for place in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            found = read_sealed(file)
            assert found in (None, VALUE), (place, bit)
            lost += found is None
    assert lost > 0.9 * 8 * len(data)


def test_something_else_is_no_sealed_value(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "null", '{"value": 1}', '{"sha256": "", "value": 1}', "[" * 100_000):
        (tmp_path / "value.json").write_text(text)
        assert read_sealed(tmp_path / "value.json") is None, text[:30]
    assert read_sealed(tmp_path / "no such file") is None


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A directory of two files next to a third, all sealed, in which time has passed since."""
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_text("0.25")
    (tmp_path / "model" / "config").write_text("{}")
    (tmp_path / "losses").write_text("1")
    record(tmp_path / "sealed.json", tmp_path / "model", tmp_path / "losses")
    time.sleep(0.05)  # file systems count time in ticks
    return tmp_path


def holds(place: Path, model: str = "model") -> bool:
    return matches_record(place / "sealed.json", place / model, place / "losses")


def test_what_nobody_touched_is_as_it_was_sealed_also_by_another_name(sealed: Path) -> None:
    assert holds(sealed)
    (sealed / "model").rename(sealed / "renamed")
    assert holds(sealed, "renamed")
    assert not holds(sealed)


def test_a_file_altered_in_place_with_its_size_and_time_put_back(sealed: Path) -> None:
    for name in ("model/deep/weights", "losses"):
        record(sealed / "sealed.json", sealed / "model", sealed / "losses")
        time.sleep(0.05)
        before, data = (sealed / name).stat(), (sealed / name).read_bytes()
        (sealed / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        os.utime(sealed / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not holds(sealed), name


def test_a_file_gone_and_a_file_more_and_no_seal(sealed: Path) -> None:
    (sealed / "model" / "more").touch()
    assert not holds(sealed)
    (sealed / "model" / "more").unlink()
    assert holds(sealed)
    (sealed / "losses").rename(sealed / "elsewhere")
    assert not holds(sealed)
    (sealed / "elsewhere").rename(sealed / "losses")
    (sealed / "sealed.json").unlink()
    assert not holds(sealed)
