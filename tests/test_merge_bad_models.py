"""Models that cannot be merged, hostile ones among them: a line that names what is wrong, status 2, and no model left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cases import each
from checkpoints import configuration, read, relative, write
from fusechat.merge import merge
from test_bad_input import complaints

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
Change = Callable[[Path], Any]


def trio_in(directory: Path, models: dict[str, Path]) -> list[Path]:
    """A base whose embeddings are not tied, and two relatives: `one`, which tests spoil, and `two`."""
    base = write(directory / "base", read(models["mistral"]), models["mistral"])
    return [base, relative(base, directory / "one", 1), relative(base, directory / "two", 2)]


@pytest.fixture
def trio(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    return trio_in(tmp_path, models)


def refused(models: list[Path], *options: str, method: str = "sce", **keys: Any) -> list[str]:
    """What the command line complains of; paths without the directory that all models are in."""
    root = models[0].parent
    file = root / "merge.yaml"
    file.write_text(yaml.safe_dump(configuration(method, models, **keys)))
    before = {path: path.stat().st_mtime_ns for model in models for path in model.rglob("*") if path.exists()}
    found = complaints("merge", file, root / "out", *options)
    assert not (root / "out").exists()
    assert not list(root.rglob(".out.merging/config.json")), "what is left does not look whole"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return [line.replace(f"{root}/", "") for line in found]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Change:
    def spoil(directory: Path) -> None:
        found = read(directory)
        change(found)
        write(directory, found, directory, **config)

    return spoil


def put(name: str, value: torch.Tensor) -> Change:
    return tensors(lambda found: found.update({name: value}))


def resized(rows: int, size: int | None = None) -> Change:
    """Embeddings of so many rows in a model that says that it has `size` tokens."""

    def change(found: dict[str, torch.Tensor]) -> None:
        found.update({name: found[name][:rows].clone() for name in (EMBEDDING, HEAD)})

    return tensors(change, vocab_size=size or rows)


# -- values and shapes --------------------------------------------------------------------------------------------------


@each("value, dtype", zip(NOT_FINITE, (torch.float32, torch.bfloat16, torch.float16), strict=True))
def test_values_that_are_not_finite(models: dict[str, Path], tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    trio = trio_in(tmp_path, models)
    for path in trio:
        norm = torch.ones(32, dtype=dtype)
        norm[17] = value if path.name == "two" else 1
        put(NORM, norm)(path)
    assert refused(trio) == [f"{NORM}: holds values that are not finite in two (element 17)"]
    shutil.rmtree(trio[2])
    shutil.copytree(trio[1], trio[2])
    put("score.weight", torch.tensor([1.0, value]))(trio[0])
    assert refused(trio) == ["score.weight: holds values that are not finite in base (element 1)"], (
        "nothing to merge it with"
    )
    tensors(lambda found: (found.pop("score.weight"), found[EMBEDDING][-1, -1].fill_(value)))(trio[0])
    last = read(trio[0])[EMBEDDING].numel() - 1
    assert refused(trio, method="linear", parameters={"weight": 1}) == [
        f"{EMBEDDING}: holds values that are not finite in base (element {last})"
    ]


QUANTISED = "its weights are quantised{} and cannot be merged; dequantise it first"
UP = "model.layers.0.mlp.up_proj.weight"
MISFITS: list[tuple[Change, str]] = [
    (tensors(lambda t: t.pop(NORM)), f"{NORM}: is missing from one, and base has it"),
    (put("more.weight", torch.ones(2)), "more.weight: is missing from base, two, and one has it"),
    (put(NORM, torch.ones(5)), f"{NORM}: is [32] in base and [5] in one"),
    (put(NORM, torch.ones(1, 32)), f"{NORM}: is [32] in base and [1, 32] in one"),
    (put(NORM, torch.tensor(1.0)), f"{NORM}: is [32] in base and [] in one"),
    (put(UP, torch.ones(32, 48)), f"{UP}: is [48, 32] in base and [32, 48] in one"),
    (put(NORM, torch.ones(32).long()), f"{NORM}: is a buffer of whole numbers in one model, and of floats in another"),
    (tensors(len, quantization_config={"quant_method": "gptq", "bits": 4}), f"one: {QUANTISED.format(' (gptq)')}"),
    (tensors(len, quantization_config={"load_in_4bit": True}), f"one: {QUANTISED.format('')}"),
    (put(NORM, torch.ones(32).double()), f"{NORM}: is stored as F64 in one; convert that model first"),
    (put(NORM, torch.ones(32).to(torch.float8_e4m3fn)), f"{NORM}: is stored as F8_E4M3 in one; convert that model first"),
    (put(NORM, torch.ones(32).cfloat()), f"{NORM}: is stored as C64 in one; convert that model first"),
    (tensors(lambda t: t.clear()), "one: holds no tensors"),
]  # fmt: skip


@each("change, expected", MISFITS)
def test_models_that_do_not_fit(models: dict[str, Path], tmp_path: Path, change: Change, expected: str) -> None:
    trio = trio_in(tmp_path, models)
    change(trio[1])
    assert refused(trio) == [expected]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "one", "two", "merge.yaml"}, "nothing is left"


def test_everything_that_does_not_fit_is_said_at_once(trio: list[Path]) -> None:
    put(NORM, torch.ones(5))(trio[1])
    tensors(lambda found: found.pop(EMBEDDING))(trio[2])
    assert refused(trio) == [
        f"{EMBEDDING}: is missing from two, and base has it",
        f"{NORM}: is [32] in base and [5] in one",
    ]
    tensors(lambda found: [found.pop(name) for name in list(found) if "layers" in name])(trio[2])
    tensors(lambda found: found.update({f"x.{i}": torch.ones(1) for i in range(12)}))(trio[2])
    found = refused(trio)
    assert len(found) == 21
    assert found[-1] == "and 12 more of this kind"


def test_a_tensor_of_the_base_alone_in_a_type_that_is_not_known(trio: list[Path]) -> None:
    put("score.weight", torch.ones(2, dtype=torch.float64))(trio[0])
    assert refused(trio) == ["score.weight: is stored as F64 in base; convert that model first"]


def test_weights_that_add_up_to_zero_are_found_before_anything_is_merged(trio: list[Path]) -> None:
    """Of one tensor only, the last; not where nothing is divided by their sum."""
    weights = [[{"filter": "model.norm", "value": value}, {"value": 1}] for value in (1, -1)]
    own = [{"weight": 0}, *({"weight": weight} for weight in weights)]
    expected = f"weight: the weights of {NORM} add up to zero, and normalize divides by their sum"
    parts = ("--shard-size", "0.00001")
    assert refused([trio[0], *trio], *parts, method="linear", own=own) == [expected]
    assert not list(trio[0].parent.glob(".out*"))
    config = configuration("linear", [trio[0], *trio], {"normalize": False}, own=own)
    merge(config, trio[0].parent / "out")
    one, two = read(trio[1])[NORM], read(trio[2])[NORM]
    torch.testing.assert_close(read(trio[0].parent / "out")[NORM], one - two)


def test_vocabularies_of_different_sizes(trio: list[Path]) -> None:
    size = len(read(trio[0])[HEAD])
    resized(size - 7)(trio[1])
    how = "vocabularies of different sizes; --allow-vocab-resize merges the rows that all have"
    what = f"is [{size}, 32] in base and [{size - 7}, 32] in one"
    assert refused(trio) == [f"{HEAD}: {what}: {how}", f"{EMBEDDING}: {what}: {how}"]
    put(HEAD, torch.ones(size - 7, 16))(trio[1])
    assert refused(trio, "--allow-vocab-resize") == [f"{HEAD}: is [{size}, 32] in base and [{size - 7}, 16] in one"]
    shutil.rmtree(trio[1])
    resized(size - 7, size)(relative(trio[0], trio[1], 1))
    assert refused(trio, "--allow-vocab-resize") == [f"{HEAD}: {what}", f"{EMBEDDING}: {what}"], (
        "it has not as many tokens"
    )


def test_values_too_large_for_the_type_of_the_output(trio: list[Path]) -> None:
    for path in trio:
        put(NORM, torch.full((32,), 60_000.0))(path)
    put(NORM, torch.full((32,), 80_000.0))(trio[1])
    expected = (
        f"{NORM}: 32 merged values near element 0 are too large for F16; choose a wider dtype, or smaller weights"
    )
    keys = {"method": "task_arithmetic", "parameters": {"weight": 1}}
    assert refused(trio, dtype="float16", **keys) == [expected]
    put(NORM, torch.full((32,), 3.4e38))(trio[1])
    put(NORM, torch.full((32,), 3.4e38))(trio[2])
    assert refused(trio, **keys) == [expected.replace("F16", "F32")]
    assert refused(trio, dtype="bfloat16", **keys) == [expected.replace("F16", "BF16")]
