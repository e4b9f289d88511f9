"""One parameter tensor of all models, processed block by block in float32 on all cores."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from fusechat.errors import ModelError
from fusechat.merge.kernels import BFLOAT16, CHUNK, FLOAT16, FLOAT32, read
from fusechat.run.usage import cores

T = TypeVar("T")
S = TypeVar("S")
BLOCK = 16 * CHUNK  # elements of each model in a thread's block: fits the core's own cache


@dataclass(frozen=True)
class Stored:
    """The flat elements of one model's tensor, of a `kind` of `kernels.py`: an array, or part of a file. `handle`: the open
    file, where they begin at byte `place`; -1 for `array`, with `place` its address."""

    kind: int
    size: int
    handle: int
    place: int
    owner: str = ""
    array: np.ndarray | None = None

    @classmethod
    def of(cls, array: np.ndarray, owner: str = "") -> "Stored":
        """Wraps an array of float32 or float16, or of uint16 with the bits of bfloat16."""
        flat = np.ascontiguousarray(array).reshape(-1)
        kind = {"float32": FLOAT32, "uint16": BFLOAT16, "float16": FLOAT16}[flat.dtype.name]
        return cls(kind, flat.size, -1, flat.ctypes.data, owner, flat)

    def rest(self, start: int) -> "Stored":
        """The elements from `start` on."""
        width = 4 if self.kind == FLOAT32 else 2
        return replace(self, size=self.size - start, place=self.place + start * width)


@dataclass(frozen=True)
class Tensor:
    """A tensor of all inputs, the base first if there is one. The first `size` elements of each are merged."""

    name: str
    inputs: tuple[Stored, ...]
    size: int
    workers: "Workers"
    block: int = BLOCK
    _where: tuple[np.ndarray, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.block % CHUNK == 0
        assert all(stored.size >= self.size for stored in self.inputs)
        handles = np.array([stored.handle for stored in self.inputs], np.int32)
        places = np.array([stored.place for stored in self.inputs], np.int64)
        kinds = np.array([stored.kind for stored in self.inputs], np.int64)
        object.__setattr__(self, "_where", (handles, places, kinds))

    @property
    def chunks(self) -> int:
        """The number of chunks of `CHUNK` elements."""
        return -(-self.size // CHUNK)

    def blocks(self, work: Callable[[int, np.ndarray], T]) -> list[T]:
        """The results of `work(start, block)` for every block, in order; `block` float32 [inputs, n] is the thread's own."""
        return self.blocks_with(lambda start, block, _: work(start, block), lambda: None)[0]

    def blocks_with(self, work: Callable[[int, np.ndarray, S], T], state: Callable[[], S]) -> tuple[list[T], list[S]]:
        """As `blocks`, with a state that each thread keeps between blocks; also returns these states."""

        def one(number: int, kept: S) -> T:
            start = number * self.block
            return work(start, self.read(start, min(self.block, self.size - start)), kept)

        return self.workers.run(one, -(-self.size // self.block), state)

    def sums(self, shape: tuple[int, ...], add: Callable[[int, np.ndarray, np.ndarray], object]) -> np.ndarray:
        """float64 [*shape]: the total of what `add(start, block, sums)` adds to `sums` [*shape, chunks], in a fixed order."""

        def one(start: int, block: np.ndarray) -> np.ndarray:
            sums = np.zeros((*shape, -(-block.shape[1] // CHUNK)))
            add(start, block, sums)
            return sums

        total: np.ndarray = np.concatenate([np.zeros((*shape, 0)), *self.blocks(one)], axis=-1).sum(axis=-1)
        return total

    def read(self, start: int, n: int) -> np.ndarray:
        """float32 [inputs, n]: elements from `start` on, valid until the thread reads again. Raises ModelError."""
        block, raw = scratch("block", (len(self.inputs), n)), scratch("raw", (4 * n,), np.uint8)
        row, problem = read(*self._where, start, raw, block)
        if problem > 0:
            place = start + int(np.flatnonzero(~np.isfinite(block[row]))[0])
            raise ModelError(
                f"{self.name}: holds values that are not finite in {self.inputs[row].owner} (element {place})"
            )
        if problem < 0:
            raise ModelError(
                f"{self.name}: cannot be read from {self.inputs[row].owner}; was a file cut short meanwhile?"
            )
        return block


class Workers:
    """Threads that work on numbers from 0 on. Kernels release Python's lock."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or cores()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge") if self.threads > 1 else None

    def run(self, work: Callable[[int, S], T], count: int, state: Callable[[], S]) -> tuple[list[T], list[S]]:
        """The results of `work(number, state)` for 0 ≤ number < count, in order, and the threads' states. Raises their errors."""
        results: list[Any] = [None] * count
        numbers = iter(range(count))

        def share() -> S:
            kept = state()
            try:
                for number in numbers:
                    results[number] = work(number, kept)
            except BaseException:
                for _ in numbers:  # stops the other threads
                    pass
                raise
            return kept

        if self._pool is None or count < 2:
            return results, [share()]
        futures: list[Future[S]] = []
        try:
            futures.extend(self._pool.submit(share) for _ in range(min(self.threads, count)))
            return results, [future.result() for future in futures]
        except BaseException:  # a failed thread, or Ctrl-C: wait until no thread writes
            for _ in numbers:
                pass
            wait(futures)
            raise

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_of_thread = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A thread's array that is reused under this name; its contents are undefined."""
    kept: dict[str, np.ndarray] = _of_thread.__dict__.setdefault("arrays", {})
    wanted = int(np.prod(shape, dtype=np.int64))
    array = kept.get(name)
    if array is None or array.size < wanted or array.dtype != dtype:
        array = kept[name] = np.empty(wanted, dtype)
    return array[:wanted].reshape(shape)
