"""Reward models: sequence classification models of Transformers with one label, whose logit is the reward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import length_batches
from fusechat.models.load import DTYPES, choose_device, model_error, quiet_transformers, refuse_missing
from fusechat.models.memory import free_memory, if_it_fits


class RewardModel:
    """A loaded model. `batch_tokens`: maximum tokens of a batch, padding included; reduced when memory runs out."""

    def __init__(self, chat_model: ChatModel, *, dtype: str, device: str | None, batch_tokens: int) -> None:
        quiet_transformers()
        from transformers import AutoModelForSequenceClassification

        self._name, directory = f"reward ({chat_model.reference})", chat_model.directory
        self._tokenizer, self._room = chat_model.tokenizer(), chat_model.positions() or 1 << 30
        self._device, self._batch_tokens = choose_device(device), batch_tokens
        trust = chat_model.reference.trust_remote_code
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                directory,
                dtype=DTYPES[dtype],
                trust_remote_code=trust,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise model_error(directory, "the reward model", error) from error
        refuse_missing(report, str(directory))
        if model.config.num_labels != 1:
            raise ModelError(
                f"{self._name}: gives {model.config.num_labels} numbers for a conversation, not one reward"
            )
        self._pads_itself = model.config.get_text_config().pad_token_id is not None
        self._model: Any = model.to(self._device).eval()

    def rewards(self, texts: Sequence[str]) -> list[float | None]:
        """The reward of each rendered conversation; None if it is longer than the model takes."""
        found: list[float | None] = [None] * len(texts)
        tokens = [list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        fitting = [place for place, one in enumerate(tokens) if 0 < len(one) <= self._room]
        lengths = np.array([len(tokens[place]) for place in fitting], dtype=np.int64)
        for batch in length_batches(lengths, self._batch_tokens):
            places = [fitting[index] for index in batch]
            for place, value in zip(places, self._run([tokens[place] for place in places]), strict=True):
                found[place] = value
        return found

    def _run(self, rows: list[list[int]]) -> list[float]:
        """Runs a batch; halves it if memory runs out."""
        found = if_it_fits(lambda: self._forward(rows))
        if found is not None:
            return found
        if len(rows) == 1:
            raise ModelError(f"{self._name}: a conversation of {len(rows[0])} tokens does not fit in memory by itself")
        middle = len(rows) // 2
        return self._run(rows[:middle]) + self._run(rows[middle:])

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> list[float]:
        config, width = self._model.config.get_text_config(), max(map(len, rows))
        if not self._pads_itself:  # the reward is at the last token before padding
            last = {row[-1] for row in rows}
            config.pad_token_id = next(token for token in range(len(rows) + 1) if token not in last)
        pad = config.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        return [float(value) for value in self._model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()]

    def close(self) -> None:
        """Frees the model's memory."""
        self._model = None
        free_memory()
