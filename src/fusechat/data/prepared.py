"""Prepared conversations: tokens of the rendered text, and one row for each response token.

Capture, alignment, fusion and evaluation share these rows: a row is one response token with the distribution that predicts it.
`fusechat.models.forward` alone decides which logits those are.

Format of `conversations.arrow` (Arrow IPC file, one record for each conversation; all lists of rows have the same length n):

- `id` string: the conversation's id
- `input_ids` list<int32>: tokens of the rendered text, without added special tokens
- `position` list<int32>: index of each row's token in `input_ids`
- `response` list<int32>: index of the row's response among the conversation's assistant messages
- `begin`, `end` list<int32>: byte span from the start of the response's content. `begin < 0`: the token also covers that many
  bytes of the template before the content. End-of-turn rows have an empty span after the content.
- `end_of_turn` list<bool>
- `lead` list<bool>: tokens of the template's text between the prompt and the content (a `▁` before a digit), trained like all rows,
  but without bytes of the content. A file without such rows has no such column.
- `content_bytes` list<int32>: UTF-8 bytes of each response's rendered content, indexed by response
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.data.tables import Table, write_table

FILE = "conversations.arrow"
_NUMBERS, _MARKS = ("position", "response", "begin", "end"), ("end_of_turn", "lead")
ROWS: dict[str, type] = dict.fromkeys(_NUMBERS, np.int32) | dict.fromkeys(_MARKS, np.bool_)
_LISTS = {
    **dict.fromkeys(("input_ids", *_NUMBERS), pa.int32()),
    "end_of_turn": pa.bool_(),
    "content_bytes": pa.int32(),
    "lead": pa.bool_(),
}
SCHEMA = pa.schema([("id", pa.string()), *((name, pa.list_(kind)) for name, kind in _LISTS.items())])


@dataclass(frozen=True)
class Prepared:
    """One conversation as one model sees it. The module's docstring describes the arrays."""

    id: str
    input_ids: np.ndarray  # int32 [tokens]
    position: np.ndarray  # int32 [n]
    response: np.ndarray  # int32 [n]
    begin: np.ndarray  # int32 [n]
    end: np.ndarray  # int32 [n]
    end_of_turn: np.ndarray  # bool [n]
    content_bytes: np.ndarray  # int32 [responses]
    lead: np.ndarray = None  # type: ignore[assignment]  # bool [n]; all False by default

    def __post_init__(self) -> None:
        if self.lead is None or len(self.lead) < len(
            self.position
        ):  # a file without the column, joined with one that has it
            object.__setattr__(self, "lead", np.zeros(len(self.position), dtype=bool))

    def __len__(self) -> int:
        return len(self.position)

    @property
    def gold(self) -> np.ndarray:
        """int32 [n]: the token of each row."""
        return self.input_ids[self.position]


def write_prepared(path: Path, conversations: Iterable[Prepared]) -> int:
    """Writes a file of conversations atomically; returns how many."""
    records = ({f.name: getattr(c, f.name) for f in fields(c)} for c in conversations)
    return write_table(path, SCHEMA, records, optional="lead")


class PreparedSet:
    """A memory-mapped set of prepared conversations, or several in order. `row_of`: the first row of each id."""

    def __init__(self, *directories: Path) -> None:
        self.table = Table([directory / FILE for directory in directories])
        self.ids: list[str] = self.table.column("id")
        self._columns = [name for name in _LISTS if name in self.table.table.column_names]
        self.row_of: dict[str, int] = {}
        for row, identity in enumerate(self.ids):
            self.row_of.setdefault(identity, row)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Prepared]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Prepared:
        return Prepared(id=self.ids[row], **{name: self.table.array(name, row) for name in self._columns})

    def lengths(self) -> np.ndarray:
        """int64 [conversations]: the number of tokens of each."""
        return self.table.list_lengths("input_ids")
