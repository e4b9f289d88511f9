"""Parts of models that are missing, called otherwise, quantised or left by older versions; stacks of layers of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoints import INDEX, Tensors, configuration, gpt2, read, relative, write
from fusechat.errors import ModelError
from fusechat.merge import merge

HEAD, NORM = "lm_head.weight", "model.norm.weight"
FULL = {"weight": 1}


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A base whose embeddings are not tied, and a relative."""
    base = write(tmp_path / "base", read(models["mistral"]), models["mistral"])
    return [base, relative(base, tmp_path / "one", 1)]


def refused(models: list[Path], out: Path, method: str = "task_arithmetic", **keys: Any) -> list[str]:
    """The lines that name what is wrong, without the directory that all is in; nothing is left behind."""
    with pytest.raises(ModelError) as raised:
        merge(configuration(method, models, FULL, **keys), out)
    assert not out.exists()
    assert not list(out.parent.glob(".*merging"))
    return [line.replace(f"{out.parent}/", "") for line in raised.value.messages]


def without(path: Path, *parts: str) -> Path:
    """The same model, robbed of the tensors in whose names a part stands."""
    kept = {name: tensor for name, tensor in read(path).items() if not any(part in name for part in parts)}
    assert len(kept) < len(read(path))
    return write(path.with_name(f"{path.name}-robbed"), kept, path)


# -- what is missing ----------------------------------------------------------------------------------------------------


def test_shards_without_an_index(pair: list[Path], tmp_path: Path) -> None:
    """All of them are the model; one fewer is not, whichever it is, in the base as in a target."""
    merge(configuration("task_arithmetic", pair, FULL), tmp_path / "whole")
    for path in pair:
        parts = write(tmp_path / f"{path.name}-parts", read(path), path, shards=4)
        (parts / INDEX).unlink()
        models = [parts if other == path else other for other in pair]
        merge(configuration("task_arithmetic", models, FULL), tmp_path / f"out-{path.name}")
        whole, found = read(tmp_path / "whole"), read(tmp_path / f"out-{path.name}")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
        for number in (1, 2, 4):
            shard = f"model-{number:05d}-of-00004.safetensors"
            (parts / shard).rename(tmp_path / shard)
            first = f"model-{2 if number == 1 else 1:05d}-of-00004.safetensors"
            assert refused(models, tmp_path / "out") == [f"{parts.name}: has {first}, and neither {shard} nor {INDEX}"]
            (tmp_path / shard).rename(parts / shard)


def test_a_part_that_the_target_should_have_is_not_taken_from_the_base(pair: list[Path], tmp_path: Path) -> None:
    """A tensor of a layer, a layer, the head: the target's class has them, and its file has not."""
    base, one = pair
    for part, expected in {
        "layers.1.mlp.up_proj": ["model.layers.1.mlp.up_proj.weight: is missing from one-robbed, and base has it"],
        "layers.1.": ["model.layers: has 2 layers in base and 1 in one-robbed"],
        "model.norm": [f"{NORM}: is missing from one-robbed, and base has it"],
        "lm_head": [f"{HEAD}: is missing from one-robbed, and base has it"],
    }.items():
        robbed = without(one, part)
        assert refused([base, robbed], tmp_path / "out") == expected
        shutil.rmtree(robbed)
        # and by their names alone, where the class is not known
        if part != "lm_head":
            for path in (base, one):
                write(path, read(path), path, architectures=["Own"])
            assert refused([base, without(one, part)], tmp_path / "out") == expected
            shutil.rmtree(robbed)
            for path in (base, one):
                write(path, read(path), path, architectures=["MistralForCausalLM"])


def test_a_base_with_more_layers_and_one_with_fewer(pair: list[Path], tmp_path: Path) -> None:
    base, one = pair
    tensors = read(base)
    third = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    deeper = write(tmp_path / "deeper", tensors | third, base, num_hidden_layers=3)
    assert refused([deeper, one], tmp_path / "out") == ["model.layers: has 3 layers in deeper and 2 in one"]
    assert refused([one, deeper], tmp_path / "out") == ["model.layers: has 3 layers in deeper and 2 in one"]


