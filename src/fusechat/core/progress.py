"""What a user sees while work goes on: progress bars and log lines on stderr, never on stdout."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

T = TypeVar("T")
console = Console(stderr=True)
log = logging.getLogger("fusechat")
_EVERY = 10.0  # seconds between lines where stderr is no terminal


class Advance(Protocol):
    def __call__(self, amount: int = 1, note: str = "") -> None: ...


def setup_logging() -> None:
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """A bar on a terminal, a line every ten seconds elsewhere. Without `total`, a spinner with the time that passed."""
    if console.is_terminal:
        yield from _bar(description, total, unit)
    else:
        yield from _lines(description, total, unit)


def track(items: Sequence[T], description: str, unit: str = "") -> Iterator[T]:
    """Iterates with a progress bar."""
    with progress(description, len(items), unit) as advance:
        for item in items:
            yield item
            advance()


def _bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    counted = [BarColumn(), MofNCompleteColumn(), TextColumn(unit), Remaining()] if total is not None else []
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *counted,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.update(task, advance=amount)
            if note:
                bar.update(task, note=note)

        yield advance


def _lines(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    began = last = time.monotonic()
    done = 0

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            log.info("%s: %d%s %s %s", description, done, f"/{total}" if total else "", unit, note)

    log.info("%s …", description)
    yield advance
    log.info("%s: done in %.1f s", description, time.monotonic() - began)
