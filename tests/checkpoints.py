"""Model directories to be merged, made in tests: relatives of a tiny model, with tensors, types and shards as wanted."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def read(directory: Path) -> Tensors:
    """All tensors, by name, as they are stored."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def write(directory: Path, tensors: Tensors, like: Path, *, shards: int = 1, **config: Any) -> Path:
    """A model with the files of another and tensors of its own; `config` replaces keys of the configuration, None removes."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.name != INDEX and file.suffix != ".safetensors" and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)
    if config:
        changed = json.loads((like / "config.json").read_text()) | config
        changed = {key: value for key, value in changed.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(changed, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def relative(base: Path, directory: Path, seed: int, *, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """A model whose floats are the base's and a little noise, as fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator) * 0.05
        return (tensor.float() + noise).to(dtype or tensor.dtype)

    return write(directory, {name: moved(tensor) for name, tensor in read(base).items()}, base, **options)


def cast(base: Path, directory: Path, dtype: torch.dtype) -> Path:
    """The same model in another type."""
    return write(directory, {name: tensor.to(dtype) for name, tensor in read(base).items()}, base)


def family(base: Path, root: Path, dtype: torch.dtype = torch.bfloat16, count: int = 3) -> list[Path]:
    """`base` and relatives of it, `one`, `two` and so on, all of a type."""
    first = cast(base, root / "base", dtype)
    names = ("one", "two", "three", "four")[:count]
    return [first, *(relative(first, root / name, seed) for seed, name in enumerate(names, 1))]


def gpt2(tokenizer: Any) -> Any:
    """Layers called `h`, embeddings called `wte`, weights transposed, biases."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=2, n_positions=512))


def mixtral(tokenizer: Any) -> Any:
    """Experts, whose numbers stand in names next to the layers'."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            max_position_embeddings=512,
        )
    )


FURTHER: dict[str, Callable[[Any], Any]] = {"gpt2": gpt2, "mixtral": mixtral}  # architectures that tiny.py has not


def build_further(kind: str, directory: Path, tokenizer: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FURTHER[kind](tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def configuration(
    method: str, models: list[Path], parameters: Mapping[str, Any] | None = None, **keys: Any
) -> dict[str, Any]:
    """Merges all but the first model of the list onto that; a list of a model's own parameters may stand under `own`."""
    base, *targets = map(str, models)
    own = keys.pop("own", [{}] * len(targets))
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model, "parameters": mine} for model, mine in zip(targets, own, strict=True)],
        "parameters": dict(parameters or {}),
        **keys,
    }


def assert_nearest(merged: torch.Tensor, exact: torch.Tensor, what: str = "") -> None:
    """`merged` is the number of its type next to `exact`, float64, give or take what float32 arithmetic is off."""
    slack = 1e-6 * exact.abs() + 1e-7
    low, high = (exact - slack).to(merged.dtype), (exact + slack).to(merged.dtype)
    assert merged.shape == exact.shape, what
    assert bool(((merged >= low) & (merged <= high)).all()), what