def test_what_the_model_is_not_made_of_stays_the_bases(pair: list[Path], tmp_path: Path) -> None:
    """A layer past the last, as models that also predict further tokens have; a module that no target has a part of."""
    base, one = pair
    tensors = read(base)
    last = {name.partition("layers.1.")[2]: tensor for name, tensor in tensors.items() if "layers.1." in name}
    further = {f"model.layers.2.{name}": tensor.clone() for name, tensor in last.items()}
    further["vision.patch.weight"] = torch.ones(3)
    more = write(tmp_path / "more", tensors | further, base)
    report = merge(configuration("task_arithmetic", [more, one], FULL), tmp_path / "out")
    assert set(report["only_in_base"]) == set(further)
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in further.items())


# -- other names --------------------------------------------------------------------------------------------------------


def test_names_that_differ_by_a_prefix_are_one_line(models: dict[str, Path], tokenizers: Any, tmp_path: Path) -> None:
    """As the hub's own gpt2 has them, and what is fine-tuned from it; by the class, and by the names where it is not known."""
    gpt2(tokenizers["llama"]).save_pretrained(tmp_path / "long")
    long = {name: tensor for name, tensor in read(tmp_path / "long").items() if name != HEAD}
    short = {name.removeprefix("transformer."): tensor for name, tensor in long.items()}
    for architecture in ("GPT2LMHeadModel", "Own"):
        base = write(tmp_path / "short", short, tmp_path / "long", architectures=[architecture])
        one = write(tmp_path / "prefixed", long, tmp_path / "long", architectures=[architecture])
        [line] = refused([base, one], tmp_path / "out")
        assert line == (
            "prefixed: calls transformer.h.0.attn.c_attn.bias what short calls h.0.attn.c_attn.bias, "
            f"and so {len(long) - 1} more; save one of them again as the other is"
        )


# -- quantised ----------------------------------------------------------------------------------------------------------


def test_quantised_weights_are_known_by_their_tensors(pair: list[Path], tmp_path: Path) -> None:
    """GPTQ and AWQ, bitsandbytes in 8 and 4 bits, compressed tensors, MLX, and whole numbers in the place of a weight."""
    name = "model.layers.0.mlp.up_proj"
    codes = torch.ones(4, 8, dtype=torch.int32)
    forms: list[tuple[str, Tensors]] = [
        ("qweight", {"qweight": codes, "scales": torch.ones(1, 48)}),
        ("qzeros", {"qzeros": codes, "scales": torch.ones(1, 48)}),
        ("SCB", {"weight": codes.to(torch.int8), "SCB": torch.ones(48)}),
        ("weight.absmax", {"weight.absmax": torch.ones(48)}),
        ("weight_packed", {"weight_packed": codes, "weight_scale": torch.ones(48)}),
        ("weight_scale_inv", {"weight_scale_inv": torch.ones(48), "weight": torch.ones(48, 32)}),
        ("weight", {"weight": codes.to(torch.uint32), "scales": torch.ones(48), "biases": torch.ones(48)}),
    ]
    for shown, tensors in forms:
        rest = {key: tensor for key, tensor in read(pair[0]).items() if not key.startswith(name)}
        changed = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        models = [write(tmp_path / f"q{number}", rest | changed, pair[0]) for number in (1, 2)]
        what = f"its weights are quantised (it has {name}.{shown}) and cannot be merged; dequantise it first"
        expected = [f"q{number}: {what}" for number in (1, 2)]
        assert refused(models, tmp_path / "out", "linear") == expected, shown
    mlx = write(tmp_path / "mlx", read(pair[1]), pair[1], quantization={"bits": 4})
    [line] = refused([pair[0], mlx], tmp_path / "out")
    assert line == "mlx: its weights are quantised and cannot be merged; dequantise it first"


# -- buffers ------------------------------------------------------------------------------------------------------------


