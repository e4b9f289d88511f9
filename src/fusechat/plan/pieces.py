"""Pieces of models, with weights of no meaning, and what is timed with them: the code of capture, training and answers."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared
from fusechat.models.load import DTYPES
from fusechat.plan.shapes import Shape, on_meta

_K = 10


def piece(shape: Shape, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The first `layers` of a model with embeddings and head, and weights of no meaning."""
    from transformers import AutoConfig

    config = copy.deepcopy(AutoConfig.from_pretrained(shape.directory, trust_remote_code=shape.trust_remote_code))
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name, value in list(text.to_dict().items()):
        if isinstance(value, list) and len(value) == shape.layers:
            setattr(text, name, value[:layers])
    model = on_meta(config, trust_remote_code=shape.trust_remote_code).to(dtype).to_empty(device=device)
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device)
    with torch.no_grad():
        for weights in model.parameters():
            flat = weights.view(-1)
            for begin in range(0, len(flat), len(pattern)):
                part = flat[begin : begin + len(pattern)]
                part.copy_(pattern[: len(part)])
        for buffer in model.buffers():
            buffer.fill_(0.5 if buffer.is_floating_point() else 0)
    model.tie_weights()
    return model.eval()


def conversations(length: int, batch: int, rows: int, vocabulary: int) -> list[Prepared]:
    each = max(1, min(length - 1, -(-rows // batch))) if length > 1 else 1
    position = np.arange(length - each, length, dtype=np.int32) if length > 1 else np.ones(1, np.int32)
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(batch, max(2, length)), dtype=np.int32)
    nothing = np.zeros(each, np.int32)
    return [
        Prepared(str(number), tokens, position, nothing, nothing, nothing, nothing.astype(bool), np.ones(1, np.int32))
        for number, tokens in enumerate(ids)
    ]


@torch.inference_mode()
def decoding(model: Any, *, length: int, batch: int) -> Callable[[], object]:
    """What makes one token more, as Transformers does greedily; each call another one. The first row is padded, so that attention
    is masked."""
    device, vocabulary = model.device, model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    cache = model(input_ids=ids[:1], use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(batch)

    @torch.inference_mode()
    def step() -> object:
        mask = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long, device=device)
        mask[0, 0] = 0
        told = {"past_key_values": cache, "use_cache": True, "attention_mask": mask}
        logits = model(input_ids=ids[:, -1:], **told).logits
        return logits[:, -1].float().argmax(-1).cpu()

    return step


def run(model: Any, conversations: list[Prepared]) -> None:
    from fusechat.capture.top_k import sparse_rows
    from fusechat.models.teacher_forcing import forward

    for column in forward(model, conversations, partial(sparse_rows, k=_K)):
        column.cpu()


def train(model: Any, conversations: list[Prepared], dtype: str, device: torch.device) -> None:
    from fusechat.fuse.loss import fusion_loss
    from fusechat.models.forward import collate, response_logits

    batch = collate(conversations).to(device)
    labels = batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]]
    ids = (labels[:, None] + torch.arange(_K, device=device)) % model.get_input_embeddings().weight.shape[0]
    logprobs = torch.full(ids.shape, -float(np.log(_K)), device=device)
    low = dtype != "float32"
    with torch.autocast(device.type, DTYPES[dtype]) if low else nullcontext():
        logits = response_logits(model, batch)
        loss = fusion_loss(logits, labels, ids, logprobs, sft_weight=0.9)
    loss.backward()
    model.zero_grad(set_to_none=True)
