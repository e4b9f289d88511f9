"""What the losses of the rows allocate: nothing of the logits' size but one gradient."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import each
from dense_losses import KINDS, TAILS, TEMPERATURES, problem
from fusechat.fuse import row_losses as module
from fusechat.fuse.loss import row_losses


class Allocations(TorchDispatchMode):
    """Elements of every storage that operations make again, and the dtype in which each was made."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[torch.Tensor] = []  # held on to, so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.known.add(tensor.untyped_storage().data_ptr())
                self.made.append(tensor)
        return result

    def sizes(self) -> list[int]:
        return [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in self.made]


@each("dtype, kind, tail, temperature", itertools.product((torch.bfloat16, torch.float32), KINDS, TAILS, TEMPERATURES))
def test_nothing_of_the_logits_size_but_one_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, tail: str, temperature: float
) -> None:
    n, vocabulary, k = 40, 301, 4
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", 2 * vocabulary)
    given = problem(n=n, vocabulary=vocabulary, k=k)
    logits = given["logits"].to(dtype).requires_grad_()
    bounded = 2 * (vocabulary + 1)
    with Allocations(logits) as forward:
        nll, divergence = row_losses(**{**given, "logits": logits}, kind=kind, tail=tail, temperature=temperature)
    assert n * (k + 1) < bounded < n * vocabulary  # so that what belongs to the targets is not in the way
    assert max(forward.sizes()) <= bounded
    loss = nll.sum() + divergence.sum()
    with Allocations(logits) as backward:
        loss.backward()
    large = [tensor for tensor, size in zip(backward.made, backward.sizes(), strict=True) if size > bounded]
    assert [tensor.dtype for tensor in large] == [dtype]
    assert large[0].numel() == n * vocabulary
    assert large[0].data_ptr() == logits.grad.data_ptr()


def test_the_watch_sees_what_a_dense_loss_makes() -> None:
    logits = torch.zeros(40, 301, requires_grad=True)
    with Allocations(logits) as forward:
        torch.nn.functional.cross_entropy(logits, torch.zeros(40, dtype=torch.long))
    assert max(forward.sizes()) == 40 * 301
