"""Answers by a model in this process: prompts of like length in one batch, padded on the left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusechat.data.conversations import Message
from fusechat.errors import ModelError
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import device_of, length_batches
from fusechat.models.load import choose_device, default_dtype, stop_tokens, without_embedding
from fusechat.models.memory import free_memory, out_of_memory
from fusechat.models.templates import UnrenderableError
from fusechat.run.files import digest_json
from fusechat.run.progress import log


class Generator:
    """A loaded model. `batch_tokens`: tokens of a batch at most, with the room for answers. `spread`: as `Chatter.model` has it."""

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
        self._name = chat_model.name
        self._template = chat_model.template()
        self._tokenizer = self._template.tokenizer
        self._model = chat_model.model(dtype=dtype or default_dtype(place), device=place, **spread)
        self._batch_tokens, self._seed = batch_tokens, seed
        self._most = 1 << 30  # answers at once; less where memory did not suffice
        config = self._model.config.get_text_config()
        self._room = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._rows = int(self._model.get_input_embeddings().weight.shape[0])
        self._stops = stop_tokens(self._model, self._tokenizer, self._template.end_of_turn)

    def answer(
        self, prompts: Sequence[Prompt], done: Callable[[int, Answer | Missing], None], has: Sequence[bool]
    ) -> None:
        """Calls `done` with the place of each prompt and its answer, as they come; of batches that `has` wholly, nothing.

        A batch is made up of the same prompts, and draws the same numbers, whatever is there already: an interrupted run
        gives the answers of one that was not.
        """
        tokens: dict[int, list[int]] = {}
        kinds: dict[tuple[float, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            found = self._encode(prompt)
            if isinstance(found, Missing):
                if not has[index]:
                    done(index, found)
                continue
            tokens[index] = found
            kinds.setdefault((prompt.temperature, prompt.max_new_tokens), []).append(index)
        for (_, longest), members in kinds.items():
            for batch in self._batches(members, tokens, longest):
                while batch and not all(has[index] for index in batch):
                    part, batch = batch[: self._most], batch[self._most :]
                    self._batch(part, prompts, tokens, done)

    def _batches(self, members: Sequence[int], tokens: Mapping[int, list[int]], longest: int) -> list[list[int]]:
        """Prompts of like length together; by itself each that leaves less room than the longest answer takes."""
        alone = [index for index in members if len(tokens[index]) + longest > self._room]
        others = [index for index in members if len(tokens[index]) + longest <= self._room]
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
        key = digest_json([self._seed, [prompts[index].key for index in chosen]])
        longest = min(first.max_new_tokens, self._room - max(len(tokens[index]) for index in chosen))
        try:
            answers = self._generate(
                [tokens[index] for index in chosen],
                temperature=first.temperature,
                longest=longest,
                seed=int(key[:8], 16),
            )
        except Exception as error:
            if not out_of_memory(error):
                raise
            answers = None
        if answers is None:  # after the exception, and what its frames hold, is gone
            free_memory()
            self._split(chosen, prompts, tokens, done)
            return
        for index, answer in zip(chosen, answers, strict=True):
            done(index, answer)

    def _split(self, chosen: list[int], *rest: Any) -> None:
        if len(chosen) == 1:
            raise ModelError(f"{self._name}: one answer does not fit in memory by itself; lower --max-new-tokens")
        log.warning("%s: %d answers do not fit in memory together; halved (--batch-tokens)", self._name, len(chosen))
        self._most = middle = len(chosen) // 2
        self._batch(chosen[:middle], *rest)
        self._batch(chosen[middle:], *rest)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], *, temperature: float, longest: int, seed: int) -> list[Answer]:
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = min(self._stops, default=0)
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        # Whole in itself: a model's own generation_config.json would add settings that the suites did not publish.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else 1.0,
            top_p=1.0,
            top_k=0,
            eos_token_id=sorted(self._stops) or None,
            pad_token_id=pad,
        )
        device = device_of(self._model)
        torch.manual_seed(seed)
        output = self._model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        return [self._answer(row[width:]) for row in output.tolist()]

    def _answer(self, row: list[int]) -> Answer:
        end = next((at for at, token in enumerate(row) if token in self._stops), None)
        kept = row if end is None else row[:end]
        return Answer(self._tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), end is not None)

    def _encode(self, prompt: Prompt) -> list[int] | Missing:
        try:
            text = self._template.prompt([Message(role, content) for role, content in prompt.messages])
        except UnrenderableError as error:
            return Missing(str(error))
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        wrong = without_embedding(tokens, self._rows, self._tokenizer)
        if wrong:
            return Missing(f"its prompt has {wrong}")
        if len(tokens) >= self._room:
            return Missing(f"its prompt of {len(tokens)} tokens leaves no room in the model's {self._room}")
        return tokens
