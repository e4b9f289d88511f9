"""Quantised models as sources: loaded as they are stored, captured as they answer; as the pivot they are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.models.load import quantised
from fusechat.pipeline import load_recipe

KINDS = {"4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 bits": {"load_in_8bit": True}}
CLASSES = {"4 bits": "Linear4bit", "8 bits": "Linear8bitLt"}


@pytest.fixture(scope="module")
def stored(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Mistral as it is, and as bitsandbytes stores it, whose blocks of 64 weights need wider layers than the tiny models have."""
    pytest.importorskip("bitsandbytes")
    found = {"full": tmp_path_factory.mktemp("full")}
    shape = AutoConfig.from_pretrained(models["mistral"])
    shape.hidden_size, shape.intermediate_size, shape.head_dim = 128, 256, 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(found["full"])
    AutoTokenizer.from_pretrained(models["mistral"]).save_pretrained(found["full"])
    for kind, options in KINDS.items():
        found[kind] = tmp_path_factory.mktemp("quantised") / "model"
        model = AutoModelForCausalLM.from_pretrained(
            found["full"], quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
        )
        model.save_pretrained(found[kind])
        AutoTokenizer.from_pretrained(models["mistral"]).save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_source_teaches(
    stored: dict[str, Path], models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    recipe = runs.write_recipe(tmp_path, models, sources={"mistral": str(stored[kind])})
    run(load_recipe(recipe), tmp_path / "work", until="fuse")
    assert quantised(stored[kind]) == "bitsandbytes"
    model = AutoModelForCausalLM.from_pretrained(stored[kind], dtype=torch.float32)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == CLASSES[kind]
    plain = AutoModelForCausalLM.from_pretrained(stored["full"])
    captured = open_distributions(tmp_path / "work" / "capture" / "mistral" / "data")
    apart = 0.0
    for one in PreparedSet(tmp_path / "work" / "prepare" / "mistral" / "data"):
        rows, gold = torch.tensor(one.position.tolist()) - 1, torch.tensor(one.gold.tolist())
        with torch.inference_mode():
            own, full = (
                -each(torch.tensor([one.input_ids.tolist()])).logits[0].float().log_softmax(-1)[rows, gold]
                for each in (model, plain)
            )
        assert captured[one.id].nll == pytest.approx(own.numpy(), rel=0.05, abs=0.05)
        apart = max(apart, float((own - full).abs().max()))
    assert apart > 0.05, "what was captured is not what the full weights would say"
    losses = (tmp_path / "work" / "fuse" / "mistral" / "losses.jsonl").read_text().splitlines()
    assert any("fusion_loss" in json.loads(line) for line in losses)


def test_a_quantised_pivot_is_refused_before_any_work(
    stored: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, models, pivot=str(stored["4 bits"]))
    done = runs.here("run", recipe, "--workdir", tmp_path / "work")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"fusechat: error: pivot ({stored['4 bits']}): its weights are quantised (bitsandbytes), which can be neither fine-tuned "
        "nor merged; take the model that they were made from"
    )
    assert not (tmp_path / "work" / "prepare").exists()


def test_a_kind_whose_package_is_missing_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    """GPTQ's package is not among those that the tests install."""
    directory = shutil.copytree(models["mistral"], tmp_path / "gptq")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    recipe = runs.write_recipe(tmp_path, models, sources={"mistral": str(directory)})
    done = runs.here("run", recipe, "--workdir", tmp_path / "work")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"fusechat: error: mistral ({directory}): ")
    assert "gptq" in line.lower()
    assert not (tmp_path / "work" / "prepare").exists(), "told before any work"
