"""Sparse next-token distributions, one for each row of a prepared conversation, and their store: what capture and align write.

Format 3. A store is a directory with `store.json` and Arrow IPC files ("file" format, not compressed):

- `store.json`: `format`, the number 3; `k`, how many tokens a row has; `files`, a pattern that the names of its Arrow files match.
  All files have one schema, and together they are the store, in the order of their names. No id is in it twice.
- Files of captures are named `shard-<number>-<checksum>.arrow`: the number from 0 on, in five digits or more; the first 16
  hexadecimal digits of the SHA-256 of the file's bytes. Shard i holds the i-th `shard_conversations` of the prepared
  conversations, in their order, without rejected ones; it may be empty.
- A record is a conversation of n rows (a row: see `data/prepared.py`), in record batches of at most 512:
  - `id` string: the conversation's id
  - `ids` list<uint16 or int32> of n·k token ids, those of row i from i·k on, most probable first, distinct in a row. uint16 in
    captures of models with at most 65,536 tokens; else int32, where -1 pads the end of a row with fewer than k
  - `logprobs` list<float16> of n·k: their log-probabilities over the full vocabulary (natural logarithm, temperature 1;
    computed in float32), -inf where padded
  - `nll` list<float32> of n: `-log p` of the row's own token; of length 0 where the store holds targets, not captures
  - `tail` list<float32> of n: the probability of all tokens that were not kept, from the float32 log-softmax, not from the
    rounded `logprobs`. Readers scale the kept ones to `1 - tail`

A captured row takes 4·k + 8 or 6·k + 8 bytes, and a conversation about 70 more. Nothing is stored for prompts and padding.

Format 2 has no `tail`, and is still read: the tail is what the rounded `logprobs` leave, 0 if below 1e-3, which may be rounding. A
capture that began in format 2 continues in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.data.tables import Table, write_table
from fusechat.errors import WorkdirError
from fusechat.run.cache import fresh_digest
from fusechat.run.files import PARTIAL, digest, read_json, write_json

STORE, FORMAT = "store.json", 3
_TAILS = 3  # the first format with tails
SHARDS = "shard-*.arrow"
_ROUNDING = 1e-3  # a smaller tail may be float16 rounding of log-probabilities
_NO_TAIL = 1e-12  # a smaller tail may be float64 rounding
_SCALED = 1e-3  # from here on, the kept mass is more exact from a float32 tail than from float16 logarithms
_CHECKSUM = 16  # hexadecimal digits of a shard's SHA-256 in its name


def _schema(ids: pa.DataType, *, tails: bool) -> pa.Schema:
    lists = {"ids": ids, "logprobs": pa.float16(), "nll": pa.float32()} | ({"tail": pa.float32()} if tails else {})
    return pa.schema([("id", pa.string()), *((name, pa.list_(kind)) for name, kind in lists.items())])


@dataclass(frozen=True)
class SparseDistribution:
    """The k most probable tokens of n next-token distributions, and their tails.

    `ids` int32 [n, k], -1 pads; `logprobs` [n, k], natural log-probabilities over the full vocabulary, -inf for pads; `nll`
    float32 [n] of the gold tokens (nats), or [0] if unknown; `tail` [n], the probability of all other tokens.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    nll: np.ndarray
    tail: np.ndarray = None  # type: ignore[assignment]  # never None after __post_init__

    def __post_init__(self) -> None:
        if self.tail is None:
            object.__setattr__(self, "tail", left_over(self.probabilities))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray | slice) -> "SparseDistribution":
        """Some of the rows, in the given order."""
        nll = self.nll[rows] if len(self.nll) else self.nll
        return SparseDistribution(self.ids[rows], self.logprobs[rows], nll, self.tail[rows])

    def cut(self, k: int) -> "SparseDistribution":
        """The first `k` tokens of each row; the others join the tail."""
        dropped = self.probabilities[:, k:].sum(axis=1)
        return SparseDistribution(self.ids[:, :k], self.logprobs[:, :k], self.nll, np.minimum(self.tail + dropped, 1.0))

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [n, k], 0 for pads."""
        return np.where(self.ids >= 0, np.exp(self.logprobs.astype(np.float64)), 0.0)


def left_over(kept: np.ndarray) -> np.ndarray:
    """float64 [n]: 1 minus the sums of float64 probabilities [n, k]; 0 if that may be rounding."""
    tail = np.clip(1.0 - kept.sum(axis=1), 0.0, 1.0)
    return np.where(tail < _NO_TAIL, 0.0, tail)


def nothing(n: int, k: int = 1) -> SparseDistribution:
    """n rows of pads, with tails of 1."""
    none = np.zeros(0, dtype=np.float32)
    return SparseDistribution(np.full((n, k), -1, np.int32), np.full((n, k), -np.inf), none, np.ones(n))


def write_distributions(
    path: Path,
    records: Iterable[tuple[str, SparseDistribution]],
    *,
    vocabulary: int | None = None,
    store_format: int = FORMAT,
) -> int:
    """Writes (conversation id, distributions) pairs; returns how many. `vocabulary`: the model's size, if no id is a pad."""
    kind = pa.uint16() if vocabulary is not None and vocabulary <= 1 << 16 else pa.int32()
    return write_table(
        path,
        _schema(kind, tails=store_format >= _TAILS),
        (
            {
                "id": identity,
                "ids": rows.ids.astype(np.int32).reshape(-1),
                "logprobs": rows.logprobs.astype(np.float16).reshape(-1),
                "nll": rows.nll.astype(np.float32),
                "tail": rows.tail.astype(np.float32),
            }
            for identity, rows in records
        ),
    )


