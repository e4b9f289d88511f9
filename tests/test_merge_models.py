"""Whole models merged, of several architectures: values against naive computations, coefficients, the report."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import checkpoints
import naive_merges as naive
import runs
import tiny
from checkpoints import assert_nearest, configuration, read
from fusechat.merge import merge

Families = Callable[[str], list[Path]]
KINDS = (*tiny.KINDS, *checkpoints.FURTHER)
Q, NORM, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def families(models: dict[str, Path], tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A base and three relatives of it in bfloat16, by architecture."""
    root = tmp_path_factory.mktemp("families")
    known: dict[str, list[Path]] = {}

    def find(kind: str) -> list[Path]:
        if kind not in known:
            first = models.get(kind) or checkpoints.build_further(kind, root / "first" / kind, tokenizers["llama"])
            known[kind] = checkpoints.family(first, root / kind)
        return known[kind]

    return find


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_sums_of_every_architecture(families: Families, tmp_path: Path, kind: str) -> None:
    paths = families(kind)
    base, *targets = map(read, paths)
    weights = [0.75, 0.5, -0.25]
    own = [{"weight": weight} for weight in weights]
    merge(configuration("task_arithmetic", paths, {"lambda": 0.5}, own=own), tmp_path / "ta")
    listed = {**configuration("linear", paths, own=own), "base_model": None}
    merge(listed, tmp_path / "linear")
    ta, linear = read(tmp_path / "ta"), read(tmp_path / "linear")
    assert ta.keys() == linear.keys() == base.keys()
    for name, tensor in base.items():
        thetas = [target[name].double() for target in targets]
        sums = sum(weight * theta for weight, theta in zip(weights, thetas, strict=True))
        moved = sum(weight * (theta - tensor.double()) for weight, theta in zip(weights, thetas, strict=True))
        assert linear[name].dtype == ta[name].dtype == torch.bfloat16
        assert_nearest(linear[name], torch.as_tensor(sums), name)
        assert_nearest(ta[name], tensor.double() + 0.5 * moved, name)


