"""What each step of a run takes: tokens, disk, the memory of a device, floating-point operations, time. No step is run for it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fusechat.evaluate.stage import ANSWER_BATCH
from fusechat.models.forward import length_batches
from fusechat.plan import memory
from fusechat.plan.devices import Batch, Device
from fusechat.plan.sampling import Counted, padded
from fusechat.plan.shapes import Shape

MANIFEST = 1_250  # bytes of a step's manifest
_IDS, _LOGPROBS, _NLL, _TAIL, _RECORD = (2, 4), 2, 4, 4, 62  # bytes of a stored row: data/distributions.py
_PAGE = 2_440_000  # bytes of a report, nearly all of them its figures' program
_ENTRY = 32  # bytes of an entry of a token map
# Seconds on a CPU core as there are many, whatever the device: reading and writing do not depend on it, nor does starting up.
_OPENING, STARTING = 0.4, {"prepare": 0.6, "capture": 2.0, "align": 0.6, "fuse": 4.0, "report": 0.5}
_ALIGNED, _CHOSEN = 150_000, 200_000  # rows a second that are aligned, and of which the teacher is chosen
_MERGED = 1.5  # times what reading and writing once takes


@dataclass(frozen=True)
class Model:
    """A model of the recipe, in a plan: `stored`, bytes of its weights on disk; `tokenizer`, of its tokenizer's files; `opening`:
    seconds that reading the tokenizer took."""

    shape: Shape
    stored: int
    tokenizer: int
    opening: float

    def as_target(self) -> "Model":
        """What is made of the pivot: the same, in float32."""
        return replace(self, stored=4 * self.shape.parameters)


@dataclass(frozen=True)
class Training:
    """What the arguments of a fine-tuning say of its size. `together`: conversations in a step; `apart`: in a forward pass of a
    process; `saved`, `measured`: when checkpoints are written and held-out conversations measured: every so many steps, or after
    such a share of them, or each "epoch", or None; `kept`: checkpoints that stay, None for all."""

    epochs: float
    apart: int
    together: int
    steps: int | None
    saved: float | str | None
    measured: float | str | None
    kept: int | None
    dtype: str
    recompute: bool
    sharded: bool
    grouped: bool


@dataclass(frozen=True)
class Estimate:
    """A step. `disk`: bytes that stay; `room`: bytes more while it works; `memory`: the greatest, in bytes, of a device, or of the
    process where the device is a CPU; `flops`: floating-point operations; `devices`: how many work on it."""

    stage: str
    name: str
    conversations: float = 0
    tokens: float = 0
    response_tokens: float = 0
    disk: float = 0
    room: float = 0
    memory: float = 0
    flops: float = 0
    seconds: float = 0
    devices: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.stage} {self.name}".strip()


def prepare(name: str, model: Model, data: Counted, *, first: bool) -> Estimate:
    return Estimate(
        *("prepare", name, data.conversations, data.tokens, data.response_tokens),
        disk=data.bytes + 150 * sum(data.rejected.values()) + MANIFEST,
        memory=memory.preparing(model.tokenizer, data.conversations),
        seconds=data.seconds + (model.opening + STARTING["prepare"] / 2 if first else 0),
    )


def overlap(hits: int, seconds: float) -> Estimate:
    return Estimate("prepare", "overlap", disk=250 * hits + 1.5 * MANIFEST, memory=memory.BASE, seconds=seconds)


def capture(name: str, model: Model, data: Counted, capture: Any, device: Device, *, first: bool) -> Estimate:
    """`capture`: the recipe's settings for this model."""
    shape = model.shape
    k = min(capture.top_k, shape.vocabulary)
    row = k * (_IDS[shape.vocabulary > 1 << 16] + _LOGPROBS) + _NLL + _TAIL
    shards = max(1, math.ceil(data.conversations / capture.shard_conversations))
    alone = capture.backend == "vllm" or capture.device_map is not None  # one process runs the model
    spread = spread_over(capture, device)
    devices = spread if alone else min(device.count, shards)
    load = batched(data, capture.batch_tokens)
    at_once = 1 if capture.device_map is not None else devices  # layers on several devices wait for each other
    seconds = device.rates.forward(shape, load, dtype=capture.dtype) / at_once
    return Estimate(
        *("capture", name, data.conversations, data.tokens, data.response_tokens),
        disk=data.response_tokens * row + data.conversations * _RECORD + shards * 200 + MANIFEST,
        memory=memory.running(model, load, capture.dtype, device, spread=spread) if not capture.url else memory.BASE,
        flops=shape.forward_flops(load.tokens, load.rows, load.length),
        seconds=seconds + opening(model, device, spread) + (STARTING["capture"] if first else 0),
        devices=devices,
        details={"offloads": capture.device_map is not None},
    )


