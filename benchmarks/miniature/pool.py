"""Jobs side by side, each process with one thread: tiny models gain nothing from more."""

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache

from miniature.jobs import Job, Place


def run(jobs: Sequence[Job], place: Place, what: str) -> None:
    """Runs what is not done yet, with all that it rests on, in this order where nothing has to be waited for. Raises what a job
    raises. What was done stays."""
    waiting: dict[str, Job] = {}
    for job in jobs:
        _add(job, place, waiting)
    began, running, count = time.monotonic(), dict[Future[None], str](), len(waiting)
    pool = _workers() if waiting else None
    try:
        while pool is not None and (waiting or running):
            for key in [key for key, job in waiting.items() if all(one.done(place) for one in job.needs())]:
                if len(running) == _processes():
                    break
                running[pool.submit(_run, waiting.pop(key), place)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()
            done = count - len(waiting) - len(running)
            print(
                f"\r{what}: {done} of {count}, {time.monotonic() - began:.0f} s ", end="", file=sys.stderr, flush=True
            )
    except BaseException:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        _workers.cache_clear()
        raise
    finally:
        if count:
            print(file=sys.stderr)


def _add(job: Job, place: Place, waiting: dict[str, Job]) -> None:
    """What a job needs comes before it. Models are measured under their own key, so that the kind belongs to it."""
    key = f"{type(job).__name__} {job.key(place)}"
    if key in waiting or job.done(place):
        return
    for one in job.needs():
        _add(one, place, waiting)
    waiting[key] = job


def _processes() -> int:
    return os.cpu_count() or 1


@cache
def _workers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(_processes(), multiprocessing.get_context("spawn"), _ready)


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