def expected(method: str, base: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
    if method == "sce":
        return naive.sce(base, targets, 0.1, naive.shares(naive.squares(base, targets, 0.1)))
    if method == "varm":
        eta = naive.shares(naive.squares(base, targets, 1.0))
        return base.double() + torch.from_numpy(eta @ naive.updates(base, targets)).reshape(base.shape)
    if method == "ties":
        return naive.ties(base, targets, 0.4, [0.5] * 3)
    if method == "slerp":
        return naive.slerp(base, targets[0], 0.3)
    if method == "linear":
        return (base.double() + sum(target.double() for target in targets)) / 4
    total = torch.from_numpy(naive.updates(base, targets).sum(axis=0)).reshape(base.shape)
    return base.double() + (0.5 * total if method == "task_arithmetic" else 0.5 / 3 * total)  # DARE: of density 1


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sce", {"select_topk": 0.1}),
        ("varm", {}),
        ("linear", {"weight": 0.5}),
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.5, "density": 0.4}),
        ("dare_linear", {"weight": 0.5, "normalize": True, "lambda": 0.5}),
        ("dare_ties", {"weight": 0.5, "density": 0.5}),
        ("slerp", {"t": 0.3}),
    ],
)
def test_every_method_from_the_command_line(
    families: Families, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    paths = families("llama")[: 2 if method == "slerp" else 4]
    config = configuration(method, paths, parameters)
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    ended = runs.here("merge", file, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "one" in ended.stdout
    base, *targets = map(read, paths)
    merged = read(tmp_path / "out")
    size = sum(tensor.numel() for tensor in base.values()) * 2 / 1e3
    said = f"{method}: 20 tensors merged, 0 copied; {size * len(paths):.1f} kB read, {size:.1f} kB written in "
    assert said in ended.stdout
    if method == "dare_ties":
        assert (
            merge(config, tmp_path / "again")["tensors"]
            == json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
        )
        assert all(torch.equal(tensor, merged[name]) for name, tensor in read(tmp_path / "again").items())
        return
    for name, tensor in base.items():
        assert_nearest(merged[name], expected(method, tensor, [target[name] for target in targets]), name)


def test_dare_keeps_a_share_scaled_to_the_sum_of_magnitudes(families: Families, tmp_path: Path) -> None:
    paths = families("gemma")[:2]
    report = merge(
        configuration("dare_linear", paths, {"weight": 1, "density": 0.3}, dtype="float32"), tmp_path / "out"
    )
    base, target, merged = read(paths[0]), read(paths[1]), read(tmp_path / "out")
    for name in (EMBEDDING, Q):
        delta = naive.updates(base[name], [target[name]])[0]
        got = (merged[name].double() - base[name].double()).numpy().ravel()
        kept = got != 0
        factor = np.abs(delta).sum() / np.abs(delta[kept]).sum()
        assert np.allclose(got[kept], delta[kept] * factor, rtol=1e-3, atol=1e-6)
        assert report["tensors"][name]["selected"] == pytest.approx(kept.mean(), abs=0.01)  # some updates are zero
        assert abs(kept.mean() - 0.3) < 5 * (0.3 * 0.7 / kept.size) ** 0.5


# -- coefficients -------------------------------------------------------------------------------------------------------


def in_order(by_target: dict[str, float]) -> list[float]:
    return [by_target[name] for name in ("one", "two", "three")]


def group(granularity: str, name: str) -> str:
    """Which tensors are measured together: a layer's, or one outside of the layers by itself."""
    layers = [part for part in ("model.layers.0", "model.layers.1") if name.startswith(part + ".")]
    return {"tensor": name, "layer": layers[0] if layers else name, "model": "model"}[granularity]


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
@pytest.mark.parametrize(("method", "share"), [("sce", 0.2), ("varm", 1.0)])
def test_coefficients_over_a_tensor_a_layer_or_the_model(
    families: Families, tmp_path: Path, method: str, share: float, granularity: str
) -> None:
    paths = families("mixtral")
    parameters = {"granularity": granularity, **({"select_topk": share} if method == "sce" else {})}
    report = merge(configuration(method, paths, parameters, dtype="float32"), tmp_path / "out")
    base, *targets = map(read, paths)
    sums: dict[str, Any] = {}
    for name, tensor in base.items():
        key = group(granularity, name)
        sums[key] = sums.get(key, 0) + naive.squares(tensor, [target[name] for target in targets], share)
    merged = read(tmp_path / "out")
    assert len(sums) == {"tensor": len(base), "layer": 5, "model": 1}[granularity]
    for name, tensor in base.items():
        eta = naive.shares(sums[group(granularity, name)])
        assert in_order(report["tensors"][name]["coefficients"]) == pytest.approx(eta.tolist(), rel=1e-6)
        others = [target[name] for target in targets]
        exact = naive.sce(tensor, others, share, eta)
        if method == "varm":
            exact = tensor.double() + torch.from_numpy(eta @ naive.updates(tensor, others)).reshape(tensor.shape)
        assert torch.allclose(merged[name].double(), exact, rtol=1e-6, atol=1e-7), name


def test_the_report(families: Families, tmp_path: Path) -> None:
    paths = families("llama")
    out = tmp_path / "out"
    report = merge(configuration("sce", paths, {"select_topk": 0.1}, dtype="float32"), out)
    assert report == json.loads((out / "merge_report.json").read_text())
    assert (report["method"], report["granularity"], report["base"]) == ("sce", "tensor", "base")
    assert report["targets"] == ["one", "two", "three"]
    assert (report["left_out"], report["only_in_base"]) == ([], [])
    base, *targets = map(read, paths)
    merged = read(out)
    assert list(report["tensors"]) == sorted(base)
    means = np.zeros(3)
    for name, entry in report["tensors"].items():
        deltas = naive.updates(base[name], [target[name] for target in targets])
        chosen = naive.select(deltas, 0.1)
        kept = deltas[:, chosen]
        signs = naive.exact(kept).sum(axis=0) >= 0
        left = np.where(signs, kept > 0, kept < 0).sum()
        eta = naive.shares((kept**2).sum(axis=1))
        means += eta / len(base)
        assert in_order(entry["coefficients"]) == pytest.approx(eta.tolist(), rel=1e-6)
        assert entry["selected"] == pytest.approx(chosen.mean(), rel=1e-8)
        assert entry["erased"] == pytest.approx(1 - left / np.count_nonzero(kept), rel=1e-8)
        sizes = np.sqrt((deltas**2).mean(axis=1))
        assert in_order(entry["updates"]) == pytest.approx(sizes.tolist(), rel=1e-6)
        moved = (merged[name].double() - base[name].double()).numpy()
        assert entry["merged_update"] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-5)
    assert in_order(report["mean_coefficients"]) == pytest.approx(means.tolist(), rel=1e-6)


# -- parameters that differ -------------------------------------------------------------------------------------------------


def test_lists_over_layers_and_filters_reach_the_tensors(families: Families, tmp_path: Path) -> None:
    base, target = families("llama")[:2]
    weight = [{"filter": "mlp", "value": [0.25, 0.75]}, {"filter": "embed_tokens", "value": 2}, {"value": [1, 0]}]
    merge(configuration("task_arithmetic", [base, target], {"weight": weight}, dtype="float32"), tmp_path / "out")
    merged, old, new = read(tmp_path / "out"), read(base), read(target)
    for name, expected_weight in {
        "model.layers.0.mlp.up_proj.weight": 0.25,
        "model.layers.1.mlp.up_proj.weight": 0.75,
        "model.embed_tokens.weight": 2,
        "model.layers.0.self_attn.k_proj.weight": 1,
        "model.layers.1.self_attn.k_proj.weight": 0,
        "model.norm.weight": 1,
    }.items():
        exact = old[name].double() + expected_weight * (new[name].double() - old[name].double())
        assert torch.allclose(merged[name].double(), exact, atol=1e-6), name


def test_one_output_whatever_the_threads_and_the_shards(families: Families, tmp_path: Path) -> None:
    config = configuration("sce", families("mistral"), {"select_topk": 0.3, "granularity": "layer"})
    merge(config, tmp_path / "1" / "out", threads=1)
    for threads in (2, 3):
        merge(config, tmp_path / str(threads) / "out", threads=threads)
        assert runs.digests(tmp_path / str(threads) / "out") == runs.digests(tmp_path / "1" / "out")
    merge(config, tmp_path / "many", shard_bytes=9000)
    many, one = read(tmp_path / "many"), read(tmp_path / "1" / "out")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


def test_a_base_among_the_models_is_no_target(families: Families, tmp_path: Path) -> None:
    paths = families("gemma")
    merge(configuration("varm", paths), tmp_path / "one")
    config = configuration("varm", paths)
    config["models"].insert(1, {"model": str(paths[0]), "parameters": {}})
    report = merge(config, tmp_path / "two")
    assert report["targets"] == ["one", "two", "three"]
    assert all(torch.equal(tensor, read(tmp_path / "two")[name]) for name, tensor in read(tmp_path / "one").items())


def test_linear_with_a_base_in_the_middle(families: Families, tmp_path: Path) -> None:
    """It is merged as the others are, with its own weight, and gives the files."""
    relatives = families("llama")
    base = checkpoints.write(tmp_path / "base", read(relatives[0]), relatives[0])
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    one, two = relatives[1:3]
    config = configuration(
        "linear", [base, one, base, two], own=[{"weight": w} for w in (0.5, 0.3, 0.2)], dtype="float32"
    )
    report = merge(config, tmp_path / "out")
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    merged = read(tmp_path / "out")
    thetas = [read(path) for path in (one, base, two)]
    for name, tensor in merged.items():
        exact = sum(weight * theta[name].double() for weight, theta in zip((0.5, 0.3, 0.2), thetas, strict=True))
        assert torch.allclose(tensor.double(), torch.as_tensor(exact), atol=1e-6), name
        assert report["tensors"][name]["coefficients"] == {"one": 0.5, "base": 0.3, "two": 0.2}


def test_files_mappings_and_relative_paths(
    families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, one, *_ = families("llama")
    monkeypatch.chdir(base.parent)
    config = configuration("slerp", [Path("base"), Path("./one")], {"t": 0.5})
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    merge(config, tmp_path / "a" / "out")
    merge(tmp_path / "merge.yaml", tmp_path / "b" / "out")
    merge(str(tmp_path / "merge.yaml"), str(tmp_path / "c" / "out"))
    absolute = merge(configuration("slerp", [base, one], {"t": 0.5}), Path("d"))
    assert runs.digests(tmp_path / "a") == runs.digests(tmp_path / "b") == runs.digests(tmp_path / "c")
    assert absolute["tensors"] == json.loads((tmp_path / "a" / "out" / "merge_report.json").read_text())["tensors"]
    assert (base.parent / "d" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "out" / "model.safetensors"
    ).read_bytes()
    log = logging.getLogger("fusechat")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="fusechat"):
        merge(config, tmp_path / "a" / "out")
    assert caplog.messages[-1].startswith(f"{tmp_path / 'a' / 'out'}: is there already, ")