def spread_over(capture: Any, device: Device) -> int:
    """Over how many devices one copy of a model is spread."""
    if capture.backend == "vllm":
        return 1 if capture.url else int(capture.tensor_parallel)
    return device.count if capture.device_map is not None else 1


def align(name: str, models: tuple[Model, Model], sets: list[Counted], k: int, kinds: int, *, first: bool) -> Estimate:
    """`models`: pivot and source; `sets`: the pivot's; `kinds`: different tokens among the source's gold ones."""
    conversations, tokens, rows = _sums(sets)
    # How many tokens are ever among the k most likely, by how many are gold: fitted to two data sets of small models.
    entries = min(models[1].shape.vocabulary, 1.5 * kinds**1.3 * (k / 10) ** 0.6)
    return Estimate(
        *("align", name, conversations, tokens, rows),
        disk=rows * (k * (_IDS[1] + _LOGPROBS) + _TAIL) + conversations * _RECORD + entries * _ENTRY + 3 * MANIFEST,
        memory=memory.aligning([model.tokenizer for model in models], conversations),
        seconds=rows / _ALIGNED * math.sqrt(k / 10) + (STARTING["align"] if first else 0),
    )


def fuse(
    name: str,
    pivot: Model,
    sets: list[Counted],
    held_out: list[Counted],
    training: Training,
    k: int,
    device: Device,
    *,
    first: bool,
) -> Estimate:
    """One target. `k`: tokens of a row's targets."""
    shape, rates = pivot.shape, device.rates
    conversations, tokens, rows = _sums(sets)
    lengths = np.concatenate([one.lengths for one in sets])
    waste = 1.0 if training.grouped else padded(lengths, training.apart)
    steps = training.steps or max(1, math.ceil(math.ceil(conversations / training.together) * training.epochs))
    epochs = steps * training.together / max(1.0, conversations)
    length = sum(one.length * one.tokens for one in sets) / max(1.0, tokens)
    longest = max((int(one.lengths.max(initial=0)) for one in sets), default=0)
    load = Batch(tokens * epochs * waste, rows * epochs, length, training.apart, training.apart * longest)
    checkpoints = _times(training.saved, steps, epochs)
    checkpoint = 4 * shape.parameters + 8 * shape.trained
    kept = min(checkpoints, training.kept + 1 if training.kept else checkpoints)
    devices = device.count
    working = rates.training(shape, load, dtype=training.dtype, recompute=training.recompute) / devices
    times = _times(training.measured, steps, epochs)
    measuring = sum(
        rates.forward(shape, batched(one, 2048), dtype=training.dtype) * times / devices for one in held_out
    )
    writing = (checkpoints * checkpoint + 4 * shape.parameters) / rates.storage
    choosing = rows / _CHOSEN
    seconds = (
        working + measuring + writing + choosing + steps * rates.update(shape) / (devices if training.sharded else 1)
    )
    return Estimate(
        *("fuse", name, conversations, tokens, rows),
        disk=4 * shape.parameters + pivot.tokenizer + 200 * steps + 3 * MANIFEST,
        room=kept * checkpoint,
        memory=memory.training(pivot, load, training, device, k=k, devices=devices),
        flops=shape.training_flops(load.tokens, load.rows, length, recompute=training.recompute),
        seconds=seconds + opening(pivot, device, 1) + (STARTING["fuse"] if first else 0),
        devices=devices,
        details={
            "steps": steps,
            "epochs": round(epochs, 3),
            "checkpoints": checkpoints,
            "padding": round(1 - 1 / waste, 3),
        },
    )


