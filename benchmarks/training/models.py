"""Models with random weights, and a batch of conversations with made-up targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from fusechat.models.forward import Batch

K = 10
# Tokens of conversations: asked, answered, asked, answered.
TURNS = [[60, 70, 50, 68], [40, 52, 90, 74], [101, 61, 34, 44], [66, 58, 54, 78]]


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def gemma() -> Any:
    """As Gemma 3 270M, with four of its 18 layers."""
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2_048,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    )
    return Gemma3ForCausalLM(config)


MODELS = {"llama": llama, "gemma": gemma}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().float().train()


@dataclass(frozen=True)
class Example:
    """A batch, and for its n response rows `labels` int64 [n], `target_ids` int64 [n, k], `target_logprobs` float32 [n, k]."""

    batch: Batch
    labels: torch.Tensor
    target_ids: torch.Tensor
    target_logprobs: torch.Tensor

    @property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.labels, self.target_ids, self.target_logprobs


def make_example(vocabulary: int, *, joined: bool) -> Example:
    """The conversations of `TURNS`, or one with all turns of them; a row's targets are its label and nine more tokens, which
    leave 2 to 30% to others."""
    conversations = [[size for turns in TURNS for size in turns]] if joined else TURNS
    generator = torch.Generator().manual_seed(1)
    lengths = [sum(turns) for turns in conversations]
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    input_ids = torch.randint(vocabulary, real.shape, generator=generator) * real
    rows = [(index, position) for index, turns in enumerate(conversations) for position in answered(turns)]
    batch = Batch(input_ids, real.long(), torch.tensor(rows))
    labels = input_ids[batch.rows[:, 0], batch.rows[:, 1]]
    target_ids = torch.rand(len(rows), vocabulary // 10, generator=generator).topk(K, dim=1).indices
    target_ids[:, 0] = torch.where((target_ids == labels[:, None]).any(dim=1), target_ids[:, 0], labels)
    kept = 0.7 + 0.28 * torch.rand(len(rows), 1, generator=generator)
    logprobs = (torch.softmax(2 * torch.randn(len(rows), K, generator=generator), dim=1) * kept).log()
    return Example(batch, labels, target_ids, logprobs.sort(dim=1, descending=True).values)


def answered(turns: list[int]) -> list[int]:
    """Positions of the tokens of the second turn, the fourth and so on."""
    ends = np.cumsum(turns)
    return [position for end, size in zip(ends[1::2], turns[1::2], strict=True) for position in range(end - size, end)]
