"""Files of rows that a killed step goes on from and that several processes share: `<kind>-00000.json`, each with its checksum."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fusechat.errors import WorkdirError
from fusechat.run.integrity import read_checked, write_checked
from fusechat.run.progress import log, progress

Row = dict[str, Any]
Making = Callable[[list[Row]], list[Row]]  # rows about answers, from the answers
Opened = AbstractContextManager[Making]


class Shards:
    """The rows of a step. A shard is written whole or not at all."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind

    def path(self, number: int) -> Path:
        return self.directory / f"{self.kind}-{number:05d}.json"

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Those that are not there. What was altered since it was written is removed, and said."""
        found = []
        for number in wanted:
            if read_checked(self.path(number)) is None:
                found.append(number)
                if self.path(number).exists():
                    log.warning("%s: is damaged (its checksum differs): made again", self.path(number))
                    self.path(number).unlink()
        return found

    def write(self, number: int, rows: list[Row]) -> None:
        write_checked(self.path(number), {"rows": rows})

    def read(self, number: int) -> list[Row]:
        found = read_checked(self.path(number))
        if found is None:
            raise WorkdirError(f"{self.path(number)}: is damaged; run again, and it is made again")
        return list(found["rows"])

    @property
    def count(self) -> int:
        """Of a finished step."""
        return len(list(self.directory.glob(f"{self.kind}-*.json")))

    def __iter__(self) -> Iterator[list[Row]]:
        """The rows of each shard of a finished step, in order."""
        return (self.read(number) for number in range(self.count))


def make(shards: Shards, mine: Sequence[int], answers: Shards, opened: Opened, what: str) -> dict[str, Any]:
    """Makes the shards of this process that are missing, each from the one of `answers`; returns the counts of all of `mine`. A row
    with a `why` has no value."""
    missing = shards.missing(mine)
    if missing:
        with opened as rows_of, progress(what, len(missing), "shards") as advance:
            for number in missing:
                shards.write(number, rows_of(answers.read(number)))
                advance(1)
    rows = [row for number in mine for row in shards.read(number)]
    left_out = Counter(row["why"] for row in rows if "why" in row)
    tokens = sum(row.get("tokens", 0) for row in rows)
    found = {"candidates": len(rows), "scored": len(rows) - left_out.total(), "left_out": dict(left_out)}
    return {**found, "tokens": tokens} if tokens else found


def slices(items: Sequence[Any], size: int) -> list[Any]:
    """`items` in parts of `size`."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
