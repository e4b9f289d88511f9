"""Sparse next-token distributions, one for each row of a prepared conversation, and their store.

Format (Arrow IPC files, one record a conversation of n rows): `id` string; `ids` list<int32> of n·k token ids, most likely
first, -1 pads; `logprobs` list<float16> of n·k log-probabilities over the full vocabulary (natural logarithm, temperature 1,
-inf pads); `nll` list<float32> of n, `-log p` of the row's own token (empty where the store holds targets, not captures).
`store.json` beside them says k.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.core.files import read_json, write_json
from fusechat.core.tables import Table, write_table

STORE, FORMAT = "store.json", 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float16())),
        ("nll", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class SparseDistribution:
    """The k most likely tokens of n next-token distributions, and what they leave out.

    `ids` int32 [n, k], -1 pads; `logprobs` [n, k], natural log-probabilities over the full vocabulary, -inf where padded;
    `nll` float32 [n] of the gold tokens, or [0] where it is not known.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    nll: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "SparseDistribution":
        """Some of the rows, in the order asked for."""
        return SparseDistribution(self.ids[rows], self.logprobs[rows], self.nll[rows] if len(self.nll) else self.nll)

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [n, k], 0 where padded."""
        return np.where(self.ids >= 0, np.exp(self.logprobs.astype(np.float64)), 0.0)

    @property
    def tail(self) -> np.ndarray:
        """float64 [n]: the probability of all tokens that were not kept."""
        return np.clip(1.0 - self.probabilities.sum(axis=1), 0.0, 1.0)


def write_distributions(path: Path, records: Iterable[tuple[str, SparseDistribution]]) -> int:
    """Writes (conversation id, distributions) pairs; returns how many."""
    return write_table(
        path,
        SCHEMA,
        (
            {
                "id": identity,
                "ids": rows.ids.astype(np.int32).reshape(-1),
                "logprobs": rows.logprobs.astype(np.float16).reshape(-1),
                "nll": rows.nll.astype(np.float32),
            }
            for identity, rows in records
        ),
    )


def write_store(directory: Path, *, k: int, files: str) -> None:
    """Marks a directory as a store of distributions; `files` is the pattern of its Arrow files."""
    write_json(directory / STORE, {"format": FORMAT, "k": k, "files": files})


def open_distributions(directory: Path) -> "DistributionSet":
    """The distributions that a finished step wrote to its directory."""
    store = read_json(directory / STORE)
    return DistributionSet(list(directory.glob(store["files"])), k=store["k"])


class DistributionSet:
    """A memory-mapped store of distributions, by conversation id."""

    def __init__(self, paths: list[Path], k: int) -> None:
        self.table = Table(sorted(paths))
        self.k = k
        self.index = {identity: row for row, identity in enumerate(self.table.column("id"))}

    def __contains__(self, identity: str) -> bool:
        return identity in self.index

    def __getitem__(self, identity: str) -> SparseDistribution:
        row = self.index[identity]
        return SparseDistribution(
            ids=self.table.array("ids", row).reshape(-1, self.k),
            logprobs=self.table.array("logprobs", row).reshape(-1, self.k),
            nll=self.table.array("nll", row),
        )
