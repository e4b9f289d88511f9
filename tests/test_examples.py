"""The recipes in `examples/`: each loads, and the laptop's runs as it is written on its families in small, from a hub's cache."""

import json
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from transformers import AutoModelForCausalLM

import families
import runs
from fusechat.commands.run import run
from fusechat.data.conversations import DataSet
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.load import save_recipe
from fusechat.recipe.pinned import pin
from fusechat.recipe.schema import PIVOT
from test_references import hub_repository

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
LAPTOP = Path(__file__).parents[1] / "examples" / "laptop.yaml"
MODELS = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": "SmolLM2",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen2.5",
    "h2oai/h2o-danube3-500m-chat": "H2O-Danube3",
}
CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_recipe(example: Path, tmp_path: Path) -> None:
    """Every key is known; hub ids are well-formed, files are there; what a run writes down is the same recipe."""
    recipe = load_recipe(example)
    assert recipe.name == example.stem
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    for name in (PIVOT, *recipe.sources):
        assert recipe.chat_model(name).reference.check() is None
    local = [data for data in recipe.validation_sets() if Path(data.path).is_absolute()]
    assert all(data.local().is_file() for data in local)
    assert recipe.fuse.training["per_device_train_batch_size"]


def test_the_laptops_recipe_on_its_families_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hub ids are those of a cache with small models of random weights, and of conversations in the layout of its data set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for number, (identity, family) in enumerate(MODELS.items()):
        files = list(families.build(family, tmp_path / family).iterdir())
        hub_repository(tmp_path, f"models--{identity.replace('/', '--')}", files, {"main": f"{number}" * 40})
    snapshot = hub_repository(tmp_path, "datasets--trl-lib--Capybara", [], {"main": "d" * 40})["main"]
    (snapshot / "README.md").write_text(CARD)
    (snapshot / "data").mkdir()
    for split, count, first in (("train", 9, 0), ("test", 5, 100)):
        lines = runs.write_conversations(tmp_path / split, count, first).read_text(encoding="utf-8").splitlines()
        rows = [{"source": "tests", **json.loads(line), "num_turns": 1} for line in lines]
        parquet.write_table(pa.Table.from_pylist(rows), snapshot / "data" / f"{split}-00000-of-00001.parquet")
    written = yaml.safe_load(LAPTOP.read_text())
    assert set(MODELS) == {written["pivot"], *written["sources"].values()}
    # As a laptop would set them for less time; everything else is as it is written.
    recipe = load_recipe(
        LAPTOP, ["data.train.limit=7", "data.validation.limit=3", "evaluate.answers=1", "evaluate.answer_tokens=4"]
    )
    run(recipe, tmp_path / "work")
    states = {step.label: step.state() for step in build_steps(pin(recipe, tmp_path / "work"), tmp_path / "work")}
    assert {state for state, _ in states.values()} == {"done"}, states
    for data, count in (("data", 7), ("data-held-out", 3)):
        for name in (PIVOT, "qwen", "danube"):
            manifest = json.loads((tmp_path / "work" / "prepare" / name / data / "manifest.json").read_text())
            assert (manifest["counts"]["conversations"], manifest["counts"]["rejected"]) == (count, {})
    held_out = DataSet("data-held-out", "trl-lib/Capybara", split="test", limit=3)
    assert held_out.identity() == f"hub:trl-lib/Capybara@{'d' * 40} split=test limit=3"
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "merge" / "model")
    assert type(fused).__name__ == "LlamaForCausalLM"
