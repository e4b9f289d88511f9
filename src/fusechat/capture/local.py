"""Capture with Transformers in this process: batches of like length, made smaller where memory does not suffice."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fusechat.capture.top_k import Columns, split_batch, start_batch
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.errors import ModelError
from fusechat.models.forward import length_batches
from fusechat.models.memory import free_memory, out_of_memory
from fusechat.run.progress import log

Results = list[SparseDistribution | None]
Started = tuple[Columns, torch.cuda.Event | None]


class Local:
    """A model and how it is run: `batch_tokens` at most in a batch, its padding counted. `name`: how errors call the model."""

    def __init__(self, model: Any, *, k: int, batch_tokens: int, name: str) -> None:
        self.model, self.k, self.batch_tokens, self.name = model, k, batch_tokens, name

    @torch.inference_mode()
    def capture(self, conversations: Sequence[Prepared], advance: Callable[[int], None]) -> Results:
        """The `k` most likely tokens at each row of every conversation, in the order given; None for a conversation in which a
        value is not finite. Raises ModelError for one that does not fit in memory by itself."""
        results: Results = [None] * len(conversations)
        lengths = np.array([len(one.input_ids) for one in conversations], dtype=np.int64)
        waiting = list(length_batches(lengths, self.batch_tokens))
        finish: Callable[[], None] = _nothing
        while waiting:
            batch = waiting.pop(0)
            members = [conversations[index] for index in batch]
            started = self._start(members)
            finish()  # the batch before, while a GPU works on this one
            finish = _nothing
            if started is None:
                self._shrink(members)
                left = np.array([*batch, *(index for other in waiting for index in other)])
                waiting = [left[some].tolist() for some in length_batches(lengths[left], self.batch_tokens)]
            else:
                finish = partial(_finish, started, members, batch, results=results, advance=advance)
        finish()
        return results

    def close(self) -> None:
        """Gives the model's memory back."""
        del self.model
        free_memory()

    def _start(self, members: list[Prepared]) -> Started | None:
        """What a batch gives, on its way to the CPU, and when it has arrived; None where it does not fit in memory."""
        try:
            columns = start_batch(self.model, members, k=self.k)
            gpu = columns[0].is_cuda
            arriving = tuple(column.to("cpu", non_blocking=gpu) for column in columns)
            return arriving, torch.cuda.current_stream(columns[0].device).record_event() if gpu else None
        except Exception as error:
            if not out_of_memory(error):
                raise
        free_memory()  # not before the exception, and what its frames hold, is gone
        return None

    def _shrink(self, members: list[Prepared]) -> None:
        """Halves the budget, until the batch that did not fit is split by it."""
        longest = max(len(one.input_ids) for one in members)
        if len(members) == 1:
            raise ModelError(
                f"{self.name}: conversation {members[0].id} of {longest} tokens does not fit in memory by itself: lower "
                "data.max_length, or capture where there is more memory"
            )
        before = self.batch_tokens
        while len(members) * longest <= self.batch_tokens:
            self.batch_tokens //= 2
        log.warning(
            "%s: %d conversations of up to %d tokens do not fit in memory together; batches have %d tokens at most from here "
            "on, not %d (capture.batch_tokens)",
            *(self.name, len(members), longest, self.batch_tokens, before),
        )


def _finish(
    started: Started, members: list[Prepared], batch: list[int], *, results: Results, advance: Callable[[int], None]
) -> None:
    """Waits for what a batch gives, and puts it in its places."""
    columns, arrived = started
    if arrived is not None:
        arrived.synchronize()
    for index, result in zip(batch, split_batch(columns, members), strict=True):
        results[index] = result
    advance(len(batch))


def _nothing() -> None:
    pass
