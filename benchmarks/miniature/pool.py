"""Jobs side by side, each process with one thread: tiny models gain nothing from more."""

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache

from miniature.jobs import Job, Place


def run(jobs: Sequence[Job], place: Place, what: str) -> None:
    """Runs what is not done yet, and raises what a job raises. What was done stays."""
    waiting = list({job.key(place): job for job in jobs if not job.done(place)}.values())
    if not waiting:
        return
    began = time.monotonic()
    pool = _workers()
    futures = [pool.submit(_run, job, place) for job in waiting]
    try:
        for count, future in enumerate(as_completed(futures), 1):
            future.result()
            print(
                f"\r{what}: {count} of {len(waiting)}, {time.monotonic() - began:.0f} s ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _workers.cache_clear()
        raise
    finally:
        print(file=sys.stderr)


@cache
def _workers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count() or 1, multiprocessing.get_context("spawn"), _ready)


def _run(job: Job, place: Place) -> None:
    job.run(place)


def one_thread() -> None:
    """For the processes that will be started; to be called before anything heavy is imported."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _ready() -> None:
    """Of a new process: it says little, and ends when the one that started it was killed."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("fusechat").setLevel(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
