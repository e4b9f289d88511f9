"""Runs a model on prepared conversations: batches, and the logits that predict the response tokens.

Only this module shifts logits against labels: the logits at token `t - 1` predict token `t`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared

_CHUNK_ELEMENTS = 1 << 26  # float32 logits at once: 256 MiB
_KEPT = ("cpu", "disk")  # places of a device map where weights wait


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens of several conversations. `rows`: batch index and token index of every response token, in order."""

    input_ids: torch.Tensor  # int64 [b, length]
    attention_mask: torch.Tensor  # int64 [b, length]
    rows: torch.Tensor  # int64 [n, 2]

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.rows.to(device))


def collate(conversations: Sequence[Prepared], pad: int = 0) -> Batch:
    """Pads and joins conversations. The mask is by position, so that `pad` may be a real token too."""
    length = max(len(conversation.input_ids) for conversation in conversations)
    input_ids = torch.full((len(conversations), length), pad, dtype=torch.long)
    attention_mask = torch.zeros((len(conversations), length), dtype=torch.long)
    rows = []
    for index, conversation in enumerate(conversations):
        tokens = len(conversation.input_ids)
        input_ids[index, :tokens] = torch.from_numpy(conversation.input_ids.astype(np.int64))
        attention_mask[index, :tokens] = 1
        rows.append(np.stack([np.full(len(conversation), index), conversation.position], axis=1))
    return Batch(input_ids, attention_mask, torch.from_numpy(np.concatenate(rows).astype(np.int64)))


def response_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [n, V] that predict the response tokens `batch.rows`, in order, on `device_of(model)`. The language-model head runs
    on these rows only: its input is reduced to them."""
    device = device_of(model)
    tokens = batch.to(device)
    column = batch.rows[:, 1] - 1  # computed on the batch's device: no wait for a GPU
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "use_cache": False}
    shape = tuple(batch.input_ids.shape)
    if keeps_logits(model) and not _is_spread(model):  # else `kept` may be on another device
        kept, column = torch.unique(column, return_inverse=True)
        inputs["logits_to_keep"] = kept.to(device)
        shape = len(batch.input_ids), len(kept)
    at = tokens.rows[:, 0], column.to(device)
    with _picking(model, at, shape) as picked:
        logits = model(**inputs).logits
    return logits[0] if picked else logits[at]


@contextmanager
def _picking(model: Any, at: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...]) -> Iterator[list[bool]]:
    """While active, the model's head gets [1, n, hidden], the places `at` of hidden states [*shape, hidden]. The yielded list is
    not empty once this has happened."""
    picked: list[bool] = []

    def pick(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *rest = arguments
        if tuple(hidden.shape[:2]) != shape:
            return None
        picked.append(True)
        there = tuple(index.to(hidden.device) for index in at)  # of a spread model: the last layer's device
        return (hidden[there].unsqueeze(0), *rest)

    from accelerate.utils import is_compiled_module

    head = _head(model)
    if head is None or is_compiled_module(unwrapped(model)):  # a hook would recompile
        yield picked
        return
    hook = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        hook.remove()


def device_of(model: Any) -> torch.device:
    """The device of a model's inputs and logits: that of its head, if Accelerate has spread it over several."""
    if not _is_spread(model):
        return next(model.parameters()).device
    inner, head = unwrapped(model), _head(model)
    where = inner.hf_device_map  # module → device; waiting weights run on the first real one
    main = next((device for device in where.values() if device not in _KEPT), "cpu")
    name = next((name for name, module in inner.named_modules() if module is head), "")
    parts = name.split(".")
    above = (".".join(parts[:cut]) for cut in range(len(parts), -1, -1))
    found = next((where[part] for part in above if part in where), main)
    return torch.device(main if found in _KEPT else found)


def _is_spread(model: Any) -> bool:
    """Whether Accelerate moves the inputs of the model's parts, or their weights, between devices."""
    devices = set(getattr(unwrapped(model), "hf_device_map", {}).values())
    return len(devices) > 1 or "disk" in devices


def _head(model: Any) -> Any:
    inner = unwrapped(model)
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of distributed training and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keeps_logits(model: Any) -> bool:
    """Whether the model can run its head at selected positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length, longest first. A batch has at most `batch_tokens` tokens, padding included, or one
    sequence. Equal lengths keep their order."""
    batch: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def float_rows(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (slice of rows, their float32 logits) of logits [n, V], a bounded number of elements at a time."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        yield rows, logits[rows].float()


def gold_nll(logits: torch.Tensor, gold: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
    """float32 [n]: `-log p(gold)` (nats) from float32 logits [n, V] and their logsumexp [n]."""
    return logsumexp - logits.gather(1, gold[:, None]).squeeze(1)


def token_nll(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """float32 [n]: `-log p(gold)` (nats) from logits [n, V] of any float dtype and int64 [n]; the softmax is float32."""
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows, full in float_rows(logits):
        nll[rows] = gold_nll(full, gold[rows], full.logsumexp(dim=1))
    return nll