def write_shard(
    directory: Path,
    number: int,
    records: Iterable[tuple[str, SparseDistribution]],
    *,
    vocabulary: int,
    store_format: int = FORMAT,
) -> Path:
    """Writes a shard of a capture; its name has the checksum of its bytes. Returns its path."""
    unnamed = directory / f"shard-{number:05d}{PARTIAL}"
    write_distributions(unnamed, records, vocabulary=vocabulary, store_format=store_format)
    return unnamed.rename(directory / f"shard-{number:05d}-{digest(unnamed)[:_CHECKSUM]}.arrow")


def shards_of(directory: Path, number: int) -> list[Path]:
    """The files with a shard's name, intact or not."""
    return sorted(directory.glob(f"shard-{number:05d}-*.arrow"))


def is_sound(shard: Path) -> bool:
    """Whether a shard has the checksum in its name. Reads the file, and caches the result."""
    return shard.stem.rpartition("-")[2] == fresh_digest(shard)[:_CHECKSUM]


def write_store(directory: Path, *, k: int, files: str, store_format: int = FORMAT) -> None:
    """Marks a directory as a store of distributions; `files`: the pattern of its Arrow files."""
    write_json(directory / STORE, {"format": store_format, "k": k, "files": files})


def begun_format(directory: Path) -> int:
    """The format of the store in a directory, else the current one."""
    return int(read_json(directory / STORE)["format"]) if (directory / STORE).is_file() else FORMAT


def open_distributions(*directories: Path, verify: bool = True) -> "DistributionSet":
    """Opens the stores of finished steps, of one model and one k. Raises WorkdirError for damaged captures if `verify` is set."""
    stores = {directory: read_json(directory / STORE) for directory in directories}
    paths = [path for directory, store in stores.items() for path in sorted(directory.glob(store["files"]))]
    if verify and any(store["files"] == SHARDS for store in stores.values()):
        damaged = [path for path in paths if not is_sound(path)]
        if damaged:
            raise WorkdirError(
                *(f"{path}: is damaged (its checksum differs); run again to capture it again" for path in damaged)
            )
    return DistributionSet(paths, k=stores[directories[0]]["k"])


class DistributionSet:
    """Memory-mapped stores of distributions by conversation id; the first store with an id counts."""

    def __init__(self, paths: list[Path], k: int) -> None:
        self.table = Table(paths)
        self.k = k
        self.index: dict[str, int] = {}
        for row, identity in enumerate(self.table.column("id")):
            self.index.setdefault(identity, row)

    def __contains__(self, identity: str) -> bool:
        return identity in self.index

    @cached_property
    def has_tails(self) -> bool:
        """Whether all of it was written with tails."""
        return "tail" in self.table.names and not self.table.has_nulls("tail")

    def __getitem__(self, identity: str) -> SparseDistribution:
        """A conversation's distributions; log-probabilities are float64, scaled so that the kept mass and the tail sum to 1."""
        row = self.index[identity]
        ids = self.table.array("ids", row).astype(np.int32, copy=False).reshape(-1, self.k)
        logprobs = self.table.array("logprobs", row).astype(np.float64).reshape(-1, self.k)
        kept = np.exp(logprobs).sum(axis=1)  # padding is -inf
        tail = self.table.array("tail", row) if "tail" in self.table.names else kept[:0]
        if len(tail) < len(kept):
            tail = np.clip(1.0 - kept, 0.0, 1.0)
            tail = np.where(tail < _ROUNDING, 0.0, tail)
        scaled = (kept > 0) & (1.0 - tail.astype(np.float64) >= _SCALED)
        logprobs[scaled] += (np.log1p(-tail[scaled].astype(np.float64)) - np.log(kept[scaled]))[:, None]
        return SparseDistribution(ids, logprobs, self.table.array("nll", row), tail)
