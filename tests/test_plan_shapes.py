"""What a plan reads off a configuration: against the models themselves, PyTorch's count of operations, and arithmetic by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import families
import tiny
from cases import each
from fusechat.errors import ModelError
from fusechat.models.forward import collate, response_logits
from fusechat.plan.calibration import Measured, _rounded
from fusechat.plan.devices import SHEETS, Batch, Rates, from_table, named
from fusechat.plan.pieces import conversations, piece
from fusechat.plan.shapes import shape_of

MIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A configuration, and nothing else."""
    config = transformers.MixtralConfig(**MIXTRAL, architectures=["MixtralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    return tmp_path


@each("kind", tiny.KINDS)
def test_parameters_are_those_of_the_model(kind: str, models: dict[str, Path], loaded: dict[str, Any]) -> None:
    shape, model = shape_of(models[kind]), loaded[kind]
    assert shape.parameters == shape.trained == sum(parameter.numel() for parameter in model.parameters())
    assert shape.head == model.get_output_embeddings().weight.numel()
    assert shape.embedding_rows == len(model.get_input_embeddings().weight)
    assert shape.layers == len(model.model.layers)
    assert shape.layer == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.weights("float32") == 4 * shape.parameters
    assert shape.weights("bfloat16") == 2 * shape.parameters


def test_of_experts_those_count_that_a_token_goes_through(mixtral: Path) -> None:
    """By hand: 3 layers with queries and output 32 × 32, keys and values 32 × 16, router 32 × 4, experts 3 · 32 × 48, two norms."""
    shape = shape_of(mixtral)
    attention, router, expert, norms = 2 * 32 * 32 + 2 * 32 * 16, 32 * 4, 3 * 32 * 48, 2 * 32
    assert shape.layer == attention + router + 4 * expert + norms
    assert shape.active == 3 * (attention + router + 2 * expert + norms)
    assert shape.parameters == 3 * shape.layer + 2 * 101 * 32 + 32
    assert (shape.hidden, shape.attention, shape.vocabulary, shape.positions) == (32, 32, 101, 64)
    assert shape.stored == 2 * shape.parameters
    assert shape.bits is None


def test_of_adapters_only_their_weights_are_trained(models: dict[str, Path]) -> None:
    """LoRA of rank r adds r times inputs and outputs of each map that it is given."""
    shape = shape_of(models["llama"], lora={"r": 3, "target_modules": ["q_proj"]})
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    maps = [module for name, module in model.named_modules() if name.endswith("q_proj")]
    assert shape.trained == sum(3 * (one.in_features + one.out_features) for one in maps)
    assert shape.training_flops(10, 5, 10, recompute=False) == 2 * shape.forward_flops(10, 5, 10)


def test_quantised_weights_take_their_bits(mixtral: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(mixtral)
    for given, bits in (({"load_in_4bit": True}, 4.5), ({"bits": 3}, 3.5), ({}, 8.5)):
        config.quantization_config = {"quant_method": "bitsandbytes", **given}
        config.save_pretrained(mixtral)
        shape = shape_of(mixtral)
        assert shape.bits == bits, given
        assert shape.weights("bfloat16") == round(shape.parameters * bits / 8)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: its configuration makes no causal language model"):
        shape_of(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its configuration makes no causal language model"):
        shape_of(tmp_path)


@each("kind, rows", [("llama", 8), ("mistral", 20)])
def test_operations_are_those_that_pytorch_counts(
    kind: str, rows: int, models: dict[str, Path], loaded: dict[str, Any]
) -> None:
    """Two conversations of 40 tokens; PyTorch counts attention over the whole square, a plan its causal half."""
    shape, batch = shape_of(models[kind]), conversations(40, 2, rows, 50)
    model = copy.deepcopy(loaded[kind])
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits = response_logits(model, collate(batch))
    assert len(logits) == rows
    maps = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    norms = 2 * 80 * (shape.active - maps)
    square = 2 * shape.attention * shape.layers * 40 * 80  # the other half of the attention
    assert counter.get_total_flops() == shape.forward_flops(80, rows, 40) + square - norms
    with FlopCounterMode(display=False) as counter:
        response_logits(model, collate(batch)).sum().backward()
    # Nothing is propagated to what the embedding looked up but through it, so that backward is twice forward, all in all.
    expected = 3 * (shape.forward_flops(80, rows, 40) + square - norms)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@each("family", ["Llama 3", "Gemma 2", "Gemma 3", "Phi-3", "Qwen3", "SmolLM3", "Mixtral"])
def test_a_piece_of_every_family_runs(family: str, tmp_path: Path, mixtral: Path) -> None:
    """What is timed is the model's own class, with fewer layers and weights that are numbers."""
    directory = mixtral if family == "Mixtral" else families.build(family, tmp_path)
    shape = shape_of(directory)
    model = piece(shape, 1, torch.float32, torch.device("cpu"))
    assert len(model.model.layers) == 1
    assert all(torch.isfinite(weights).all() for weights in model.parameters())
    speed = Measured(torch.device("cpu"), tmp_path, seconds=0.01)
    one, two = (Batch(tokens, tokens / 2, 16, 4) for tokens in (64, 128))
    for measure in (speed.forward, lambda *a, **k: speed.training(*a, **k, recompute=True)):
        first = measure(shape, one, dtype="float32")
        assert 0 < first < 60
        assert measure(shape, two, dtype="float32") == pytest.approx(2 * first)
    steps = [speed.decoding(shape, number, Batch(0, 0, 8, 3), dtype="bfloat16") for number in (1, 3)]
    assert 0 < steps[1] == pytest.approx(3 * steps[0])
    assert 0 < speed.update(shape) < 60
    assert speed.spent > 0


def test_rates_of_the_table_are_operations_over_what_is_reached(mixtral: Path) -> None:
    shape, sheet = shape_of(mixtral), SHEETS["a100"]
    load = Batch(1000, 400, 50)
    operations = shape.forward_flops(1000, 400, 50)
    assert Rates(sheet).forward(shape, load, dtype="bfloat16") == pytest.approx(operations / (0.45 * 312e12))
    assert Rates(sheet).forward(shape, load, dtype="float32") == pytest.approx(operations / (0.45 * 19.5e12))
    trained = Rates(sheet).training(shape, load, dtype="bfloat16", recompute=True)
    assert trained == pytest.approx(4 * operations / (0.35 * 312e12))


def test_names_of_devices() -> None:
    assert named("8xH100") == (8, "h100")
    assert named("cuda:1") == (1, "cuda:1")
    device = from_table("2x rtx4090")
    assert device is not None
    assert (device.count, device.memory, device.measured) == (2, 24 * 10**9, False)
    assert from_table("cpu") is None


def test_sizes_are_rounded_to_powers_of_two() -> None:
    numbers = {0: 1, 1: 1, 3: 4, 105: 128, 90: 64, 512: 512}
    assert {number: _rounded(number) for number in numbers} == numbers
