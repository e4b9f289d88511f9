"""One step of training in each way that is compared: forward, loss, backward, optimiser."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fusechat.fuse.loss import fusion_loss_parts
from fusechat.models.forward import response_logits
from training.models import TURNS, Example, build, make_example

FUSION, PLAIN, DENSE = "fusion", "plain", "dense targets"
SFT_WEIGHT = 0.9
Loss = Callable[[Any, Example], torch.Tensor]


def fusion(model: Any, example: Example) -> torch.Tensor:
    """As FusionTrainer has it."""
    logits = response_logits(model, example.batch)
    return fusion_loss_parts(logits, *example.targets, sft_weight=SFT_WEIGHT).total


def plain(model: Any, example: Example) -> torch.Tensor:
    """Fine-tuning without any part of FuseChat, with logits only at positions at which some conversation has a response."""
    batch = example.batch
    wanted = batch.rows[:, 1] - 1
    kept, column = torch.unique(wanted, return_inverse=True)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=kept)
    labels = torch.full((len(batch.input_ids), len(kept)), -100)
    labels[batch.rows[:, 0], column] = example.labels
    logits = output.logits.float().flatten(0, 1)
    return cross_entropy(logits, labels.flatten(), reduction="sum") / len(example.labels)


def dense(model: Any, example: Example) -> torch.Tensor:
    """The fusion loss with targets of the vocabulary's size, at all positions, as research code has it."""
    batch = example.batch
    b, length = batch.input_ids.shape
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.float()
    place = batch.rows[:, 0], batch.rows[:, 1] - 1
    labels = torch.full((b, length), -100)
    labels[place] = example.labels
    targets = torch.zeros(b, length, logits.shape[2])
    p = torch.softmax(example.target_logprobs, dim=1)
    targets[place[0][:, None], place[1][:, None], example.target_ids] = p
    gold = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    fused = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(b, length)[place].sum()
    return (SFT_WEIGHT * gold + (1 - SFT_WEIGHT) * fused) / len(example.labels)


WAYS: dict[str, Loss] = {FUSION: fusion, PLAIN: plain, DENSE: dense}


@dataclass(frozen=True)
class Case:
    """Which model, whether under bfloat16 autocast or in float32, and whether the batch is one conversation or four."""

    model: str
    autocast: bool
    joined: bool = False

    def __str__(self) -> str:
        batch = "1 conversation" if self.joined else f"{len(TURNS)} conversations"
        return f"{self.model}, {'bfloat16' if self.autocast else 'float32'}, {batch}"


class Training:
    """A model, its AdamW and a batch; `step` trains in one of `WAYS`, as Transformers' Trainer does without accumulation."""

    def __init__(self, case: Case) -> None:
        self.model, self.autocast = build(case.model), case.autocast
        self.example = make_example(self.model.config.vocab_size, joined=case.joined)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-6, fused=True)

    def loss(self, way: str) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext():
            return WAYS[way](self.model, self.example)

    def step(self, way: str) -> float:
        loss = self.loss(way)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
