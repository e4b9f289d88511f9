"""Runs work on items in order, in this process or in others. They end when the process that started them ends."""

import os
import pickle
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fusechat.errors import WorkdirError
from fusechat.run.files import PARTIAL

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")


class Processes:
    """A context manager of `number` processes, started on demand. Their input is in temporary files in `directory`."""

    def __init__(self, number: int, directory: Path | None = None) -> None:
        self.number, self.directory = number, directory
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map(self, work: Callable[[Any, I], R], state: Any, items: Sequence[I]) -> Iterator[R]:
        """Yields `work(state, item)` for each item, in order. Raises WorkdirError if a process was killed."""
        if min(self.number, len(items)) < 2:
            return (work(state, item) for item in items)
        return self._fan_out(work, state, items)

    def _fan_out(self, work: Callable[[Any, I], R], state: Any, items: Sequence[I]) -> Iterator[R]:
        """Keeps at most two items a process in progress, so that results do not pile up."""
        waiting: deque[Future[R]] = deque()
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=PARTIAL) as file:
            pickle.dump(state, file, protocol=5)
            file.flush()
            try:
                for item in items:
                    waiting.append(self._submit(work, file.name, item))
                    if len(waiting) > 2 * self.number:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool:
                raise WorkdirError(
                    "align: a process was killed (out of memory?); set align.processes to 1, then run again"
                ) from None
            finally:
                for future in waiting:
                    future.cancel()

    def _submit(self, work: Callable[[Any, I], R], file: str, item: I) -> Future[R]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.number, get_context("spawn"), _begin)
        # A child inherits the signal mask: Ctrl-C is for the parent. A main module with a file would make the child run the
        # user's script again, up to its `if __name__ == "__main__"`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return self._pool.submit(_in_process, work, file, item)
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_state: tuple[str, Any] = ("", None)  # the file that this process read last, and its content


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()  # a child holds both ends of its queue, and would wait forever
        os._exit(1)


def _in_process(work: Callable[[Any, I], R], file: str, item: I) -> R:
    global _state
    if _state[0] != file:
        _state = file, pickle.loads(Path(file).read_bytes())
    return work(_state[1], item)
