"""The merge section of a recipe: what it may say, what is refused, and what becomes of a finished run's targets by each method."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import naive_merges as naive
import runs
from checkpoints import assert_nearest, read
from fusechat.commands.run import run
from fusechat.errors import RecipeError
from fusechat.merge.merge_file import read_merge_file
from fusechat.merge.settings import configuration
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.load import save_recipe
from fusechat.recipe.schema import Recipe

METHODS = "dare_linear, dare_ties, linear, sce, slerp, task_arithmetic, ties, varm"
Q, MLP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


def write(directory: Path, section: Any, sources: tuple[str, ...] = ("math", "code")) -> Path:
    """A recipe whose merge section begins in its second line."""
    rest = {
        "name": "tiny",
        "pivot": "org/pivot",
        "sources": {name: f"org/{name}" for name in sources},
        "data": {"train": "train.jsonl"},
    }
    merge = {} if section is None else {"merge": section}
    path = directory / "recipe.yaml"
    path.write_text("# a recipe\n" + yaml.safe_dump({**merge, **rest}, sort_keys=False))
    return path


def load(directory: Path, section: Any, **options: Any) -> Recipe:
    return load_recipe(write(directory, section, **options))


def values(recipe: Recipe, tensor: str = Q) -> dict[str, Any]:
    """What the method is told of a tensor of a model of two layers."""
    places = {name: Path(f"org/{name}") for name in recipe.sources}
    given = recipe.merge.parameters()
    config = configuration(recipe.merge.method, given, pivot=Path("org/pivot"), targets=places, seed=recipe.seed)
    return read_merge_file(config).values(tensor, 2)


# -- what it may say ----------------------------------------------------------------------------------------------------

TASK = {"normalize": False, "lambda": 1}
TIES = {"density": [1, 1], "normalize": True, "rescale": False, "lambda": 1}
DARE = {"density": [1, 1], "normalize": False, "rescale": True, "lambda": 1, "seed": 0}
SCE = {"select_topk": 1.0, "select_deltas": True, "normalize": True}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, SCE),
        ({}, SCE),
        ({"method": "sce"}, SCE),
        ({"dtype": "bfloat16"}, SCE),
        ({"select_topk": None}, SCE),
        (
            {"select_topk": 1.0, "select_deltas": False, "normalize": False},
            dict.fromkeys(SCE, False) | {"select_topk": 1},
        ),
        ({"method": "sce", "select_topk": [0.2, 0.6]}, SCE | {"select_topk": 0.6}),
        ({"method": "linear"}, {"weight": [1, 1], "normalize": True}),
        ({"method": "linear", "weight": 3, "normalize": False}, {"weight": [3, 3], "normalize": False}),
        ({"method": "linear", "weight": {"code": 0.2, "math": "7e-1"}}, {"weight": [0.7, 0.2], "normalize": True}),
        ({"method": "varm"}, {}),
        ({"method": "task_arithmetic", "weight": 0.5}, {"weight": [0.5, 0.5], **TASK}),
        ({"method": "task_arithmetic", "weight": 1, "lambda": 0.3}, {"weight": [1, 1], **TASK, "lambda": 0.3}),
        ({"method": "ties", "weight": 1}, {"weight": [1, 1], **TIES}),
        (
            {"method": "ties", "weight": 1, "density": {"code": 0.2}, "rescale": True, "normalize": False},
            {"weight": [1, 1], **TIES, "density": [1, 0.2], "rescale": True, "normalize": False},
        ),
        (
            {"method": "ties", "weight": {"math": [0, 1], "code": [{"filter": "mlp", "value": 5}, {"value": 4}]}},
            {"weight": [1, 4], **TIES},
        ),
        ({"method": "ties", "weight": {"value": 2, "filter": "self_attn"}}, {"weight": [2, 2], **TIES}),
        ({"method": "dare_linear", "weight": 1}, {"weight": [1, 1], **DARE}),
        ({"method": "dare_ties", "weight": 1, "density": 0.25}, {"weight": [1, 1], **DARE, "density": [0.25, 0.25]}),
    ],
)
def test_values_for_all_targets_by_target_and_by_default(
    tmp_path: Path, section: Any, expected: dict[str, Any]
) -> None:
    recipe = load(tmp_path, section)
    assert values(recipe) == expected
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert values(load_recipe(tmp_path / "saved.yaml")) == expected
    assert "lambda_" not in (tmp_path / "saved.yaml").read_text()


def test_slerp_takes_one_target(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, {"method": "slerp", "t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}, sources=("math",)
    )
    assert (values(recipe), values(recipe, MLP)) == ({"t": 0.5}, {"t": 0})


def test_the_recipes_seed_is_dares(tmp_path: Path) -> None:
    path = write(tmp_path, {"method": "dare_ties", "weight": 1})
    assert values(load_recipe(path, ["seed=7"]))["seed"] == 7


def test_granularity(tmp_path: Path) -> None:
    for method in ("sce", "varm"):
        for granularity in ("tensor", "layer", "model"):
            recipe = load(tmp_path, {"method": method, "granularity": granularity})
            config = configuration(
                method, recipe.merge.parameters(), pivot=Path("org/p"), targets={"a": Path("org/a")}, seed=0
            )
            assert read_merge_file(config).granularity == granularity


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"method": "scee"}, [f"3: merge.method: no such method as 'scee'; did you mean sce?; there are {METHODS}"]),
        ({"method": "nuslerp"}, [f"3: merge.method: no such method as 'nuslerp'; did you mean slerp?; there are {METHODS}"]),
        ({"method": "zzz"}, [f"3: merge.method: no such method as 'zzz'; there are {METHODS}"]),
        ({"method": ["sce"]}, ["3: merge.method: Input should be a valid string"]),
        ({"metod": "sce"}, ["3: merge.metod: unknown key; did you mean method?"]),
        ({"lambda_": 1}, ["3: merge.lambda_: unknown key; did you mean lambda?"]),
        ({"method": "dare_ties", "weight": 1, "seed": 3}, ["5: merge.seed: unknown key; known here: method, targets, granularity, "
          "select_topk, select_deltas, normalize, weight, density, rescale, lambda, t, dtype"]),
        ({"granularity": "block"}, ["3: merge.granularity: Input should be 'tensor', 'layer' or 'model', not 'block'"]),
        ({"dtype": "int8"}, ["3: merge.dtype: Input should be 'float32', 'bfloat16' or 'float16', not 'int8'"]),
        ({"method": "linear", "select_topk": 0.5}, ["4: merge.select_topk: is not read by linear"]),
        ({"weight": 1}, ["3: merge.weight: is not read by sce"]),
        ({"method": "varm", "select_topk": 1, "normalize": True}, ["4: merge.select_topk: is not read by varm",
          "5: merge.normalize: is not read by varm"]),
        ({"method": "ties", "weight": 1, "granularity": "layer"}, ["5: merge.granularity: is not read by ties"]),
        ({"method": "linear", "lambda": 2}, ["4: merge.lambda: is not read by linear"]),
        ({"method": "linear", "t": 0.5}, ["4: merge.t: is not read by linear"]),
        ({"method": "ties"}, ["2: merge.weight: is missing: ties has no default for it"]),
        ({"method": "slerp", "t": 0.5}, ["3: merge.method: slerp takes 1 target, and the recipe has 2 sources"]),
        ({"method": "slerp", "t": 1.5, "weight": 1}, ["5: merge.weight: is not read by slerp",
          "3: merge.method: slerp takes 1 target, and the recipe has 2 sources",
          "4: merge.t: should be between 0 and 1, not 1.5"]),
        ({"select_topk": -0.1}, ["3: merge.select_topk: should be at least 0, not -0.1"]),
        ({"select_topk": {"math": 0.1}}, ["4: merge.select_topk.math: unknown key; known here: value, filter",
          "3: merge.select_topk.value: is missing"]),
        ({"select_deltas": "maybe"}, ["3: merge.select_deltas: should be true or false, not 'maybe'"]),
        ({"method": "ties", "weight": "much"}, ["4: merge.weight: should be a number, not 'much'"]),
        ({"method": "ties", "weight": 1, "density": 2}, ["5: merge.density: should be between 0 and 1, not 2"]),
        ({"method": "ties", "weight": {"math": 1, "cods": 2}}, ["6: merge.weight.cods: no such source; there are math, code",
          "4: merge.weight: names no value for code"]),
        ({"method": "ties", "weight": {"math": 1, "code": [1, "x"]}}, ["8: merge.weight.code.1: should be a number, not 'x'"]),
        ({"method": "ties", "weight": 1, "density": {"code": [{"filter": 3, "value": 1}]}},
         ["7: merge.density.code.0.filter: should be a part of a tensor's name, not 3"]),
        ({"method": "linear", "weight": 0}, ["4: merge.weight: add up to zero, and normalize divides by their sum"]),
        ({"method": "linear", "weight": {"math": 1, "code": -1}},
         ["4: merge.weight: add up to zero, and normalize divides by their sum"]),
        ({"method": "task_arithmetic", "weight": 1, "lambda": []}, ["5: merge.lambda: is an empty list"]),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_its_line(tmp_path: Path, section: Any, expected: list[str]) -> None:
    path = write(tmp_path, section)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert [message.removeprefix(f"{path}:") for message in raised.value.messages] == expected


# -- what becomes of it --------------------------------------------------------------------------------------------------


def merged(finished: Path, directory: Path, *changes: str, **section: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The fused model's tensors and report by another merge section; everything before is as it was."""
    work = directory / "work"
    shutil.copytree(finished / "work", work)
    before = runs.digests(work / "fuse")
    recipe = load_recipe(finished / "recipe.yaml", [*changes, f"merge={json.dumps(section)}"])
    searched = any(change.startswith("sources") for change in changes)  # evaluation texts, in other training sets
    assert run(recipe, work, until="merge") == 1 + searched
    assert runs.digests(work / "fuse") == before
    return read(work / "merge" / "model"), json.loads((work / "merge" / "merge_report.json").read_text())


