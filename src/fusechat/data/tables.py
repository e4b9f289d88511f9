"""Arrow IPC files of records with arrays, written in batches and read memory-mapped."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusechat.errors import WorkdirError
from fusechat.run.files import atomic_file

_BATCH = 512  # records in a batch


def write_table(path: Path, schema: pa.Schema, records: Iterable[Mapping[str, Any]], *, optional: str = "") -> int:
    """Writes `records` atomically; returns how many. `optional`: a column of bool lists that is left out if all are false."""
    count, needed = 0, not optional
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        waiting: list[Mapping[str, Any]] = []
        for record in records:
            waiting.append(record)
            count, needed = count + 1, needed or bool(record[optional].any())
            if len(waiting) == _BATCH:
                writer.write_batch(_batch(schema, waiting))
                waiting.clear()
        if waiting:
            writer.write_batch(_batch(schema, waiting))
    if not needed:
        _leave_out(optional, path)
    return count


def _leave_out(column: str, path: Path) -> None:
    """Rewrites a table without a column, batch by batch."""
    with pa.memory_map(str(path)) as source, atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        table = pa.ipc.open_file(source)
        kept = [name for name in table.schema.names if name != column]
        with pa.ipc.new_file(sink, pa.schema([table.schema.field(name) for name in kept])) as writer:
            for index in range(table.num_record_batches):
                writer.write_batch(table.get_batch(index).select(kept))


def _batch(schema: pa.Schema, records: list[Mapping[str, Any]]) -> pa.RecordBatch:
    return pa.record_batch(
        [_array(field.type, [record[field.name] for record in records]) for field in schema], schema=schema
    )


def _array(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, type=kind.value_type))


class Table:
    """The records of one or several Arrow IPC files, in order, memory-mapped. A column that a file lacks has nulls there."""

    def __init__(self, paths: list[Path]) -> None:
        parts = []
        for path in paths:
            try:
                with pa.memory_map(str(path)) as source:
                    parts.append(pa.ipc.open_file(source).read_all())
            except pa.ArrowInvalid:
                raise WorkdirError(f"{path}: is damaged; delete its directory, then run again") from None
        self.table = pa.concat_tables(parts, promote_options="default")
        self._chunk_of: dict[str, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]] = {}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def names(self) -> list[str]:
        """The columns of all files."""
        return list(self.table.schema.names)

    def has_nulls(self, name: str) -> bool:
        """Whether a column has nulls."""
        return bool(self.table.column(name).null_count)

    def column(self, name: str) -> list[Any]:
        """A column as Python values."""
        return list(self.table.column(name).to_pylist())

    def array(self, name: str, row: int) -> np.ndarray:
        """The list in column `name` of record `row` as a NumPy array, a view of the file if the dtype allows it."""
        starts, chunks = self._chunks(name)
        chunk = int(np.searchsorted(starts, row, side="right")) - 1
        offsets, values = chunks[chunk]
        local = row - int(starts[chunk])
        return values[offsets[local] : offsets[local + 1]]

    def list_lengths(self, name: str) -> np.ndarray:
        """int64 [records]: the lengths of a column's lists."""
        return np.asarray(pc.list_value_length(self.table.column(name)).to_numpy(), dtype=np.int64)

    def _chunks(self, name: str) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """The first record of each chunk of a column, and the chunk's offsets and values, views of the file if possible."""
        if name not in self._chunk_of:
            chunks = self.table.column(name).chunks
            starts = np.cumsum([0, *map(len, chunks)][:-1], dtype=np.int64)
            parts = [(each.offsets.to_numpy(), each.values.to_numpy(zero_copy_only=False)) for each in chunks]
            self._chunk_of[name] = starts, parts
        return self._chunk_of[name]
