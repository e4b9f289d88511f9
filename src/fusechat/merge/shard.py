"""Writes a safetensors file block by block, from any thread: the header first, then each tensor's bytes at their place."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.merge.checkpoint import BYTES
from fusechat.merge.plan import OutputTensor
from fusechat.run.files import atomic_file

FLUSH = 1 << 28  # bytes after which the disk writes in the background


class Shard:
    """An open safetensors file with space for all its tensors."""

    def __init__(self, handle: int, pieces: list[OutputTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        starts = {}
        # Sorted by dtype size: every tensor is aligned to its own.
        for piece in sorted(pieces, key=lambda piece: -BYTES[piece.dtype]):
            header[piece.name] = {
                "dtype": piece.dtype,
                "shape": list(piece.shape),
                "data_offsets": [offset, offset + piece.bytes],
            }
            starts[piece.name] = offset
            offset += piece.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._handle = handle
        self._write(0, len(text).to_bytes(8, "little") + text)
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="merge-flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def put(self, piece: OutputTensor, element: int, values: np.ndarray) -> None:
        """Writes `values`, of the tensor's dtype, from element `element` on."""
        self.put_bytes(piece, element * BYTES[piece.dtype], values.reshape(-1).view(np.uint8).data)

    def put_bytes(self, piece: OutputTensor, start: int, data: Any) -> None:
        """Writes bytes of the tensor from byte `start` on."""
        self._write(self._starts[piece.name] + start, data)

    def flush_behind(self, written: int) -> None:
        """Takes the number of bytes written, and flushes in the background every `FLUSH` bytes. Raises a failed flush's OSError."""
        self._unflushed += written
        if self._unflushed >= FLUSH and (self._flushing is None or self._flushing.done()):
            self._settle()
            self._flushing = self._disk.submit(os.fdatasync, self._handle)
            self._unflushed = 0

    def close(self) -> None:
        """Flushes and closes the file."""
        self._disk.shutdown(wait=True)
        self._settle()

    def _settle(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def _write(self, offset: int, data: Any) -> None:
        view = memoryview(data)
        while view.nbytes:
            done = os.pwrite(self._handle, view, offset)
            view, offset = view[done:], offset + done


@contextmanager
def new_shard(path: Path, pieces: list[OutputTensor]) -> Iterator[Shard]:
    """A shard that is renamed to `path` on success, and deleted otherwise."""
    with atomic_file(path) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            shard = Shard(handle, pieces)
            try:
                yield shard
            finally:
                shard.close()
        finally:
            os.close(handle)
