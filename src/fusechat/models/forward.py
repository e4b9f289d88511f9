"""Running a model over prepared conversations: batches, and the logits that predict the response tokens.

This is the one place where logits are shifted against labels: the logits at token `t - 1` predict token `t`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared

_CHUNK_ELEMENTS = 1 << 26  # float32 logits handled at once: 256 MiB
_KEPT = ("cpu", "disk")  # of a device map: where weights wait until they are needed


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens of several conversations. `rows` int64 [n, 2] holds the batch index and the token index of every
    response token, conversation by conversation."""

    input_ids: torch.Tensor  # int64 [b, length]
    attention_mask: torch.Tensor  # int64 [b, length]
    rows: torch.Tensor  # int64 [n, 2]

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.rows.to(device))


def collate(conversations: Sequence[Prepared], pad: int = 0) -> Batch:
    """Padding is masked by position, so that a padding token that also means something loses nothing."""
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
    """Logits [n, V] of the distributions that predict the response tokens `batch.rows`, in their order, on `device_of(model)`.

    The language-model head runs for these rows alone, not for each conversation wherever one of them needs it: they are picked
    from what goes into the head.
    """
    device = device_of(model)
    tokens = batch.to(device)
    column = batch.rows[:, 1] - 1  # of a batch on the CPU found there, so that nothing waits for a GPU
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "use_cache": False}
    shape = tuple(batch.input_ids.shape)
    if keeps_logits(model) and not _is_spread(model):  # else `kept` might not be where the hidden states are
        kept, column = torch.unique(column, return_inverse=True)
        inputs["logits_to_keep"] = kept.to(device)
        shape = len(batch.input_ids), len(kept)
    at = tokens.rows[:, 0], column.to(device)
    with _picking(model, at, shape) as picked:
        logits = model(**inputs).logits
    return logits[0] if picked else logits[at]


@contextmanager
def _picking(model: Any, at: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...]) -> Iterator[list[bool]]:
    """While it lasts, the head of the model gets [1, n, hidden], the places `at` of hidden states [*shape, hidden]. What it yields
    is not empty once that has happened."""
    picked: list[bool] = []

    def pick(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *rest = arguments
        if tuple(hidden.shape[:2]) != shape:
            return None
        picked.append(True)
        there = tuple(index.to(hidden.device) for index in at)  # of a model that is spread, where its last layer is
        return (hidden[there].unsqueeze(0), *rest)

    from accelerate.utils import is_compiled_module

    head = _head(model)
    if head is None or is_compiled_module(unwrapped(model)):  # compiled code would be compiled again for a hook
        yield picked
        return
    hook = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        hook.remove()


def device_of(model: Any) -> torch.device:
    """Where a model takes tokens and gives logits: where its head is run, if Accelerate has spread it over several devices."""
    if not _is_spread(model):
        return next(model.parameters()).device
    inner, head = unwrapped(model), _head(model)
    where = inner.hf_device_map  # module → device; weights that are kept elsewhere are run on the first that is none
    main = next((device for device in where.values() if device not in _KEPT), "cpu")
    name = next((name for name, module in inner.named_modules() if module is head), "")
    parts = name.split(".")
    above = (".".join(parts[:cut]) for cut in range(len(parts), -1, -1))
    found = next((where[part] for part in above if part in where), main)
    return torch.device(main if found in _KEPT else found)


def _is_spread(model: Any) -> bool:
    """Whether Accelerate moves what goes into the parts of the model, or their weights, to where they are run."""
    devices = set(getattr(unwrapped(model), "hf_device_map", {}).values())
    return len(devices) > 1 or "disk" in devices


def _head(model: Any) -> Any:
    inner = unwrapped(model)
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


def unwrapped(model: Any) -> Any:
    """The model itself, without what distributed training or PEFT put around it."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keeps_logits(model: Any) -> bool:
    """Whether the model can run its head at chosen positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of like lengths, longest first; a batch has at most `batch_tokens` tokens, padding counted, or one
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
    """Logits [n, V] as float32, a bounded number of rows at a time: (which rows, their logits)."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        yield rows, logits[rows].float()


def gold_nll(logits: torch.Tensor, gold: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
    """float32 [n]: `-log p(gold)` from float32 logits [n, V] and their logsumexp [n]."""
    return logsumexp - logits.gather(1, gold[:, None]).squeeze(1)


def token_nll(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """float32 [n]: `-log p(gold)`, nats, from logits [n, V] of any float type and int64 [n]; softmax in float32."""
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows, full in float_rows(logits):
        nll[rows] = gold_nll(full, gold[rows], full.logsumexp(dim=1))
    return nll