def targets_of(finished: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The pivot's tensors, and those of the targets by mistral and gemma."""
    pivot = yaml.safe_load((finished / "recipe.yaml").read_text())["pivot"]
    return read(Path(pivot)), [read(finished / "work" / "fuse" / name / "model") for name in runs.SOURCES]


def average(weights: list[float], thetas: list[torch.Tensor]) -> torch.Tensor:
    total = sum(weight * theta.double() for weight, theta in zip(weights, thetas, strict=True))
    return torch.as_tensor(total) / sum(weights)


@pytest.mark.parametrize(
    "section",
    [
        {"method": "sce", "select_topk": 0.2},
        {"method": "sce", "select_topk": 0.2, "granularity": "model"},
        {"method": "varm"},
        {"method": "linear"},
        {"method": "linear", "weight": {"gemma": 1, "mistral": 3}},
        {"method": "task_arithmetic", "weight": 0.5, "lambda": 0.5},
        {"method": "ties", "weight": {"gemma": 1, "mistral": 3}, "density": 0.4},
        {"method": "dare_linear", "weight": 1, "density": 1},
        {"method": "dare_ties", "weight": 1, "density": 0.5, "lambda": 0.7},
    ],
    ids=str,
)
def test_every_method_on_a_runs_targets(finished: Path, tmp_path: Path, section: dict[str, Any]) -> None:
    found, report = merged(finished, tmp_path, **section)
    pivot, targets = targets_of(finished)
    assert found.keys() == pivot.keys()
    assert report["targets"] == list(runs.SOURCES)
    weights = {"weight": [3, 1]} if isinstance(section.get("weight"), dict) else {"weight": [1, 1]}
    sums = {
        name: naive.squares(pivot[name], [t[name] for t in targets], section.get("select_topk", 1)) for name in pivot
    }
    if section.get("granularity") == "model":
        sums = dict.fromkeys(sums, sum(sums.values()))
    for name in (Q, MLP, "model.norm.weight"):
        base, thetas = pivot[name], [target[name] for target in targets]
        total = torch.from_numpy(naive.updates(base, thetas).sum(axis=0)).reshape(base.shape)
        if section["method"] == "dare_ties":  # a random part of the updates
            assert not torch.equal(found[name], base)
            continue
        exact = {
            "sce": lambda b=base, t=thetas, n=name: naive.sce(b, t, 0.2, naive.shares(sums[n])),
            "varm": lambda t=thetas, n=name: average(naive.shares(sums[n]).tolist(), t),
            "linear": lambda t=thetas: average(weights["weight"], t),
            "task_arithmetic": lambda b=base, d=total: b.double() + 0.25 * d,
            "ties": lambda b=base, t=thetas: naive.ties(b, t, 0.4, weights["weight"]),
            "dare_linear": lambda b=base, d=total: b.double() + d,
        }[section["method"]]()
        assert torch.allclose(found[name].double(), exact, rtol=1e-6, atol=1e-6), name


def test_slerp_towards_the_only_target(finished: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    found, report = merged(finished, tmp_path, f"sources={{mistral: {models['mistral']}}}", method="slerp", t=0.3)
    pivot, (mistral, _) = targets_of(finished)
    assert report["targets"] == ["mistral"]
    for name in (Q, MLP):
        assert np.allclose(found[name].double(), naive.slerp(pivot[name], mistral[name], 0.3), rtol=1e-5, atol=1e-6)


def test_the_type_is_the_pivots_or_the_one_that_is_asked_for(finished: Path, tmp_path: Path) -> None:
    pivot, targets = targets_of(finished)
    assert {tensor.dtype for tensor in pivot.values()} == {torch.float32}
    for dtype in (torch.float32, torch.bfloat16):
        keys = {} if dtype == torch.float32 else {"dtype": "bfloat16"}
        found, _ = merged(finished, tmp_path / str(dtype), method="linear", **keys)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        assert_nearest(found[Q], average([1, 1], [target[Q] for target in targets]))
        config = json.loads((tmp_path / str(dtype) / "work" / "merge" / "model" / "config.json").read_text())
        assert f"torch.{config['dtype']}" == str(dtype)


def test_another_merge_redoes_merging_evaluation_and_report_only(finished: Path, copied: Path) -> None:
    work = copied / "work"
    before = runs.digests(work)
    for section in ({"method": "varm"}, {"method": "task_arithmetic", "weight": 1, "lambda": 0.5}):
        changes = [f"merge={json.dumps(section)}"]
        recipe = load_recipe(finished / "recipe.yaml", changes)
        stale = {step.label for step in build_steps(recipe, work) if step.state()[0] != "done"}
        assert stale == {"merge", "evaluate fused", "evaluate answers fused", "evaluate results", "report"}
    assert run(recipe, work) == 5
    after = runs.digests(work)
    changed = {name.split("/")[0] for name in before if before[name] != after.get(name)}
    assert changed == {"merge", "evaluate", "report", "recipe.yaml"}
    assert "task_arithmetic" in (work / "merge" / "model" / "README.md").read_text()
    assert run(load_recipe(work / "recipe.yaml"), work) == 0, "the saved recipe is the same"
    for change in (
        "merge.lambda=0.4",
        "merge.weight={mistral: 1, gemma: 2}",
        "merge.normalize=true",
        "merge.dtype=float16",
    ):
        steps = build_steps(load_recipe(work / "recipe.yaml", [change]), work)
        assert "merge" in {step.label for step in steps if step.state()[0] == "stale"}, change