def _times(when: float | str | None, steps: int, epochs: float) -> int:
    """How often something happens in a training."""
    if when is None:
        return 0
    if isinstance(when, str):
        return round(epochs)
    return steps // max(1, int(when) if when >= 1 else math.ceil(when * steps))


def merge(pivot: Model, targets: int, dtype: str | None, device: Device) -> Estimate:
    size = memory.BYTES.get(dtype or "", pivot.stored / max(1, pivot.shape.parameters)) * pivot.shape.parameters
    read = (targets * 4 + pivot.stored / max(1, pivot.shape.parameters)) * pivot.shape.parameters
    return Estimate(
        *("merge", ""),
        disk=size + pivot.tokenizer + 9 * pivot.shape.layers * (150 + 80 * targets) + 2 * MANIFEST,
        memory=memory.merging(),
        flops=10 * targets * pivot.shape.parameters,
        seconds=(size + read / 2) * _MERGED / device.rates.storage,
    )


def score(name: str, model: Model, sets: Iterable[Counted], evaluate: Any, device: Device, *, spread: int) -> Estimate:
    """Bits per byte of a model on held-out sets. `spread`: over how many devices it is."""
    sets = list(sets)
    loads = [batched(one, evaluate.batch_tokens) for one in sets]
    shape = model.shape
    return Estimate(
        *("evaluate", name),
        *_sums(sets),
        disk=sum(30 * one.conversations + 44 * one.responses for one in sets) + MANIFEST,
        memory=max((memory.running(model, load, evaluate.dtype, device, spread=spread) for load in loads), default=0),
        flops=sum(shape.forward_flops(load.tokens, load.rows, load.length) for load in loads),
        seconds=sum(device.rates.forward(shape, load, dtype=evaluate.dtype) for load in loads)
        + opening(model, device, 1),
    )


def answer(name: str, model: Model, prompts: float, evaluate: Any, device: Device, *, spread: int) -> Estimate:
    """`prompts`: how many are answered, in batches that `ANSWER_BATCH` bounds."""
    steps, shape = evaluate.answer_tokens, model.shape
    batches = max(1, math.ceil(prompts * 2 * steps / ANSWER_BATCH))
    together = prompts / batches
    one = Batch(together * 2 * steps, together, 2 * steps, together, together * 2 * steps)
    return Estimate(
        *("evaluate", name),
        disk=(5 * steps + 60) * prompts + MANIFEST,
        memory=memory.running(model, one, evaluate.dtype, device, spread=spread),
        flops=shape.forward_flops(prompts * steps, prompts * steps, 2 * steps),
        seconds=batches * device.rates.decoding(shape, steps, one, dtype=evaluate.dtype) + opening(model, device, 1),
    )


def results(models: int, sets: int) -> Estimate:
    return Estimate("evaluate", "results", disk=890 * models * sets + 2 * MANIFEST, memory=memory.BASE)


def report(models: Iterable[Model]) -> Estimate:
    tokenizers = {model.shape.directory: model.tokenizer for model in models}
    needed = memory.reporting(list(tokenizers.values()))
    return Estimate("report", "", disk=_PAGE + MANIFEST, memory=needed, seconds=STARTING["report"])


def _sums(sets: Iterable[Counted]) -> tuple[float, float, float]:
    """Conversations, tokens and response tokens."""
    every = list(sets)
    return (
        sum(one.conversations for one in every),
        sum(one.tokens for one in every),
        sum(one.response_tokens for one in every),
    )


def batched(data: Counted, batch_tokens: int) -> Batch:
    """A data set in batches of like lengths, padding counted."""
    batches = list(length_batches(data.lengths, batch_tokens))
    sizes = [len(batch) * int(data.lengths[batch[0]]) for batch in batches]
    together = len(data.lengths) / max(1, len(batches))
    return Batch(sum(sizes) * data.scale, data.response_tokens, data.length, together, max(sizes, default=0))


def opening(model: Model, device: Device, spread: int) -> float:
    """Seconds until the weights are where they work."""
    return _OPENING + model.stored / (2 * device.rates.storage * (1 if device.rates.is_cpu else spread))
