"""`fusechat plan`: next to a run of the same recipe, on its own, and where something is wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
from fusechat.commands.run import run
from fusechat.data.conversations import DataSet
from fusechat.data.prepared import PreparedSet
from fusechat.models.templates import ChatTemplate
from fusechat.pipeline import build_steps, load_recipe
from fusechat.plan.sampling import count, padded, read_texts

TARGETS = {"both": ["mistral", "gemma"], "sft": []}


@pytest.fixture(scope="module")
def place(finished: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, its finished run `work`, and `plan.json` of before."""
    directory = tmp_path_factory.mktemp("plan")
    recipe = runs.write_recipe(directory, models, targets=TARGETS)
    shown = runs.here("plan", recipe, "--workdir", directory / "work", "--json")
    assert shown.returncode == 0, shown.stderr
    (directory / "plan.json").write_text(shown.stdout)
    assert not (directory / "work").exists()
    shutil.copytree(finished / "work", directory / "work")
    run(load_recipe(recipe), directory / "work")
    return directory


@pytest.fixture
def plan(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "plan.json").read_text()))


def manifests(place: Path) -> dict[str, dict[str, Any]]:
    return {
        step.label: step.manifest() or {} for step in build_steps(load_recipe(place / "recipe.yaml"), place / "work")
    }


def test_a_plan_has_the_steps_of_the_run(place: Path, plan: dict[str, Any]) -> None:
    assert [f"{step['stage']} {step['name']}".strip() for step in plan["steps"]] == list(manifests(place))
    assert plan["problems"] == []


def test_tokens_and_training_steps_are_those_of_the_run(place: Path, plan: dict[str, Any]) -> None:
    done = manifests(place)
    for step in plan["steps"]:
        counts = done[f"{step['stage']} {step['name']}".strip()]["counts"]
        if step["stage"] == "prepare" and step["name"] != "overlap":
            for key in ("conversations", "tokens", "response_tokens"):
                assert step[key] == counts[key], step["name"]
        elif step["stage"] == "capture":
            assert step["response_tokens"] == counts["positions"]
        elif step["stage"] == "fuse":
            assert (step["details"]["steps"], step["conversations"]) == (counts["steps"], counts["conversations"])


def test_disk_is_what_the_run_writes(place: Path, plan: dict[str, Any]) -> None:
    """To a tenth wherever it is more than manifests and the like."""
    for step in plan["steps"]:
        label = f"{step['stage']} {step['name']}".strip()
        manifest = manifests(place)[label]
        written = sum(one["bytes"] for one in manifest["outputs"].values())
        written += len(json.dumps(manifest, indent=1, sort_keys=True))
        if step["stage"] in ("prepare", "fuse", "merge", "report"):
            assert step["disk"] == pytest.approx(written, rel=0.1), label
        assert 0.5 * written < step["disk"] < 2 * written, label


def test_every_figure_is_there(plan: dict[str, Any]) -> None:
    for step in plan["steps"]:
        assert step["seconds"] >= 0
        assert step["memory"] > 0
        assert step["disk"] > 0
        if step["stage"] in ("capture", "fuse", "merge"):
            assert step["flops"] > 0
    fused = [step for step in plan["steps"] if step["stage"] == "fuse"]
    assert all(step["room"] > 0 for step in fused)  # checkpoints
    every = plan["totals"]
    assert every["disk"] == pytest.approx(sum(step["disk"] for step in plan["steps"]), abs=len(plan["steps"]))
    stays, fullest = 0, 0
    for step in plan["steps"]:
        stays += step["disk"]
        fullest = max(fullest, stays + step["room"])
    assert every["fullest"] == pytest.approx(fullest, abs=len(plan["steps"]))
    assert plan["device"]["measured"] is True


