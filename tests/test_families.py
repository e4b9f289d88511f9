"""Every family of models as pivot and as source: each learns from the next one, through the whole pipeline."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import families
import runs
from families import FAMILIES
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.models.templates import ChatTemplate
from fusechat.pipeline import build_steps, load_recipe

NAMES = list(FAMILIES)
NEXT = dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
TABLE = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: families.build(name, root / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_learns_from_the_next(built: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = NEXT[name]
    runs.write_conversations(tmp_path / "train.jsonl", 6)
    runs.write_conversations(tmp_path / "held-out.jsonl", 2, first=100)
    recipe = {
        "name": "family",
        "pivot": str(built[name]),
        "sources": {"next": str(built[source])},
        "data": {"train": "train.jsonl", "validation": "held-out.jsonl", "max_length": 256},
        "capture": {"dtype": "float32"},
        "align": {"min_mass": 0.0},  # untrained models are sure of nothing
        "fuse": {"sft_weight": 0.5, "training": {"num_train_epochs": 3, "learning_rate": 1e-2, "save_strategy": "no"}},
        "merge": {"select_topk": 1.0},
        "evaluate": {"answers": 1, "answer_tokens": 4},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    loaded, work = load_recipe(tmp_path / "recipe.yaml"), tmp_path / "work"
    run(loaded, work)
    assert {step.state()[0] for step in build_steps(loaded, work)} == {"done"}
    for role, family in (("pivot", name), ("next", source)):
        counts = json.loads((work / "prepare" / role / "data" / "manifest.json").read_text())["counts"]
        assert counts["conversations"] == 6, counts["rejected"]
        assert "offsets" not in counts, "every span is exact"
        assert counts.get("system_folded", 0) == (2 if FAMILIES[family].folds_system else 0)
        template: ChatTemplate = loaded.chat_model("pivot" if role == "pivot" else "next").template()
        ends = template.tokenizer.convert_tokens_to_ids(FAMILIES[family].added[0])
        assert template.end_of_turn == ends
        for conversation in PreparedSet(work / "prepare" / role / "data"):
            assert (conversation.gold[conversation.end_of_turn] == ends).all()
            assert conversation.end_of_turn.sum() == len(conversation.content_bytes)
    figures = json.loads((work / "align" / "next" / "figures.json").read_text())
    assert figures["coverage_of_positions"] > 0.8
    lines = (work / "fuse" / "next" / "losses.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert losses[-1] < losses[0]
    fused, pivot = (AutoModelForCausalLM.from_pretrained(path) for path in (work / "merge" / "model", built[name]))
    assert type(fused) is type(pivot)
    assert type(fused).__name__.startswith(FAMILIES[name].model)


def test_the_table_of_models_has_every_family() -> None:
    rows = [
        line.split("|")[1].strip() for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    assert set(NAMES) <= set(rows)
