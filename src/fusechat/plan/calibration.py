"""How fast this machine is: each model's own layers, of which a few are made with random weights and run, and its own head.

A whole pass is taken for its first layer's time, once more for every further layer, and the head's. Nothing is known of models that
are too large for that here: they are reckoned by what a matrix multiplication of theirs would take.
"""

import hashlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.errors import ModelError, RecipeError
from fusechat.models.load import DTYPES, choose_device, fast_dtype
from fusechat.plan import pieces
from fusechat.plan.devices import SHEETS, Batch, Device, from_table, named
from fusechat.plan.shapes import Shape
from fusechat.run.cache import cache_directory

SECONDS, _MEASURED = 10.0, 24  # what a plan spends on it, about, for so many measurements
_LAYERS = (8, 4, 2)  # made of a model, as many as there is memory for, and a quarter of them
_TOKENS = 512  # of a batch that is timed
_DECODED = 32  # rows of a step of answers that is timed on a CPU, which takes as much longer for more
_SHARE = 4  # a model's piece may take this part of the memory that is there
_WIDE = 2048  # of the matrices that stand for models too large to make
_WEIGHTS = 1 << 25  # that an optimiser is timed on: more than caches hold
_PROBE = 1 << 26  # bytes written, to time the storage


@dataclass(frozen=True)
class _Pass:
    """Seconds that `tokens` take in one layer, and `rows` in embedding and head."""

    layer: float
    ends: float
    tokens: int
    rows: int

    def seconds(self, layers: int, tokens: float, rows: float) -> float:
        return self.layer * layers * tokens / self.tokens + self.ends * rows / self.rows


