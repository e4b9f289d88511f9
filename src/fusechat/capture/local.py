"""Capture with Transformers in this process."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fusechat.capture.top_k import distribution, sparse_rows
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models.memory import free_memory
from fusechat.models.teacher_forcing import TeacherForcing


class Local:
    """Captures the `k` most probable tokens with a model in this process; see `TeacherForcing`."""

    def __init__(self, model: Any, *, k: int, batch_tokens: int, name: str) -> None:
        keys = ("capture.batch_tokens", "data.max_length")
        self.k, self.forced = k, TeacherForcing(model, batch_tokens=batch_tokens, name=name, keys=keys)

    @property
    def batch_tokens(self) -> int:
        """Tokens in a batch, after any halving for memory."""
        return self.forced.batch_tokens

    def capture(
        self, conversations: Sequence[Prepared], advance: Callable[[int], None]
    ) -> list[SparseDistribution | None]:
        """Top-k distributions of every conversation's rows, in order; None for a conversation with values that are not finite.
        Raises ModelError for a conversation that does not fit in memory by itself."""
        results: list[SparseDistribution | None] = [None] * len(conversations)
        for index, columns in self.forced.run(conversations, partial(sparse_rows, k=self.k)):
            results[index] = distribution(*columns)
            advance(1)
        return results

    def close(self) -> None:
        """Frees the model's memory."""
        del self.forced
        free_memory()
