"""Devices that a plan knows: what they hold and how fast they are by their makers' data sheets."""

import re
from dataclasses import dataclass
from typing import Protocol

from fusechat.errors import RecipeError
from fusechat.plan.shapes import Shape

GB = 10**9
# How much of the data sheet's figure is reached: forward passes in large batches, training steps with FSDP, reading weights for one
# token after the other. Usual values; no such device was there to measure.
FORWARD, TRAINING, READING = 0.45, 0.35, 0.6
STORAGE = 1.0 * GB  # bytes a second that are written, read back and checksummed


@dataclass(frozen=True)
class Sheet:
    """`memory` in GB; `bfloat16`, `float32`: dense TFLOP/s; `bandwidth` of its memory in GB/s."""

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float


SHEETS = {
    "b200": Sheet(180, 2250, 75, 8000),
    "h200": Sheet(141, 989, 67, 4800),
    "h100": Sheet(80, 989, 67, 3350),
    "mi300x": Sheet(192, 1307, 163, 5300),
    "a100": Sheet(80, 312, 19.5, 2039),
    "a100-40gb": Sheet(40, 312, 19.5, 1555),
    "l40s": Sheet(48, 362, 91.6, 864),
    "a6000": Sheet(48, 155, 38.7, 768),
    "rtx4090": Sheet(24, 165, 82.6, 1008),
    "rtx3090": Sheet(24, 71, 35.6, 936),
}


@dataclass(frozen=True)
class Batch:
    """Work of one kind: `tokens` in all, in conversations of `length` tokens, `together` of them at once; `rows` go through the
    head; `fullest`: tokens of the largest batch, padding counted."""

    tokens: float
    rows: float
    length: float
    together: float = 1
    fullest: float = 0


class Speed(Protocol):
    """Seconds that one device takes. `storage`: bytes a second that are written, flushed, read back and checksummed; `is_cpu`:
    whether its memory is the process's; `spent`: seconds that measuring it took so far."""

    storage: float
    is_cpu: bool
    spent: float

    def forward(self, shape: Shape, load: Batch, *, dtype: str) -> float:
        """Of forward passes without gradients."""

    def training(self, shape: Shape, load: Batch, *, dtype: str, recompute: bool) -> float:
        """Of forward and backward passes; `recompute`: activations are computed twice."""

    def update(self, shape: Shape) -> float:
        """Of one step of AdamW."""

    def decoding(self, shape: Shape, steps: float, load: Batch, *, dtype: str) -> float:
        """Of `steps` tokens, one after the other, of each of `load.together` conversations of `load.length` tokens."""


@dataclass
class Rates:
    """How fast a device of the table is."""

    sheet: Sheet
    storage: float = STORAGE
    is_cpu: bool = False
    spent: float = 0.0

    def forward(self, shape: Shape, load: Batch, *, dtype: str) -> float:
        return shape.forward_flops(load.tokens, load.rows, load.length) / (FORWARD * self._peak(dtype))

    def training(self, shape: Shape, load: Batch, *, dtype: str, recompute: bool) -> float:
        operations = shape.training_flops(load.tokens, load.rows, load.length, recompute=recompute)
        return operations / (TRAINING * self._peak(dtype))

    def update(self, shape: Shape) -> float:
        return 28 * shape.trained / (READING * self.sheet.bandwidth * GB)

    def decoding(self, shape: Shape, steps: float, load: Batch, *, dtype: str) -> float:
        cached = load.together * load.length * shape.cached * shape.layers * (4 if dtype == "float32" else 2)
        reading = (shape.weights(dtype) + cached) / (READING * self.sheet.bandwidth * GB)
        operations = shape.forward_flops(load.together, load.together, 2 * load.length)
        return steps * max(reading, operations / (FORWARD * self._peak(dtype)), 1e-4 * shape.layers)

    def _peak(self, dtype: str) -> float:
        return 1e12 * (self.sheet.float32 if dtype == "float32" else self.sheet.bfloat16)


@dataclass(frozen=True)
class Device:
    """`count` of them; `memory` in bytes of each; `measured`: whether `rates` were, on this machine; `host`: bytes of the memory of
    the machine that it is in, None where that is not known."""

    name: str
    count: int
    memory: int
    rates: Speed
    measured: bool
    host: int | None = None


def named(text: str) -> tuple[int, str]:
    """`8xh100` → 8 and `h100`; `cpu` → 1 and `cpu`. Raises RecipeError."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z][a-z0-9:-]*)", text.strip().lower())
    number = int(found[1] or 1) if found else 0
    if not found or number < 1:
        raise RecipeError(f"--device {text}: not of the form NAME or NUMBERxNAME, such as 8xh100")
    return number, found[2]


def from_table(text: str) -> Device | None:
    """A device of the table; None where the name is none of them."""
    number, name = named(text)
    sheet = SHEETS.get(name)
    return None if sheet is None else Device(name, number, round(sheet.memory * GB), Rates(sheet), False)
