"""Held-out conversations evaluated during training: loss and bits per byte, as in the final evaluation."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusechat.data.distributions import nothing
from fusechat.data.prepared import PreparedSet
from fusechat.fuse.dataset import EMPTY, PAD_INDEX
from fusechat.models.forward import Batch, response_logits, token_nll
from fusechat.models.teacher_forcing import split_rows
from fusechat.run import ranks


class Validation(Dataset[dict[str, Any]]):
    """A held-out set as the pivot sees it. Items are those of `FusionData`, without targets."""

    def __init__(self, prepared: PreparedSet) -> None:
        self.prepared = prepared

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = EMPTY if index == PAD_INDEX else self.prepared[index]
        return {
            "alone": False,
            "input_ids": rows.input_ids,
            "conversation": rows,
            "targets": nothing(len(rows)),
            "comparison": None,
            "set": 0,
        }


@torch.no_grad()
def bits_per_byte(trainer: Any, sets: Mapping[str, Validation], prefix: str) -> dict[str, float]:
    """`<prefix>_loss`, nats per response token with end of turn, and `<prefix>_bits_per_byte` without it, over all sets. For
    several sets, also `<prefix>_<set>_…`."""
    trainer.model.eval()
    with torch.random.fork_rng(devices=[]):  # the data loader draws; training must not notice
        sums = {name: _sums(trainer, name, data) for name, data in sets.items()}
    found = _figures(prefix, np.sum(list(sums.values()), axis=0))
    if len(sums) > 1:
        for name, values in sums.items():
            found |= _figures(f"{prefix}_{name}", values)
    trainer.model.train()
    return found


def _figures(prefix: str, sums: np.ndarray) -> dict[str, float]:
    nll, tokens, content_nll, size = sums.tolist()
    return {f"{prefix}_loss": nll / tokens, f"{prefix}_bits_per_byte": content_nll / size / math.log(2)}


def _sums(trainer: Any, name: str, data: Validation) -> np.ndarray:
    """float64 [4]: nll (nats) and number of all response tokens, nll (nats) and bytes of their content. All processes have the
    same number of batches; conversations that fill them up are counted once, by id."""
    mine: dict[str, list[float]] = {}
    for inputs in trainer.get_eval_dataloader(name):  # by name: the trainer keeps the loader with its workers
        with trainer.compute_loss_context_manager():
            batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"])
            nll = token_nll(response_logits(trainer.model, batch), inputs["labels"])
        members = [data.prepared[data.prepared.row_of[identity]] for identity in inputs["conversation_ids"]]
        for one, own in zip(members, split_rows(nll.double().cpu().numpy(), members), strict=False):
            content = own[~one.end_of_turn]
            mine[one.id] = [float(own.sum()), len(own), float(content.sum()), int(one.content_bytes.sum())]
    every: dict[str, list[float]] = {}
    for found in ranks.gather(mine):
        every |= found
    return np.sum([every[identity] for identity in data.prepared.ids], axis=0)
