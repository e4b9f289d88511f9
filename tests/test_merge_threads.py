"""Merged on any number of threads in blocks of any size: the same bits; and what becomes of an exception in one of them."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cases import each, pairwise
from fusechat.errors import ModelError
from fusechat.merge.kernels import CHUNK
from fusechat.merge.methods import load_method, method_names
from fusechat.merge.tensor import Workers
from fusechat.run.usage import cores
from merging import merged, tensor_of

SIZE = 11 * CHUNK + 77
THREADS = (1, 2, 3, 5)
BLOCKS = (1, 2, 5, 16)  # in chunks
KINDS = ("float32", "float16", "bfloat16")


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """bfloat16 by cutting bits off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else values.astype(kind)


def mixed(kinds: tuple[str, ...], size: int = SIZE) -> list[np.ndarray]:
    """A model and others near it, each stored in its way."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=size).astype(np.float32)
    near = [first + number * 0.01 * generator.normal(size=size).astype(np.float32) for number in range(len(kinds))]
    return [stored(values, kind) for values, kind in zip(near, kinds, strict=True)]


def values_for(method: str, targets: int) -> dict[str, Any]:
    """Every step of a method is taken."""
    wanted: dict[str, Any] = {
        "weight": [0.3, 0.7, -0.4][:targets],
        "density": [0.2, 0.6][:targets],
        "lambda": 0.9,
        "normalize": True,
        "rescale": True,
        "seed": 3,
        "select_topk": 0.3,
        "t": 0.3,
    }
    return {p.name: wanted[p.name] for p in load_method(method).PARAMETERS if p.name in wanted}


def everything(method: str, models: list[np.ndarray], threads: int, block: int) -> dict[str, Any]:
    """All bits of what comes out."""
    base, targets = (models[0], models[1:]) if load_method(method).BASE else (None, models)
    values = values_for(method, len(targets))
    out, measured, counts = merged(method, base, targets, values=values, threads=threads, block=block * CHUNK)
    found = {"out": out, "coefficients": measured.coefficients, "squares": measured.squares, "scales": measured.scales}
    if measured.selection is not None:
        chosen = measured.selection
        found |= {"thresholds": chosen.thresholds, "ties": chosen.ties, "counts": chosen.counts}
    return {"entries": counts, **{name: array if array is None else array.tobytes() for name, array in found.items()}}


@each("method", method_names())
def test_a_tensor_has_the_same_bits_for_any_threads_and_blocks(method: str) -> None:
    for order in range(3):
        kinds = (*KINDS[order:], *KINDS[:order])
        models = mixed(kinds[: 1 + (load_method(method).TARGETS or 2)])
        expected = everything(method, models, threads=1, block=16)
        for threads, block in pairwise(THREADS, BLOCKS) if order == 0 else zip(THREADS, BLOCKS[::-1], strict=True):
            found = everything(method, models, threads, block)
            wrong = [name for name in expected if found[name] != expected[name]]
            assert wrong == [], (order, threads, block)


@each("method", ["sce", "ties"])
def test_a_tensor_that_is_sampled_has_the_same_bits(method: str) -> None:
    """So large that the selection takes a sample first."""
    models = mixed(("bfloat16", "float16", "float32"), 513 * CHUNK + 5)
    expected = everything(method, models, threads=1, block=16)
    assert everything(method, models, threads=2, block=5) == expected
    assert everything(method, models, threads=3, block=64) == expected


def with_workers(test: Callable[[Workers], None]) -> Callable[..., None]:
    """Of each number of threads."""

    def of(threads: int) -> None:
        workers = Workers(threads)
        try:
            test(workers)
        finally:
            workers.close()

    return each("threads", THREADS)(of)


@with_workers
def test_results_come_in_order_and_each_thread_keeps_its_own(workers: Workers) -> None:
    """Of few or no blocks too."""
    for count in (0, 1, 2):
        assert workers.run(lambda number, _: number, count, lambda: None)[0] == list(range(count))

    def work(number: int, seen: list[int]) -> int:
        time.sleep(0.0003 * (number % 3))
        seen.append(number)
        return number**2

    results, kept = workers.run(work, 50, list)
    assert results == [number**2 for number in range(50)]
    assert sorted(number for seen in kept for number in seen) == list(range(50))
    assert len(kept) <= workers.threads


@with_workers
def test_an_exception_comes_out_once_and_nobody_goes_on(workers: Workers) -> None:
    for kind in (ValueError, KeyboardInterrupt):
        comes_out_once(workers, kind)


def comes_out_once(workers: Workers, kind: type[BaseException]) -> None:
    begun, ended = [], []

    def work(number: int, _: None) -> int:
        begun.append(number)
        if number == 20:
            raise kind("twenty")
        time.sleep(0.001 if number < 10 else 0.02)
        ended.append(number)
        return number

    with pytest.raises(kind, match="twenty") as raised:
        workers.run(work, 500, lambda: None)
    assert raised.value.__context__ is None
    assert sorted([*ended, 20]) == sorted(begun), "what was begun has ended"
    assert len(begun) < 100, "the rest is not begun"
    time.sleep(0.03)
    assert sorted([*ended, 20]) == sorted(begun), "no thread continues"
    assert workers.run(lambda number, _: number, 20, lambda: None)[0] == list(range(20))


@with_workers
def test_of_exceptions_in_all_threads_one_comes_out(workers: Workers) -> None:
    together = threading.Barrier(workers.threads)

    def work(number: int, _: None) -> None:
        together.wait(10)
        raise ValueError(f"block {number}")

    for _ in range(3):
        with pytest.raises(ValueError, match=r"^block [0-4]$"):
            workers.run(work, 50, lambda: None)
    assert workers.run(lambda number, _: number, 20, lambda: None)[0] == list(range(20))


def test_after_ctrl_c_no_thread_works_any_more() -> None:
    """The threads do not hear of it themselves; the one that waits for them does."""
    workers, begun, ended, running = Workers(2), [], [], threading.Event()

    def work(number: int, _: None) -> None:
        begun.append(number)
        if number == 20:
            running.set()
        time.sleep(0.005)
        ended.append(number)

    def interrupt() -> None:
        running.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            workers.run(work, 2_000, lambda: None)
        assert sorted(ended) == sorted(begun), "what was begun has ended"
        count = len(begun)
        time.sleep(0.02)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert len(begun) == count < 1000
    assert workers.run(lambda number, _: number, 20, lambda: None)[0] == list(range(20))
    workers.close()


@with_workers
def test_a_value_that_is_not_finite_is_named_once_whichever_thread_meets_it(workers: Workers) -> None:
    rows = [np.ones(SIZE, np.float32), np.ones(SIZE, np.float16)]
    for place in (0, 5 * CHUNK + 9, SIZE - 1):
        rows[1][place] = np.inf
        tensor = tensor_of(rows, workers, block=CHUNK)
        with pytest.raises(ModelError) as raised:
            tensor.blocks(lambda start, block: None)
        assert str(raised.value) == f"tensor: holds values that are not finite in model 1 (element {place})"
        rows[1][place] = 1
    assert sum(tensor.blocks(lambda start, block: float(block.sum()))) == 2 * SIZE


def test_there_are_as_many_threads_as_cores_unless_it_is_said() -> None:
    workers = Workers()
    workers.close()
    assert workers.threads == cores() >= 1