def test_buffers_that_the_class_does_not_read_are_left_out(pair: list[Path], tmp_path: Path, heard: list[str]) -> None:
    """In one model only, in both, and not finite, as -1e9 in float16 is: the weights are merged as without them."""
    merge(configuration("task_arithmetic", pair, {"weight": 0.5}), tmp_path / "plain")
    plain = read(tmp_path / "plain")
    forms: list[tuple[str, torch.Tensor]] = [
        ("self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("self_attn.masked_bias", torch.tensor(-1e9).half()),
        ("self_attn.bias", torch.tril(torch.ones(1, 1, 8, 8))),
    ]
    for number, (name, buffer) in enumerate(forms):
        buffers = {f"model.layers.{layer}.{name}": buffer.clone() for layer in range(2)}
        old = [write(tmp_path / f"old-{path.name}", read(path) | buffers, path) for path in pair]
        for place, models in enumerate(([pair[0], old[1]], [old[0], pair[1]], old)):
            out = tmp_path / f"out-{number}-{place}"
            report = merge(configuration("task_arithmetic", models, {"weight": 0.5}), out)
            assert set(report["left_out"]) == set(buffers)
            found = read(out)
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())
            said = "left out are buffers that MistralForCausalLM does not read: " + ", ".join(buffers)
            assert heard == [said]
            heard.clear()


def test_buffers_of_files_without_the_models_prefix(tokenizers: Any, tmp_path: Path, heard: list[str]) -> None:
    """As the hub's own gpt2 is stored: without `transformer.`, its causal masks next to the weights."""
    gpt2(tokenizers["llama"]).save_pretrained(tmp_path / "long")
    short = {
        name.removeprefix("transformer."): tensor for name, tensor in read(tmp_path / "long").items() if name != HEAD
    }
    masks = {f"h.{layer}.attn.bias": torch.tril(torch.ones(1, 1, 8, 8)) for layer in range(2)}
    old = write(tmp_path / "old", short | masks, tmp_path / "long")
    new = write(tmp_path / "new", short, tmp_path / "long")
    for number, pair in enumerate(([old, new], [new, old], [old, old])):
        merge(configuration("linear", pair, {"weight": 0.5}), tmp_path / f"out{number}")
        assert read(tmp_path / f"out{number}").keys() == short.keys()
    assert len(heard) == 3


def test_position_ids_of_an_older_bert(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config.num_attention_heads = 4
    new = tmp_path / "new"
    transformers.BertModel(config).save_pretrained(new)
    old = write(tmp_path / "old", {**read(new), "embeddings.position_ids": torch.arange(512)[None]}, new)
    for models in ([new, old], [old, new]):
        report = merge(
            {**configuration("linear", [new, *models], FULL), "base_model": None}, tmp_path / models[0].name / "x"
        )
        assert report["left_out"] == ["embeddings.position_ids"]


# -- stacks of layers ---------------------------------------------------------------------------------------------------


def test_values_are_spread_over_each_stack_by_itself(tmp_path: Path) -> None:
    """Encoder and decoder of unlike depth: 0, 1 and 0, 1/3, 2/3, 1."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=24, num_layers=2, num_decoder_layers=4, num_heads=2, d_kv=8
    )
    base = tmp_path / "base"
    transformers.T5ForConditionalGeneration(config).save_pretrained(base)
    one = relative(base, tmp_path / "one", 1)
    merge(configuration("task_arithmetic", [base, one], {"weight": [0, 1]}, dtype="float32"), tmp_path / "out")
    found, old, new = read(tmp_path / "out"), read(base), read(one)
    for stack, weights in {"encoder": [0, 1], "decoder": [0, 1 / 3, 2 / 3, 1]}.items():
        for layer, weight in enumerate(weights):
            name = f"{stack}.block.{layer}.layer.0.SelfAttention.q.weight"
            torch.testing.assert_close(found[name], old[name] + weight * (new[name] - old[name]))
    assert json.loads((base / "config.json").read_text())["num_layers"] == 2
