"""Files: nothing half-written is ever taken for whole."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cases import each
from fusechat.data.tables import Table, write_table
from fusechat.run.files import atomic_directory, atomic_file, read_json, remove_partial, write_json


class KilledError(BaseException):
    """As a signal ends a run."""


@each("error", [RuntimeError, KilledError])
def test_an_exception_leaves_the_older_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_an_exception_leaves_the_older_directory_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("old")

    def fail_half_way() -> None:
        with atomic_directory(path) as temporary:
            (temporary / "b").write_text("half")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail_half_way()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert [file.name for file in path.iterdir()] == ["a"]
    with atomic_directory(path) as temporary:
        (temporary / "c").write_text("new")
    assert [file.name for file in path.iterdir()] == ["c"]


def test_a_table_whose_records_fail_is_not_written(tmp_path: Path) -> None:
    def records() -> Any:
        for number in range(2000):  # more than one batch
            if number == 1500:
                raise RuntimeError("broken")
            yield {"id": str(number), "ids": [number]}

    schema = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32()))])
    with pytest.raises(RuntimeError, match="broken"):
        write_table(tmp_path / "t.arrow", schema, records())
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_several_batches_and_files_reads_back(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32()))])
    rows = [{"id": str(n), "ids": list(range(n, n + n % 4))} for n in range(1500)]
    assert write_table(tmp_path / "0.arrow", schema, rows[:1100]) == 1100
    assert write_table(tmp_path / "1.arrow", schema, rows[1100:]) == 400
    table = Table([tmp_path / "0.arrow", tmp_path / "1.arrow"])
    assert table.column("id") == [row["id"] for row in rows]
    assert table.list_lengths("ids").tolist() == [len(row["ids"]) for row in rows]
    assert all(table.array("ids", index).tolist() == row["ids"] for index, row in enumerate(rows))


def test_what_a_killed_run_left_half_written_is_cleared_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".model.partial").mkdir(parents=True)
    (tmp_path / "deep" / ".model.partial" / "weights").write_text("half")
    (tmp_path / ".file.json.partial").write_text("half")
    (tmp_path / "partial.json").write_text("whole")
    remove_partial(tmp_path)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == ["deep", "partial.json"]


def test_equal_values_are_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": "é", "b": 1}
