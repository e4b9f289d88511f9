"""Batches that do not fit in memory are made smaller, and nothing is lost."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import each
from fusechat.capture.local import Local
from fusechat.data.prepared import Prepared
from fusechat.errors import ModelError
from fusechat.evaluate.bits_per_byte import score_responses


class Small(torch.nn.Module):
    """A model on a device with room for so many tokens, padding counted."""

    def __init__(self, inner: Any, room: int, error: type[Exception] = torch.OutOfMemoryError, says: str = "") -> None:
        super().__init__()
        self.inner, self.room, self.error, self.says = inner, room, error, says
        self.asked: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, use_cache: bool) -> Any:
        self.asked.append(input_ids.numel())
        if input_ids.numel() > self.room:
            raise self.error(self.says)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def conversations(lengths: list[int]) -> list[Prepared]:
    random = np.random.default_rng(0)
    made = []
    for number, length in enumerate(lengths):
        position = np.arange(length // 2, length, dtype=np.int32)
        zeros = np.zeros(len(position), np.int32)
        ids = random.integers(256, size=length).astype(np.int32)
        made.append(
            Prepared(f"c{number}", ids, position, zeros, zeros, zeros, zeros.astype(bool), np.array([1], np.int32))
        )
    return made


@each("error, says", [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    (torch.OutOfMemoryError, ""),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to"),
    (MemoryError, ""),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_split_and_nothing_is_lost(
    loaded: dict[str, Any], heard: list[str], error: type[Exception], says: str
) -> None:
    heard.clear()
    everything = conversations([10, 40, 33, 7, 21, 40, 12, 38, 5, 30])
    expected = Local(loaded["llama"], k=4, batch_tokens=1, name="").capture(everything, lambda n: None)
    model = Small(loaded["llama"], 90, error, says)
    backend = Local(model, k=4, batch_tokens=400, name="tiny (here)")
    done: list[int] = []
    found = backend.capture(everything, done.append)
    assert sum(done) == 10
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
        np.testing.assert_allclose(one.nll, other.nll, atol=1e-3)
    assert [size for size in model.asked if size > 90] == [400, 200]  # 10 and 5 conversations of up to 40 tokens
    assert backend.batch_tokens == 100
    said = (
        "tiny (here): {} conversations of up to 40 tokens do not fit in memory together; batches have {} tokens at most"
    )
    assert [line.split(" from here on, not ")[0] for line in heard] == [said.format(10, 200), said.format(5, 100)]
    assert "not 400" in heard[0]
    asked = len(model.asked)
    backend.capture(everything, done.append)  # the next shard begins with what fits
    assert max(model.asked[asked:]) == 90
    assert len(heard) == 2


def test_a_conversation_that_does_not_fit_by_itself_is_named(loaded: dict[str, Any]) -> None:
    backend = Local(Small(loaded["llama"], 30), k=4, batch_tokens=100, name="tiny (here)")
    with pytest.raises(ModelError) as raised:
        backend.capture(conversations([10, 40, 20]), lambda n: None)
    (line,) = raised.value.messages
    assert line.startswith("tiny (here): conversation c1 of 40 tokens does not fit in memory by itself")


def test_other_errors_stay_what_they_are(loaded: dict[str, Any], heard: list[str]) -> None:
    backend = Local(Small(loaded["llama"], 30, RuntimeError, "shapes differ"), k=4, batch_tokens=100, name="tiny")
    with pytest.raises(RuntimeError, match="shapes differ"):
        backend.capture(conversations([10, 40, 20]), lambda n: None)
    assert heard == []


LIMITED = """
import resource, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from fusechat.capture.local import Local
from fusechat.run.progress import setup_logging
sys.path.insert(0, sys.argv[1])
from test_capture_memory import conversations

torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50_000, initializer_range=0.3, **shape)).eval()
everything = conversations([64] * 60)
backend = Local(model, k=5, batch_tokens=64 * 60, name="tiny")
expected = Local(model, k=5, batch_tokens=64, name="tiny").capture(everything, lambda n: None)  # and all is loaded
setup_logging()
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (200 << 20), taken + (200 << 20)))  # all logits at once take 366 MiB
found = backend.capture(everything, lambda n: None)
assert all(np.array_equal(a.ids, b.ids) and np.allclose(a.nll, b.nll, atol=1e-4) for a, b in zip(found, expected))
print(backend.batch_tokens)
"""


def test_a_real_limit_of_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (1920, 960)
    assert "do not fit in memory together" in done.stderr


def test_scores_are_the_same_however_small_the_batches_have_to_be(loaded: dict[str, Any], heard: list[str]) -> None:
    """What the evaluation measures, against each conversation by itself."""
    everything = conversations([10, 40, 33, 7, 21])
    model, done = Small(loaded["llama"], 90), []
    how: dict[str, Any] = {"batch_tokens": 400, "name": "tiny", "keys": ("evaluate.batch_tokens", "data.max_length")}
    found = score_responses(model, everything, advance=done.append, **how)
    assert (sum(done), list(found)) == (5, [one.id for one in everything])
    for one in everything:
        with torch.inference_mode():
            logits = (
                loaded["llama"](input_ids=torch.from_numpy(one.input_ids[None].astype(np.int64))).logits[0].double()
            )
        exact = -logits.log_softmax(-1)[one.position - 1, one.gold].sum().item()
        assert found[one.id] == [(pytest.approx(exact, rel=1e-5), 1)]
    assert heard[0].endswith("not 400 (evaluate.batch_tokens)")
    with pytest.raises(ModelError, match=r"^tiny: conversation c1 of 40 .* lower data.max_length, or run this where"):
        score_responses(Small(loaded["llama"], 30), everything, advance=done.append, **how)
