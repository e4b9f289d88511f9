"""The models that are merged: a base and five targets in a directory, made from a seed, the same wherever they are made."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BASE = "base"
TARGETS = [f"target-{number}" for number in range(1, 6)]
WEIGHTS = "model.safetensors"
STAMP = "made.json"
SEED = 20
STANDARD_DEVIATION = 0.02
UPDATES = (
    1e-3,
    1e-1,
)  # standard deviation of a tensor's update, relative to the tensor's own: log-uniform between them
UNTOUCHED = 0.1  # share of a target's tensors that did not change
FROZEN = 0.3  # share of the entries that did not change, of every other tensor
TEXT = "The quick brown fox jumps over the lazy dog, and größer als 12 is 你好.\n"


@dataclass(frozen=True)
class Shape:
    """A Llama architecture. The output matrix is not tied to the embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every parameter tensor."""
        hidden, inner = self.hidden, self.intermediate
        key_value = hidden // self.heads * self.key_value_heads
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            **{f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()},
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())


SCALES = {"full": Shape(1280, 3584, 24, 20, 4, 32_000), "small": Shape(128, 352, 2, 4, 2, 1_000)}


def make_models(directory: Path, shape: Shape) -> None:
    """Writes what `directory` lacks of the base and the targets in bfloat16, one tensor in memory at a time."""
    for number, name in enumerate([BASE, *TARGETS]):
        stamp, model = directory / name / STAMP, directory / name
        made = json.dumps({"seed": SEED, "model": number, "updates": UPDATES, **asdict(shape)})
        if stamp.is_file() and stamp.read_text() == made:
            continue
        model.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        with (model / WEIGHTS).open("wb") as file:
            write_weights(file, shape.tensors(), number)
        write_configuration(model, shape)
        write_tokenizer(model)
        stamp.write_text(made)


def write_weights(file: BinaryIO, tensors: dict[str, tuple[int, ...]], model: int) -> None:
    """The safetensors format: length of the header (8 bytes), the header in JSON, then the tensors one after another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    coded = json.dumps(header).encode()
    coded += b" " * (-len(coded) % 8)
    file.write(len(coded).to_bytes(8, "little") + coded)
    for number, shape in enumerate(tensors.values()):
        for part in values(number, shape, model):
            file.write(torch.from_numpy(part).bfloat16().view(torch.int16).numpy().data)


def values(tensor: int, shape: tuple[int, ...], model: int) -> Iterator[np.ndarray]:
    """The entries of a tensor in order, float32 [up to 4M] at a time: the base's, and of another model with its update."""
    size, part = math.prod(shape), 1 << 22
    deviation = np.float32(STANDARD_DEVIATION)
    mean = np.float32(len(shape) == 1)  # a norm's weights are around one
    base, own = np.random.default_rng([SEED, tensor]), np.random.default_rng([SEED, tensor, model])
    relative = np.float32(math.exp(own.uniform(*np.log(UPDATES))))
    touched = model > 0 and own.random() >= UNTOUCHED
    for start in range(0, size, part):
        count = min(part, size - start)
        entries = mean + deviation * base.standard_normal(count, dtype=np.float32)
        if touched:
            update = deviation * relative * own.standard_normal(count, dtype=np.float32)
            update[own.random(count, dtype=np.float32) < FROZEN] = 0
            entries += update
        yield entries


def write_configuration(model: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_tokenizer(model: Path) -> None:
    """Byte-level BPE with the few merges that a line of text gives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