class Measured:
    """The rates of `devices.Rates`, measured on `device` when they are asked for."""

    def __init__(self, device: torch.device, where: Path, *, seconds: float = SECONDS) -> None:
        self.device, self.is_cpu, self.each = device, device.type == "cpu", seconds / _MEASURED
        self.storage, self.spent = storage_rate(where), 0.0
        self._known: dict[tuple[Any, ...], Any] = {}

    def forward(self, shape: Shape, load: Batch, *, dtype: str) -> float:
        found = self._pass(shape, load, dtype, training=False, recompute=False)
        if found is None:
            return shape.forward_flops(load.tokens, load.rows, load.length) / self._rate(dtype)
        return found.seconds(shape.layers, load.tokens, load.rows)

    def training(self, shape: Shape, load: Batch, *, dtype: str, recompute: bool) -> float:
        found = self._pass(shape, load, dtype, training=True, recompute=recompute)
        if found is None:
            return shape.training_flops(load.tokens, load.rows, load.length, recompute=recompute) / self._rate(dtype)
        return found.seconds(shape.layers, load.tokens, load.rows)

    def update(self, shape: Shape) -> float:
        return shape.trained * self._once(("update",), self._time_update)

    def decoding(self, shape: Shape, steps: float, load: Batch, *, dtype: str) -> float:
        layers, rows = self._layers(shape, training=False), max(1.0, load.together)
        if layers is None:
            return steps * shape.forward_flops(rows, rows, 2 * load.length) / self._rate(dtype)
        length, batch = min(_rounded(load.length), _TOKENS), min(round(rows), _DECODED if self.is_cpu else _TOKENS)
        key = (shape.directory, dtype, "decoding", length, batch, layers)
        found = self._once(key, lambda: self._time_decoding(shape, dtype, length, batch, layers))
        return steps * found.seconds(shape.layers, rows, rows)

    def _once(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = measure()
            self.spent += time.perf_counter() - began
        return self._known[key]

    def _pass(self, shape: Shape, load: Batch, dtype: str, *, training: bool, recompute: bool) -> _Pass | None:
        """Of a batch like `load`, its length and size rounded to powers of 2, so that few are measured."""
        layers = self._layers(shape, training=training)
        if layers is None:
            return None
        length = min(_rounded(load.length), _TOKENS)
        batch = max(1, min(_rounded(load.together), _TOKENS // length))
        key = (shape.directory, dtype, training, recompute, length, batch, layers)
        return self._once(key, lambda: self._time_pass(shape, key))

    def _layers(self, shape: Shape, *, training: bool) -> int | None:
        """How many of a model's layers there is room for; None for too few, or weights that cannot be made."""
        bytes_each, room = (16 if training else 4), memory(self.device) / _SHARE
        for layers in _LAYERS if shape.bits is None else ():
            piece = shape.parameters - shape.layer * max(0, shape.layers - layers)
            if piece * bytes_each < room:
                return min(layers, shape.layers)
        return None

    def _time_pass(self, shape: Shape, key: tuple[Any, ...]) -> _Pass:
        _, dtype, training, recompute, length, batch, most = key
        rows = max(1, batch * length // 2)
        conversations = pieces.conversations(length, batch, rows, shape.vocabulary)

        def work(model: Any) -> Callable[[], object]:
            if not training:
                return partial(pieces.run, model, conversations)
            model.train()
            if recompute:
                model.activation_checkpointing_enable()
            return partial(pieces.train, model, conversations, dtype, self.device)

        each = self._time_layers(shape, most, torch.float32 if training else DTYPES[dtype], work)
        return _Pass(*each, length * batch, rows)

    def _time_decoding(self, shape: Shape, dtype: str, length: int, batch: int, most: int) -> _Pass:
        """Of one token more of each of `batch` conversations of `length` tokens."""
        each = self._time_layers(shape, most, DTYPES[dtype], partial(pieces.decoding, length=length, batch=batch))
        return _Pass(*each, batch, batch)

    def _time_layers(
        self, shape: Shape, most: int, dtype: torch.dtype, work: Callable[[Any], Callable[[], object]]
    ) -> tuple[float, float]:
        """Seconds of one layer, and of all else: of `work` with pieces of the model that have few and `most` layers."""
        taken = {}
        for layers in {max(1, most // 4), most}:
            taken[layers] = self._time(work(pieces.piece(shape, layers, dtype, self.device)))
        few, more = min(taken), max(taken)
        layer = max(0.0, (taken[more] - taken[few]) / max(1, more - few))
        return layer, max(0.0, taken[few] - layer * few)

    def _time_update(self) -> float:
        """Seconds a weight of an AdamW step, with gradients that are made again and clipped."""
        weights = torch.zeros(_WEIGHTS, device=self.device, requires_grad=True)
        optimiser = torch.optim.AdamW([weights], fused=True)

        def step() -> None:
            weights.grad = torch.ones_like(weights)
            torch.nn.utils.clip_grad_norm_([weights], 1.0)
            optimiser.step()
            optimiser.zero_grad()

        return self._time(step) / weights.numel()

    def _rate(self, dtype: str) -> float:
        """Floating-point operations a second of a large multiplication."""

        def measure() -> float:
            left = torch.ones(_TOKENS, _WIDE, dtype=DTYPES[dtype], device=self.device)
            right = torch.ones(_WIDE, _WIDE, dtype=DTYPES[dtype], device=self.device)
            return 2 * _TOKENS * _WIDE * _WIDE / self._time(lambda: left @ right)

        return float(self._once(("rate", dtype), measure))

    def _time(self, work: Callable[[], object]) -> float:
        """Seconds: the median of some tries, the first of which is not counted."""
        work()
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < 2 or (len(found) < 8 and time.perf_counter() - began < self.each):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - start)
        return statistics.median(found)


def choose(text: str | None, recipe_device: str | None, where: Path) -> Device:
    """A device of the table, or of this machine, whose storage is measured at `where`. Raises RecipeError for neither."""
    known = from_table(text) if text is not None else None
    if known is not None:
        return known
    number, name = named(text) if text is not None else (1, recipe_device)
    try:
        device = choose_device(name)
    except ModelError as error:
        if text is None:
            raise
        raise RecipeError(
            f"--device {text}: this machine has none of that name, and the table only {', '.join(SHEETS)}"
        ) from error
    return Device(str(device), number, memory(device), Measured(device, where), True, memory(torch.device("cpu")))


def dtype_on(text: str | None) -> str | None:
    """What `auto` stands for on a device: of the table, or of this machine; None where no device is named."""
    if text is None:
        return None
    return "bfloat16" if from_table(text) is not None else fast_dtype(named(text)[1])


def memory(device: torch.device) -> int:
    """Bytes that a device has in all: of the CPU what this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def storage_rate(where: Path) -> float:
    """Bytes a second that are written to the file system of `where`, flushed, read back and checksummed; of the cache's where it
    cannot be written to."""
    existing = next(path for path in (where, *where.resolve().parents) if path.is_dir())
    data = np.random.default_rng(0).bytes(_PROBE)
    for room in (existing, cache_directory(), Path(tempfile.gettempdir())):
        try:
            with tempfile.NamedTemporaryFile(dir=room) as file:
                began = time.perf_counter()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                hashlib.file_digest(file, "sha256")
                return _PROBE / (time.perf_counter() - began)
        except OSError:
            continue
    return float(_PROBE)


def _rounded(number: float) -> int:
    """The nearest power of 2, at least 1."""
    return 1 << max(0, round(math.log2(max(1.0, number))))
