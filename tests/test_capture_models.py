"""Captures of padded batches against one conversation at a time without padding and a full softmax in float64: mixtures of
experts, padded vocabularies, tied embeddings, sliding windows shorter than the conversations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tiny
from cases import each
from fusechat.capture.local import Local
from fusechat.data.prepared import Prepared

SIZE, WINDOW = 300, 8
SHAPE: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SHAPE)),
    "qwen2, windows from its second layer on": lambda: Qwen2ForCausalLM(
        Qwen2Config(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, **SHAPE)
    ),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, head_dim=8, **SHAPE)),
    "gemma2, capped logits, sliding window": lambda: Gemma2ForCausalLM(
        Gemma2Config(sliding_window=WINDOW, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0, **SHAPE)
    ),
    "granite, scaled logits": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE)),
    "llama, vocabulary padded": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": SIZE + 84})),
}


def made(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind]().eval()


def conversations() -> list[Prepared]:
    """Random tokens; of responses some positions are asked for, in one, two or three stretches."""
    random = np.random.default_rng(0)
    made = []
    for name, tokens, stretches in (
        ("long", 60, [(20, 35), (50, 60)]),
        ("short", 9, [(4, 6)]),
        ("one", 30, [(29, 30)]),
        ("middle", 41, [(1, 5), (10, 12), (30, 41)]),
        ("like it", 40, [(15, 40)]),
    ):
        position = np.concatenate([np.arange(*stretch) for stretch in stretches]).astype(np.int32)
        zeros = np.zeros(len(position), np.int32)
        ids = random.integers(SIZE, size=tokens).astype(np.int32)
        made.append(Prepared(name, ids, position, zeros, zeros, zeros, zeros.astype(bool), np.array([1], np.int32)))
    return made


@torch.no_grad()
def by_itself(model: Any, conversation: Prepared) -> np.ndarray:
    """float64 [n, V]: log-probabilities at the conversation's rows, by a plain forward pass over nothing else."""
    logits = model(input_ids=torch.tensor([conversation.input_ids.tolist()])).logits[0].double()
    return logits.log_softmax(dim=1)[torch.from_numpy(conversation.position.astype(np.int64)) - 1].numpy()


@each("kind", [*MODELS, *tiny.KINDS])
def test_captures_are_what_a_plain_forward_pass_says(kind: str, loaded: dict[str, Any]) -> None:
    model = made(kind) if kind in MODELS else loaded[kind]
    everything = conversations()
    if kind in tiny.KINDS:
        size = model.config.get_text_config().vocab_size
        everything = [Prepared(**{**vars(one), "input_ids": one.input_ids % size}) for one in everything]
    exactly = [by_itself(model, conversation) for conversation in everything]
    assert all(exact.std() > 0.1 for exact in exactly), "no uniform ones, for which any position would do"
    for batch_tokens in (1, 100, 10_000):
        done: list[int] = []
        found = Local(model, k=7, batch_tokens=batch_tokens, name="tiny").capture(everything, done.append)
        assert sum(done) == len(everything)
        for conversation, exact, rows in zip(everything, exactly, found, strict=True):
            assert rows is not None
            assert rows.ids.shape == (len(conversation), 7)
            at = np.arange(len(conversation))[:, None]
            np.testing.assert_allclose(rows.logprobs, exact[at, rows.ids], atol=1e-3)
            np.testing.assert_allclose(rows.logprobs, -np.sort(-exact, axis=1)[:, :7], atol=1e-3)
            np.testing.assert_allclose(rows.nll, -exact[at[:, 0], conversation.gold], atol=1e-3)
            assert len(rows) <= 10 or rows.ids.max() > 256


@each("kind", ["mistral, sliding window", "qwen2, windows from its second layer on"])
def test_the_windows_are_shorter_than_what_was_captured(kind: str) -> None:
    """Else the test above would not see a mask that is wrong: what lies before the windows of both layers changes nothing."""
    model, (long, *_) = made(kind), conversations()
    changed = long.input_ids.copy()
    changed[0] = (changed[0] + 1) % SIZE
    other = Prepared(**{**vars(long), "input_ids": changed})
    one, two = (
        Local(model, k=5, batch_tokens=100, name="").capture([each], lambda n: None)[0] for each in (long, other)
    )
    assert one is not None
    assert two is not None
    same = np.abs(one.logprobs - two.logprobs).max(axis=1) < 1e-6
    assert same[long.position > 2 * WINDOW].all() == kind.startswith("mistral")


def test_the_head_runs_for_wanted_rows_alone(loaded: dict[str, Any]) -> None:
    everything = [Prepared(**{**vars(one), "input_ids": one.input_ids % 256}) for one in conversations()]
    seen: list[torch.Size] = []
    hook = loaded["llama"].lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    try:
        Local(loaded["llama"], k=3, batch_tokens=10_000, name="").capture(everything, lambda n: None)
    finally:
        hook.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(1, sum(map(len, everything)))]
    assert not loaded["llama"].lm_head._forward_pre_hooks
