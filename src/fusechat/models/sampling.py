"""Sampling with separate random numbers for every row of a batch, and stop strings that are searched in answers only.

The maximum of the log-probabilities plus Gumbel noise is a sample (Gumbel 1954; Maddison et al., arXiv 1411.0030), so that
generation itself stays greedy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StopStringCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from fusechat.errors import ModelError
from fusechat.run.files import digest_json


def draw(keys: Sequence[Any], *, temperature: float, top_p: float) -> list[LogitsProcessor]:
    """Logits processors that make greedy generation sample at `temperature`, from the most probable tokens with mass `top_p`.
    `keys`: JSON for each row of the batch, from which its random numbers derive. Empty at temperature 0."""
    if not temperature:
        return []
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return [*warpers, GumbelNoise(keys)]


class GumbelNoise(LogitsProcessor):
    """Adds noise to logits [rows, V], with a generator for each row that is seeded by its key."""

    def __init__(self, keys: Sequence[Any]) -> None:
        self._seeds = [int(digest_json(key)[:15], 16) for key in keys]
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = scores.device if scores.device.type in ("cpu", "cuda") else torch.device("cpu")
        if not self._generators:
            self._generators = [torch.Generator(place).manual_seed(seed) for seed in self._seeds]
        # float64: a uniform float32 is 0, with infinite noise, once in 16 million draws, which is once in some hundred tokens
        drawn = torch.empty(scores.shape, dtype=torch.float64, device=place)
        for row, generator in zip(drawn, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - drawn.clamp_(min=torch.finfo(drawn.dtype).tiny).log_().to(scores)


def stop_at(stop: Sequence[str], tokenizer: Any, *, prompt: int, name: str) -> list[StopStringCriteria]:
    """Stopping criteria that end a row at the first of these strings after its first `prompt` tokens. Raises ModelError for a
    string that the tokenizer cannot write."""
    if not stop:
        return []
    try:
        return [_StopInAnswer(tokenizer, list(stop), prompt=prompt)]
    except ValueError:
        raise ModelError(f"{name}: stop: its tokens write none of {', '.join(map(repr, stop))}") from None


class _StopInAnswer(StopStringCriteria):
    def __init__(self, tokenizer: Any, stop_strings: list[str], *, prompt: int) -> None:
        super().__init__(tokenizer, stop_strings)
        self._prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        return super().__call__(input_ids[:, self._prompt :], scores, **more)
