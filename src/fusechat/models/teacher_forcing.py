"""Teacher forcing: runs a model on whole conversations, in batches of similar length that shrink when memory runs out, and
computes on the logits of the response rows: log-probabilities for capture, evaluation and scores of answers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.errors import ModelError
from fusechat.models.forward import collate, length_batches, response_logits, token_nll
from fusechat.models.memory import if_it_fits
from fusechat.run.progress import log

Conversations = PreparedSet | Sequence[Prepared]
Columns = tuple[torch.Tensor, ...]  # tensors [n, …], one row for each response row
Compute = Callable[[torch.Tensor, torch.Tensor], Columns]  # logits [n, V] and gold tokens int64 [n] → columns
Started = tuple[Columns, torch.cuda.Event | None]


class TeacherForcing:
    """A model to run with at most `batch_tokens` in a batch, padding included; reduced when memory runs out. `name`: the model's
    name in errors; `keys`: the recipe keys of the batch size and of the longest conversation."""

    def __init__(self, model: Any, *, batch_tokens: int, name: str, keys: tuple[str, str]) -> None:
        self.model, self.batch_tokens, self.name, self.keys = model, batch_tokens, name, keys

    def run(self, conversations: Conversations, compute: Compute) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields each conversation's index and its rows of the columns that `compute` returns, longest conversations first.
        Raises ModelError for a conversation that does not fit in memory by itself."""
        lengths = np.array([len(one.input_ids) for one in conversations], dtype=np.int64)
        waiting = list(length_batches(lengths, self.batch_tokens))
        before: tuple[list[int], list[Prepared], Started] | None = None
        while waiting:
            batch = waiting.pop(0)
            members = [conversations[index] for index in batch]
            started = if_it_fits(partial(self._start, members, compute))
            if before is not None:  # read while a GPU works on this batch
                yield from _arrived(*before)
            before = None if started is None else (batch, members, started)
            if started is None:
                self._shrink(members)
                left = np.array([*batch, *(index for other in waiting for index in other)])
                waiting = [left[some].tolist() for some in length_batches(lengths[left], self.batch_tokens)]
        if before is not None:
            yield from _arrived(*before)

    def nll(self, conversations: Conversations) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each conversation's index and `-log p` of its gold tokens: float32 [n], nats. Raises ModelError as `run` does."""
        for index, (nll,) in self.run(conversations, lambda logits, gold: (token_nll(logits, gold),)):
            yield index, nll

    def _start(self, members: list[Prepared], compute: Compute) -> Started:
        """Starts a batch: its columns, being copied to the CPU, and an event for their arrival."""
        columns = forward(self.model, members, compute)
        gpu = columns[0].is_cuda
        arriving = tuple(column.to("cpu", non_blocking=gpu) for column in columns)
        return arriving, torch.cuda.current_stream(columns[0].device).record_event() if gpu else None

    def _shrink(self, members: list[Prepared]) -> None:
        """Halves the budget until it splits the batch that did not fit."""
        longest = max(len(one.input_ids) for one in members)
        if len(members) == 1:
            raise ModelError(
                f"{self.name}: conversation {members[0].id} of {longest} tokens does not fit in memory by itself: lower "
                f"{self.keys[1]}, or run this where there is more memory"
            )
        before = self.batch_tokens
        while len(members) * longest <= self.batch_tokens:
            self.batch_tokens //= 2
        log.warning(
            "%s: %d conversations of up to %d tokens do not fit in memory together; batches have %d tokens at most from here "
            "on, not %d (%s)",
            *(self.name, len(members), longest, self.batch_tokens, before, self.keys[0]),
        )


@torch.inference_mode()
def forward(model: Any, conversations: Sequence[Prepared], compute: Compute) -> Columns:
    """`compute` of the logits at the conversations' rows, one conversation after the other, on the model's device."""
    batch = collate(conversations)
    gold = batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]]
    logits = response_logits(model, batch)
    return compute(logits, gold.to(logits.device))


def split_rows(column: np.ndarray, conversations: Sequence[Prepared]) -> list[np.ndarray]:
    """Splits a column into the rows of each conversation."""
    return np.split(column, np.cumsum([len(one) for one in conversations])[:-1])


def _arrived(batch: list[int], members: list[Prepared], started: Started) -> Iterator[tuple[int, list[np.ndarray]]]:
    columns, arrived = started
    if arrived is not None:
        arrived.synchronize()
    parts = [split_rows(column.numpy(), members) for column in columns]
    for place, index in enumerate(batch):
        yield index, [part[place] for part in parts]
