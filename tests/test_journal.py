"""A journal keeps what was answered, whatever happens to the process that writes it."""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import each
from fusechat.errors import WorkdirError
from fusechat.models.journal import Journal, read_journal


def test_what_was_added_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    values = {"a": {"text": "größer 你好 🙂\u2028 \ud83d"}, "b": None, "c": [1, 2.5, "x"], "d": "line\nbreak"}
    with Journal(path) as journal:
        for key, value in values.items():
            assert key not in journal
            journal.add(key, value)
            assert journal[key] == value
    with Journal(path) as journal:
        assert {key: journal[key] for key in values} == values
        assert "e" not in journal
    assert read_journal(path) == values
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == list(values)


def test_of_a_key_that_is_there_twice_the_last_holds(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.add("a", 1)
        journal.add("b", 2)
        journal.add("a", 3)
        assert journal["a"] == 3
    assert read_journal(tmp_path / "j") == {"a": 3, "b": 2}


WHOLE = b'{"key": "a", "value": "gr\xc3\xb6\xc3\x9fer"}\n{"key": "b", "value": "\xf0\x9f\x99\x82"}\n'


def test_a_last_line_cut_anywhere_is_cut_off_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for end in range(len(WHOLE) + 1):
        path.write_bytes(WHOLE[:end])
        kept = dict((("a", "größer"), ("b", "🙂"))[: WHOLE[:end].count(b"\n")])
        assert read_journal(path) == kept, end
        assert path.read_bytes() == WHOLE[:end]  # it may be another process that is writing
        with Journal(path) as journal:
            assert all(journal[key] == value for key, value in kept.items()), end
            journal.add("c", "new")
        assert read_journal(path) == kept | {"c": "new"}, end


@given(st.binary(max_size=40).filter(lambda data: b"\n" not in data))
def test_whatever_a_power_cut_left_at_the_end_is_cut_off(tmp_path_factory: pytest.TempPathFactory, left: bytes) -> None:
    path = tmp_path_factory.mktemp("power") / "j"
    path.write_bytes(WHOLE + left)
    Journal(path).close()
    assert path.read_bytes() == WHOLE


@each("bad", [b"", b"{", b"[1]", b"7", b'{"key": "a"}', b'{"key": 1, "value": 2}', b"\xff\x00", b"null"])
def test_any_other_bad_line_is_told(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "j"
    for after, read in itertools.product((b"", WHOLE), (Journal, read_journal)):
        path.write_bytes(WHOLE + bad + b"\n" + after)
        with pytest.raises(WorkdirError) as caught:
            read(path)
        assert str(caught.value) == f'{path}:3: not a line of a journal ({{"key": …, "value": …}})'
        assert path.read_bytes() == WHOLE + bad + b"\n" + after


def test_one_process_at_a_time_writes_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(WorkdirError, match="another process is writing it"):
            Journal(tmp_path / "j")
        journal.add("a", 1)
        assert read_journal(tmp_path / "j") == {"a": 1}
    journal.close()
    Journal(tmp_path / "j").close()


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(path) as journal:
        journal.add("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space") as caught:
                journal.add("b", 2)
        assert caught.value.filename == str(path)
        assert "b" not in journal
        journal.add("c", 3)
    assert read_journal(path) == {"a": 1, "c": 3}


def test_values_that_json_cannot_hold_are_a_defect(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.add("a", float("nan"))
    assert (tmp_path / "j").read_bytes() == b""


def test_where_there_is_none_reading_makes_none(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j") == {}
    assert not (tmp_path / "j").exists()
