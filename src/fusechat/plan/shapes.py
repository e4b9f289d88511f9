"""What a model takes by its configuration alone: its weights are counted on PyTorch's meta device, and never read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.errors import ModelError, first_line

_EXPERTS = ".experts."  # in the names of weights of which a token uses a few
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Shape:
    """`parameters`: all, tied ones once; `active`: of those that a token is multiplied with, without embeddings and head; `head`:
    of the output layer, 0 of a model without one; `layer`: of one layer, all experts; `cached`: numbers that a layer keeps of a
    token, keys and values, while an answer is generated; `trained`: those that are trained, fewer with LoRA; `positions`:
    how many tokens the model is made for; `bits`: of a quantised weight, None where weights are full; `stored`: bytes of the
    weights as they are published; `directory`: its configuration's."""

    parameters: int
    active: int
    head: int
    layer: int
    layers: int
    hidden: int
    attention: int
    cached: int
    vocabulary: int
    embedding_rows: int
    trained: int
    positions: int | None
    bits: float | None
    stored: int
    directory: Path
    trust_remote_code: bool = False

    @property
    def width(self) -> float:
        """Outputs of all linear maps of a layer together, about."""
        return self.active / self.layers / self.hidden

    def weights(self, dtype: str) -> int:
        """Bytes of the weights as they are run in `dtype`."""
        return round(self.parameters * (self.bits or _BITS[dtype]) / 8)

    def forward_flops(self, tokens: float, rows: float, length: float) -> float:
        """Floating-point operations for `tokens` in conversations of `length` tokens, `rows` of which go through the head."""
        return 2 * (self.active * tokens + self.head * rows + self.attention * self.layers * length * tokens)

    def training_flops(self, tokens: float, rows: float, length: float, *, recompute: bool) -> float:
        """Forward and backward; `recompute`: activations are computed a second time. With LoRA no gradient of the weights is."""
        forward = self.forward_flops(tokens, rows, length)
        passes = 2.0 if self.trained < self.parameters else 3.0
        return forward * (passes + (1.0 if recompute else 0.0))


def shape_of(
    directory: Path, *, trust_remote_code: bool = False, lora: Mapping[str, Any] | None = None, head: bool = True
) -> Shape:
    """The shape of the model whose configuration is in `directory`; without `head` of one that classifies. Raises ModelError where
    no causal language model, or no such one, can be made of it."""
    from fusechat.models.load import quiet_transformers

    quiet_transformers()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = on_meta(config, trust_remote_code=trust_remote_code, head=head)
    except Exception as error:
        kind = "causal language model" if head else "model that classifies"
        raise ModelError(f"{directory}: its configuration makes no {kind}: {first_line(error)}") from error
    text = config.get_text_config()
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding, last = model.get_input_embeddings(), model.get_output_embeddings() if head else None
    inner = {name: size for name, size in named.items() if re.search(r"\.(layers?|h)\.", name)}
    share = _experts_used(text)
    heads = int(text.num_attention_heads)
    each = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Shape(
        parameters=sum(named.values()),
        active=round(sum(size * (share if _EXPERTS in name else 1.0) for name, size in inner.items())),
        head=math.prod(last.weight.shape) if last is not None else 0,
        layer=sum(inner.values()) // int(text.num_hidden_layers),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        attention=heads * each,
        cached=2 * each * int(getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=int(text.vocab_size),
        embedding_rows=int(embedding.weight.shape[0]),
        trained=_adapters(model, lora) if lora is not None else sum(named.values()),
        positions=getattr(text, "max_position_embeddings", None),
        bits=(bits := _bits(getattr(config, "quantization_config", None))),
        stored=round(
            sum(named.values()) * (bits or _BITS.get(str(text.dtype or config.dtype).removeprefix("torch."), 16)) / 8
        ),
        directory=directory,
        trust_remote_code=trust_remote_code,
    )


def on_meta(config: Any, *, trust_remote_code: bool = False, head: bool = True) -> Any:
    """A model without memory; without `head` one that classifies."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if head else AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def _experts_used(text: Any) -> float:
    """Which share of the experts a token goes through."""
    used = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    every = next((found for name in names if (found := getattr(text, name, None))), None)
    return used / every if used and every else 1.0


def _adapters(model: Any, lora: Mapping[str, Any]) -> int:
    """How many weights LoRA adds."""
    from fusechat.fuse.lora import with_adapters

    adapted = with_adapters(model, dict(lora), seed=0)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _bits(quantisation: Any) -> float | None:
    """Bits of a quantised weight, with its scales; None for full ones."""
    if quantisation is None:
        return None
    found = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    bits = found.get("bits") or (4 if found.get("load_in_4bit") else 8)
    return float(bits) + 0.5
