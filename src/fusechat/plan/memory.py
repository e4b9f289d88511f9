"""Memory that a step takes: of a device, or of the whole process where the device is a CPU."""

from collections.abc import Sequence
from typing import Any

from fusechat.plan.devices import Batch, Device

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BASE = 650_000_000  # a process with PyTorch and Transformers
_CONTEXT = 1_000_000_000  # what CUDA takes for itself, and what its allocator leaves unused
_TOKENIZER = 10  # times the size of its files that a tokenizer takes in memory
_ID = 200  # bytes of a conversation's id and its place, in every store that is open
_FLOATS = 1 << 28  # bytes of float32 logits at once: models/forward.py
_WIDTHS = 1.3  # activations in addition to the outputs of linear layers


def preparing(tokenizer: int, conversations: float) -> float:
    return BASE + _TOKENIZER * tokenizer + _ID * conversations


def tokenizers(sizes: Sequence[int], device: Device) -> float:
    """What all that are open take of the memory of a process that runs models on a CPU."""
    return _TOKENIZER * sum(sizes) if device.rates.is_cpu else 0.0


def aligning(tokenizers: Sequence[int], conversations: float) -> float:
    """Two tokenizers, and ids in three stores."""
    return BASE + _TOKENIZER * sum(tokenizers) + 3 * _ID * conversations


def reporting(tokenizers: Sequence[int]) -> float:
    """The page shows text in all models' tokens."""
    return BASE + _TOKENIZER * sum(tokenizers)


def merging() -> float:
    return BASE


def running(model: Any, load: Batch, dtype: str, device: Device, *, spread: int) -> float:
    """Of a forward pass without gradients: weights, the activations of one layer, logits of the rows."""
    shape, size = model.shape, BYTES[dtype]
    tokens = load.fullest
    rows = tokens * load.rows / max(1.0, load.tokens)
    activations = tokens * size * (6 * shape.hidden + shape.width)
    logits = rows * shape.vocabulary * size + min(_FLOATS, rows * shape.vocabulary * 4) * (
        0 if device.rates.is_cpu else 2
    )
    working = shape.weights(dtype) / spread + activations + logits
    return working + (BASE + model.stored if device.rates.is_cpu else _CONTEXT)


def generating(model: Any, load: Batch, longest: int, dtype: str, device: Device, *, spread: int) -> float:
    """Of answers of `longest` tokens to a batch of prompts, `load`, of which the head sees the last token: in addition to a forward
    pass what attention keeps, and logits in float32."""
    shape, size = model.shape, BYTES[dtype]
    kept = (load.fullest + load.together * longest) * shape.cached * shape.layers * size / spread
    logits = load.together * shape.vocabulary * 4
    return running(model, load, dtype, device, spread=spread) + kept + logits


def training(model: Any, load: Batch, training: Any, device: Device, *, k: int, devices: int) -> float:
    """Of a training step: float32 weights, gradients and both moments of AdamW, copies of the weights for a low-precision forward
    pass, activations, logits and their gradient."""
    shape, size = model.shape, BYTES[training.dtype]
    share = devices if training.sharded else 1
    tokens = load.fullest
    rows = tokens * load.rows / max(1.0, load.tokens)
    states = (4 * shape.parameters + 12 * shape.trained) / share
    copies = size * shape.parameters if size < 4 and share == 1 else 2 * size * shape.layer * (share > 1)
    layer = tokens * (size * _WIDTHS * shape.width + 16 * shape.hidden)
    kept = tokens * shape.hidden * size * shape.layers
    activations = kept + layer if training.recompute else layer * shape.layers
    logits = rows * (shape.vocabulary * 2 * size + 12 * k)
    return states + copies + activations + logits + (BASE if device.rates.is_cpu else _CONTEXT)