def test_no_weights_are_read_and_the_work_directory_is_not_begun(
    models: dict[str, Path], tmp_path: Path, place: Path, plan: dict[str, Any]
) -> None:
    """Models whose weights cannot be read, on a device of the table: the same tokens and bytes."""
    copies = {}
    for kind, directory in models.items():
        copies[kind] = shutil.copytree(directory, tmp_path / kind)
        for file in copies[kind].glob("*.safetensors"):
            file.write_bytes(b"\0" * file.stat().st_size)
    recipe = runs.write_recipe(tmp_path, copies, targets=TARGETS)
    shown = runs.here("plan", recipe, "--device", "2xa100", "--workdir", tmp_path / "work", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert not (tmp_path / "work").exists()
    assert found["device"] == {"name": "a100", "count": 2, "memory": 80 * 10**9, "measured": False}
    for ours, theirs in zip(found["steps"], plan["steps"], strict=True):
        assert (ours["name"], ours["tokens"]) == (theirs["name"], theirs["tokens"])
        assert ours["disk"] == pytest.approx(theirs["disk"], rel=0.01)
    assert {step["devices"] for step in found["steps"] if step["stage"] == "fuse"} == {2}


def test_more_of_the_same_conversations(place: Path, plan: dict[str, Any]) -> None:
    """Training sets count as often, held-out ones as before. The sets have 10 and 8 conversations."""
    shown = runs.here("plan", place / "recipe.yaml", "--device", "h100", "--conversations", "1800", "--json")
    for ours, before in zip(json.loads(shown.stdout)["steps"], plan["steps"], strict=True):
        times = 1 if ours["stage"] == "evaluate" or "held-out" in ours["name"] else 100
        assert ours["tokens"] == pytest.approx(times * before["tokens"])
        if ours["stage"] == "fuse":  # two epochs of batches of two, twice accumulated
            assert ours["details"]["steps"] == pytest.approx(2 * ours["conversations"] / 4)


def test_weights_and_limits_of_training_sets(place: Path) -> None:
    """Ten conversations twice, four of eight half: 22 in an epoch, in 6 steps of 4, two epochs."""
    sets = "[{path: train.jsonl, weight: 2}, {path: own.jsonl, weight: 0.5, limit: 4}]"
    shown = runs.here("plan", place / "recipe.yaml", "--device", "h100", "--set", f"data.train={sets}", "--json")
    steps = {step["name"]: step for step in json.loads(shown.stdout)["steps"] if step["stage"] in ("prepare", "fuse")}
    assert steps["mistral"]["conversations"] == 22
    assert steps["mistral"]["details"]["steps"] == 12
    assert steps["pivot/own"]["conversations"] == 4
    tokens = [steps[f"pivot/{name}"]["tokens"] for name in ("train", "own")]
    assert steps["mistral"]["tokens"] == 2 * tokens[0] + 0.5 * tokens[1]


def test_padding_is_told(place: Path) -> None:
    """Of conversations of one and two turns, together; not where those of like lengths are."""
    options = (
        "plan",
        place / "recipe.yaml",
        "--device",
        "h100",
        "--set",
        "fuse.training.per_device_train_batch_size=8",
    )
    told = re.search(
        r"note: fuse: (\d+)\.\d+% of the tokens in random batches of 8 conversations are padding",
        runs.here(*options).stdout,
    )
    assert told is not None
    assert 20 <= int(told[1]) <= 35
    grouped = runs.here(*options, "--set", "fuse.training.train_sampling_strategy=group_by_length")
    assert "padding" not in grouped.stdout


@pytest.mark.parametrize(
    ("strategy", "steps", "times"), [("epoch", 9, 2), ("steps", 2, 3), ("steps", 0.3, 3), ("no", 2, 0)]
)
def test_checkpoints_by_steps_by_a_share_of_them_and_by_epoch(
    place: Path, strategy: str, steps: float, times: int
) -> None:
    """Ten conversations, 3 steps an epoch, two epochs; a share of 0.3 is rounded up to every second step."""
    settings = (
        f"{{save_strategy: '{strategy}', save_steps: {steps}, num_train_epochs: 2, per_device_train_batch_size: 4}}"
    )
    shown = runs.here("plan", place / "recipe.yaml", "--device", "h100", "--set", f"fuse.training={settings}", "--json")
    fused = next(step for step in json.loads(shown.stdout)["steps"] if step["stage"] == "fuse")
    assert fused["details"]["steps"] == 6
    assert fused["details"]["checkpoints"] == times


def test_overlap_is_told(place: Path, tmp_path: Path) -> None:
    held_out = place / "held-out.jsonl"
    options = ("--device", "h100", "--set", f"data.train={held_out}")
    shown = runs.here("plan", place / "recipe.yaml", *options)
    assert shown.returncode == 0
    assert "note: 5 of 5 conversations of data-held-out are in the training data (5 same conversation)" in shown.stdout
    shown = runs.here("plan", place / "recipe.yaml", *options, "--set", "data.on_overlap=stop")
    assert shown.returncode == 2
    assert "error: 5 of 5 conversations of data-held-out are in the training data" in shown.stderr


def test_the_table(place: Path) -> None:
    shown = runs.here("plan", place / "recipe.yaml", "--device", "8xh100", "--by-stage").stdout
    assert "tiny on 8 × h100 (by its data sheet, not measured)" in shown
    for stage in ("prepare", "capture", "align", "fuse", "merge", "evaluate", "report", "all"):
        assert re.search(rf"^ *{stage}\b", shown, flags=re.MULTILINE), stage
    assert "licence not stated" in shown


def test_a_sample_stands_for_the_whole(models: dict[str, Path], tokenizers: dict[str, Any], tmp_path: Path) -> None:
    data = DataSet("data", str(runs.write_conversations(tmp_path / "many.jsonl", 400)))
    template = ChatTemplate(tokenizers["llama"], None, "llama")
    whole = count(read_texts(data), template, max_length=256)
    texts = read_texts(data, sample=100)
    assert len(texts.sample) == 100
    assert texts == read_texts(data, sample=100)
    assert len({one.id for one in texts.sample}) == 100
    part = count(texts, template, max_length=256)
    assert part.conversations == whole.conversations == 400
    assert part.scale == 4
    for key in ("tokens", "response_tokens", "responses", "bytes"):
        assert getattr(part, key) == pytest.approx(getattr(whole, key), rel=0.1), key
        assert getattr(part, key) != getattr(whole, key)


def test_padding_of_random_batches_by_hand() -> None:
    """Of lengths 1 and 3, batches of two have 1+1, 1+3, 3+1, 3+3 tokens, and 2, 6, 6, 6 with padding."""
    assert padded(np.array([1, 3]), 2, draws=100_000) == pytest.approx(20 / 16, rel=0.01)
    assert padded(np.array([5, 5]), 4) == 1.0
    assert padded(np.array([5, 9]), 1) == 1.0
    assert padded(np.array([], dtype=np.int64), 3) == 1.0


def test_prepared_bytes_are_those_of_the_file(place: Path, plan: dict[str, Any]) -> None:
    step = next(step for step in plan["steps"] if step["name"] == "pivot/data")
    written = (place / "work" / "prepare" / "pivot" / "data" / "conversations.arrow").stat().st_size
    assert 0 < step["disk"] - written < 2000
    assert len(PreparedSet(place / "work" / "prepare" / "pivot" / "data")) == step["conversations"]
