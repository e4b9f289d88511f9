"""Progress bars and log lines on stderr, in a notebook below the cell, never on stdout."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import TimeRemainingColumn as Remaining

from fusechat.run import ranks

T = TypeVar("T")
console = Console(stderr=True)
log = logging.getLogger("fusechat")
BYTES = "bytes"  # a unit: shown as kB, MB, GB
_EVERY = 10.0  # seconds between lines if stderr is not a terminal
_REDRAWN = 0.5  # seconds between redraws in a notebook


class Advance(Protocol):
    """A function that advances a progress bar by `amount`."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


class _Stderr(logging.StreamHandler):
    """Writes to the current stderr, which a notebook or caller may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging() -> None:
    """Shows FuseChat's log lines on stderr; on other processes than the first only warnings."""
    handler: logging.Handler
    if sys.stderr.isatty() or console.is_jupyter:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if ranks.is_first() else logging.WARNING)
    log.propagate = False
    # Transformers imports bitsandbytes for every training if installed, and it warns about unused features.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def setup_logging_once() -> None:
    """For a program that imports FuseChat: shows log lines unless it has handlers for them."""
    if not log.hasHandlers():
        setup_logging()


@contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """A progress bar on a terminal or in a notebook, elsewhere a line every ten seconds. Without `total`, a spinner."""
    if (console.is_terminal or console.is_jupyter) and ranks.is_first():
        yield from _bar(description, total, unit)
    else:
        yield from _lines(description, total, unit)


def _bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == BYTES else [MofNCompleteColumn(), TextColumn(unit)]
    counted = [BarColumn(), *amount, Remaining()] if total is not None else []
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *counted,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    bar = Progress(*columns, console=console, redirect_stdout=False)
    with _in_notebook(bar) if console.is_jupyter else bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.update(task, advance=amount)
            if note:
                bar.update(task, note=note)

        yield advance


@contextmanager
def _in_notebook(bar: Progress) -> Iterator[None]:
    """Redraws a bar as an output of the cell. Rich would use ipywidgets, which may be missing, and clears others' output."""
    from IPython.display import display

    shown, ended = display(bar, display_id=True), threading.Event()

    def draw() -> None:
        while not ended.wait(_REDRAWN):
            shown.update(bar)

    drawing = threading.Thread(target=draw, daemon=True)
    drawing.start()
    try:
        yield
    finally:
        ended.set()
        drawing.join()
        shown.update(bar)


def in_bytes(count: int) -> str:
    """`1.3 GB`: decimal units."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"


def in_time(seconds: float) -> str:
    """`12.3 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _lines(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    began = last = time.monotonic()
    done = 0
    shown, of = (in_bytes, "") if unit == BYTES else (str, unit)

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            log.info("%s: %s%s %s %s", description, shown(done), f"/{shown(total)}" if total else "", of, note)

    log.info("%s …", description)
    yield advance
    log.info("%s: done in %.1f s", description, time.monotonic() - began)
