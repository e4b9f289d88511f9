"""Answers of a model in this process: prompts of similar length in one batch, padded on the left.

With a temperature every row samples with random numbers of its own (`sampling.py`). An answer depends on its prompt and, in the
last digits of logits, on its batch, but not on other rows' samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusechat.errors import ModelError
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.asking import Asking
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import device_of, length_batches
from fusechat.models.load import choose_device, default_dtype
from fusechat.models.memory import if_it_fits
from fusechat.models.sampling import draw, stop_at
from fusechat.run.progress import Advance, log


class Generator:
    """A loaded model. `batch_tokens`: maximum tokens of a batch, answers included. `spread`: see `ChatModel.model`."""

    def __init__(
        self,
        chat_model: ChatModel,
        *,
        dtype: str | None,
        device: str | None,
        batch_tokens: int,
        seed: int,
        **spread: Any,
    ) -> None:
        place = choose_device(device)
        self._name, self._identity = chat_model.name, chat_model.identity
        self._asking = Asking(chat_model)
        self._model = chat_model.model(dtype=dtype or default_dtype(place), device=place, **spread)
        self._batch_tokens, self._seed = batch_tokens, seed
        self.most: int | None = None  # answers at once, after running out of memory

    def answer(
        self, prompts: Sequence[Prompt], done: Callable[[int, Answer | Missing], None], has: Sequence[bool]
    ) -> None:
        """Calls `done(index, answer)` for each prompt as answers are ready, except in batches that `has` completely. Batches do
        not depend on `has`, so that an interrupted run gives the same answers."""
        tokens: dict[int, list[int]] = {}
        kinds: dict[tuple[float, float, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            found = self._asking.encode(prompt)
            if isinstance(found, Missing):
                if not has[index]:
                    done(index, found)
                continue
            tokens[index] = found
            kinds.setdefault((prompt.temperature, prompt.top_p, prompt.max_new_tokens), []).append(index)
        for (*_, longest), members in kinds.items():
            for batch in self._batches(members, tokens, longest):
                while batch and not all(has[index] for index in batch):
                    most = self.most or len(batch)
                    part, batch = batch[:most], batch[most:]
                    self._batch(part, prompts, tokens, done)

    def answers(self, prompts: Sequence[Prompt], advance: Advance) -> list[Answer | Missing]:
        """All answers, in the prompts' order."""
        found: dict[int, Answer | Missing] = {}

        def done(index: int, answer: Answer | Missing) -> None:
            found[index] = answer
            advance(1)

        self.answer(prompts, done, [False] * len(prompts))
        return [found[index] for index in range(len(prompts))]

    def _batches(self, members: Sequence[int], tokens: Mapping[int, list[int]], longest: int) -> list[list[int]]:
        """Prompts of similar length together; alone those that leave less room than the longest answer takes."""
        alone = [index for index in members if len(tokens[index]) + longest > self._asking.room]
        others = [index for index in members if len(tokens[index]) + longest <= self._asking.room]
        lengths = np.array([len(tokens[index]) + longest for index in others], dtype=np.int64)
        batches = length_batches(lengths, self._batch_tokens)
        return [[others[index] for index in batch] for batch in batches] + [[index] for index in alone]

    def _batch(
        self,
        chosen: list[int],
        prompts: Sequence[Prompt],
        tokens: Mapping[int, list[int]],
        done: Callable[[int, Answer | Missing], None],
    ) -> None:
        first = prompts[chosen[0]]
        keys = [[self._seed, self._identity, prompts[index].key, prompts[index].sample] for index in chosen]
        longest = min(first.max_new_tokens, self._asking.room - max(len(tokens[index]) for index in chosen))
        drawing, asked = (
            draw(keys, temperature=first.temperature, top_p=first.top_p),
            [tokens[index] for index in chosen],
        )
        answers = if_it_fits(lambda: self._generate(asked, longest=longest, processors=drawing))
        if answers is None:
            self._split(chosen, prompts, tokens, done)
            return
        for index, answer in zip(chosen, answers, strict=True):
            done(index, answer)

    def _split(self, chosen: list[int], *rest: Any) -> None:
        if len(chosen) == 1:
            raise ModelError(f"{self._name}: one answer does not fit in memory by itself; lower --max-new-tokens")
        log.warning("%s: %d answers do not fit in memory together; halved (--batch-tokens)", self._name, len(chosen))
        self.most = middle = len(chosen) // 2
        self._batch(chosen[:middle], *rest)
        self._batch(chosen[middle:], *rest)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], *, longest: int, processors: list[Any]) -> list[Answer]:
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = min(self._asking.stops, default=0)
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        # Complete: a model's own generation_config.json would add settings that the suites do not have.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=sorted(self._asking.stops) or None,
            pad_token_id=pad,
        )
        device = device_of(self._model)
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=processors,
            stopping_criteria=stop_at(self._asking.stop_texts, self._asking.tokenizer, prompt=width, name=self._name),
        )
        return [self._asking.answer(row[width:]) for row in output.tolist()]
