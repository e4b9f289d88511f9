"""Models that differ in more than their values and can be merged all the same: ties, buffers, types, vocabularies."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import naive_merges as naive
from cases import each
from checkpoints import Tensors, assert_nearest, configuration, read, relative, write
from fusechat.errors import RecipeError
from fusechat.merge import merge

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
HALF = {"weight": 0.5}


@pytest.fixture
def tied(models: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model whose output embedding is its input embedding and is not stored, and a relative."""
    return models["llama"], relative(models["llama"], tmp_path / "one", 1)


@pytest.fixture
def untied(models: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    return models["mistral"], relative(models["mistral"], tmp_path / "one", 1)


def halfway(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one.double() + two.double()) / 2


def merged(
    models: list[Path], out: Path, parameters: Any = HALF, method: str = "task_arithmetic", **keys: Any
) -> Tensors:
    merge(configuration(method, models, parameters, **keys), out)
    return read(out)


# -- tied embeddings ----------------------------------------------------------------------------------------------------


def test_a_copy_of_a_tied_embedding_is_left_out(tied: tuple[Path, Path], tmp_path: Path, heard: list[str]) -> None:
    base, one = tied
    own = read(one)
    with_head = write(tmp_path / "head", {**own, HEAD: own[EMBEDDING].clone()}, one)
    report = merge(configuration("sce", [base, one, with_head]), tmp_path / "out")
    assert report["left_out"] == [HEAD]
    assert HEAD not in report["tensors"]
    assert read(tmp_path / "out").keys() == read(base).keys()
    assert heard == []
    other = write(tmp_path / "other", {**own, HEAD: own[EMBEDDING] + 1}, one, tie_word_embeddings=False)
    assert merged([base, other], tmp_path / "of-other").keys() == read(base).keys()
    assert heard == [f"{HEAD}: is not tied in {other} as in {base}; left out"]


def test_where_the_base_is_not_tied_a_tied_embedding_stands_for_both(untied: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = untied
    without_head = {name: tensor for name, tensor in read(one).items() if name != HEAD}
    tied = write(tmp_path / "tied", without_head, one, tie_word_embeddings=True)
    found = merged([base, tied], tmp_path / "out")
    assert_nearest(found[HEAD], halfway(read(base)[HEAD], without_head[EMBEDDING]))
    assert_nearest(found[EMBEDDING], halfway(read(base)[EMBEDDING], without_head[EMBEDDING]))


def test_a_tied_embedding_may_be_stored_as_the_output_embedding_only(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """As `safetensors.torch.save_model` stores it. The output has it as the base has, and is not without any."""
    by_head = []
    for path in tied:
        tensors = {HEAD if name == EMBEDDING else name: tensor for name, tensor in read(path).items()}
        by_head.append(write(tmp_path / f"head-{path.name}", tensors, path))
    usual = merged(list(tied), tmp_path / "usual")
    both = merged(by_head, tmp_path / "both")
    assert torch.equal(both.pop(HEAD), usual[EMBEDDING])
    assert all(torch.equal(both[name], usual[name]) for name in both)
    assert both.keys() == usual.keys() - {EMBEDDING}
    mixed = merged([tied[0], by_head[1]], tmp_path / "mixed")
    assert mixed.keys() == usual.keys()
    assert all(torch.equal(mixed[name], usual[name]) for name in mixed)


def test_ties_that_the_configuration_does_not_speak_of_are_the_architectures(
    tied: tuple[Path, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    base = write(tmp_path / "base", read(models["gemma"]), models["gemma"], tie_word_embeddings=None)
    tensors = read(base)
    one = write(tmp_path / "gemma-one", {**tensors, HEAD: tensors[EMBEDDING].clone()}, base)
    report = merge(configuration("varm", [base, one]), tmp_path / "out")
    assert report["left_out"] == [HEAD]


def test_an_output_projection_of_a_layer_is_no_output_embedding(tied: tuple[Path, Path], tmp_path: Path) -> None:
    name = "model.layers.0.attention.output.weight"
    base, one = (
        write(tmp_path / f"more-{path.name}", {**read(path), name: torch.full((2, 3), value)}, path)
        for path, value in zip(tied, (1.0, 2.0), strict=True)
    )
    assert torch.equal(merged([base, one], tmp_path / "out")[name], torch.full((2, 3), 1.5))


# -- tensors that not all have, or have in another shape ----------------------------------------------------------------------


def test_a_tensor_of_the_base_alone_is_copied(tied: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = tied
    extra = {"score.weight": torch.randn(3, 32), "count": torch.arange(4)}
    more = write(tmp_path / "more", {**read(base), **extra}, base)
    report = merge(configuration("sce", [more, one], dtype="bfloat16"), tmp_path / "out")
    assert report["only_in_base"] == ["count", "score.weight"]
    assert report["mean_coefficients"] == {"one": 1}, "over what is merged"
    assert report["tensors"]["score.weight"] == {"copied": True, "elements_copied": 96}
    assert torch.equal(read(tmp_path / "out")["score.weight"], extra["score.weight"].bfloat16())
    assert torch.equal(read(tmp_path / "out")["count"], extra["count"])


@each("rows", [-5, 9])
def test_vocabularies_of_different_sizes(untied: tuple[Path, Path], tmp_path: Path, rows: int) -> None:
    """The rows that both have are merged, others are the base's."""
    base, one = untied
    tensors = read(one)
    size = len(tensors[HEAD]) + rows
    for name in (EMBEDDING, HEAD):
        tensors[name] = torch.cat([tensors[name], torch.full((9, 32), 7.0)])[:size]
    resized = write(tmp_path / "resized", tensors, one, vocab_size=size)
    config = configuration("task_arithmetic", [base, resized], HALF)
    report = merge(config, tmp_path / "out", allow_vocab_resize=True)
    found, old = read(tmp_path / "out"), read(base)
    common = min(size, len(old[HEAD]))
    for name, tensor in found.items():
        assert tensor.shape == old[name].shape
        if name not in (EMBEDDING, HEAD):
            assert_nearest(tensor, halfway(old[name], tensors[name]), name)
            continue
        assert_nearest(tensor[:common], halfway(old[name][:common], tensors[name][:common]), name)
        assert torch.equal(tensor[common:], old[name][common:])
        assert report["tensors"][name].get("elements_copied", 0) == max(-rows, 0) * 32
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_selection_of_a_padded_vocabulary_is_over_the_common_rows(
    untied: tuple[Path, Path], tmp_path: Path
) -> None:
    base, one = untied
    two = relative(base, tmp_path / "two", 2)
    tensors = read(two)
    size = len(tensors[HEAD]) - 5
    resized = write(
        two, {**tensors, **{name: tensors[name][:size] for name in (HEAD, EMBEDDING)}}, two, vocab_size=size
    )
    merge(configuration("sce", [base, one, resized], {"select_topk": 0.1}), tmp_path / "out", allow_vocab_resize=True)
    old, others = read(base)[HEAD], [read(one)[HEAD][:size], tensors[HEAD][:size]]
    eta = naive.shares(naive.squares(old[:size], others, 0.1))
    assert_nearest(read(tmp_path / "out")[HEAD][:size], naive.sce(old[:size], others, 0.1, eta))


def test_buffers_of_whole_numbers_are_the_bases(tied: tuple[Path, Path], tmp_path: Path, heard: list[str]) -> None:
    buffers: list[Tensors] = [
        {"ids": torch.arange(9), "mask": torch.tensor([True, False]), "small": torch.tensor([1, -2], dtype=torch.int8)},
        {"ids": torch.arange(9), "mask": torch.tensor([True, True]), "small": torch.tensor([1, -2], dtype=torch.int8)},
    ]
    wide = torch.arange(3_000_000)
    for buffer, dtype in zip(buffers, (torch.int64, torch.int32), strict=True):
        buffer["wide"] = wide.to(dtype)
    base, one = (
        write(tmp_path / f"more-{path.name}", read(path) | more, path) for path, more in zip(tied, buffers, strict=True)
    )
    report = merge(configuration("sce", [base, one], dtype="bfloat16"), tmp_path / "out")
    found = read(tmp_path / "out")
    for name, tensor in buffers[0].items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert report["tensors"][name] == {"copied": True, "differs": name in ("mask", "wide")}
    what = f"a buffer of whole numbers that differs between the models; {base}'s is kept"
    assert heard == [f"{name}: {what}" for name in ("mask", "wide")]
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    for name, part in json.loads(file[8 : 8 + length]).items():  # as readers that map files into memory need it
        assert name == "__metadata__" or (8 + length + part["data_offsets"][0]) % found[name].element_size() == 0, name


def test_parameters_are_asked_of_what_is_merged_only(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """A buffer needs no weight; a tensor of floats does, which is known before anything is written."""
    base, one = (write(tmp_path / f"more-{path.name}", read(path) | {"ids": torch.arange(3)}, path) for path in tied)
    filters = [{"filter": part, "value": 0.5} for part in ("weight", "other")]
    assert torch.equal(merged([base, one], tmp_path / "out", {"weight": filters})["ids"], torch.arange(3))
    with pytest.raises(RecipeError, match=f"no filter holds for {EMBEDDING}, and there is no default"):
        merged([base, one], tmp_path / "refused", {"weight": filters[1:]})
    assert not list(tmp_path.glob("*refused*"))


@each("method, parameters", [
    ("sce", {"select_topk": 0.1}),
    ("varm", {}),
    ("ties", {**HALF, "density": 0.2}),
    ("task_arithmetic", HALF),
    ("dare_ties", {**HALF, "density": 0.2}),
    ("linear", HALF),
    ("slerp", {"t": 0.25}),
])  # fmt: skip
def test_tensors_that_no_model_changed_empty_ones_and_single_numbers(
    tied: tuple[Path, Path], tmp_path: Path, method: str, parameters: Any
) -> None:
    base, one = tied
    same = {"same.weight": torch.tensor([0.1, -3e-5, 0.0, 7.25, 1e-30]), "empty": torch.zeros(0, 5)}
    first = write(tmp_path / "base", {**read(base), **same, "gate": torch.tensor(1.0)}, base)
    second = write(tmp_path / "two", {**read(one), **same, "gate": torch.tensor(3.0)}, base)
    config = configuration(method, [first, second], parameters)
    report = merge(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert torch.allclose(
        found["same.weight"], same["same.weight"], rtol=0 if method in ("sce", "varm") else 1e-6, atol=0
    )
    assert found["empty"].shape == (0, 5)
    assert report["tensors"]["empty"] == {"copied": True}
    assert found["gate"].shape == ()
    if method in ("sce", "varm"):
        assert report["tensors"]["same.weight"]["coefficients"] == {"two": 1.0}
        assert report["tensors"]["same.weight"]["erased"] == 0
    expected = {"sce": 3, "varm": 3, "slerp": 1.5, "dare_ties": None, "ties": 3}.get(method, 2)
    assert expected is None or float(found["gate"]) == expected


# -- types --------------------------------------------------------------------------------------------------------------


def in_type(path: Path, directory: Path, **dtypes: torch.dtype) -> Path:
    """The norm in one type, the rest in another."""
    tensors = {
        n: t.to(dtypes.get("norm", dtypes["rest"]) if n == NORM else dtypes["rest"]) for n, t in read(path).items()
    }
    return write(directory, tensors, path)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@each("base, one, keys, rest, norm, name", [
    ({"rest": BF16}, {"rest": BF16}, {}, BF16, BF16, "bfloat16"),
    ({"rest": F16}, {"rest": BF16}, {}, F32, F32, "float32"),
    ({"rest": BF16}, {"rest": F32}, {}, F32, F32, "float32"),
    ({"rest": BF16, "norm": F32}, {"rest": BF16, "norm": F32}, {}, BF16, F32, "bfloat16"),
    ({"rest": F32}, {"rest": BF16}, {"dtype": "float16"}, F16, F16, "float16"),
    ({"rest": F16, "norm": F32}, {"rest": F16}, {"dtype": "float32", "out_dtype": "bfloat16"}, BF16, BF16, "bfloat16"),
])  # fmt: skip
def test_types_of_inputs_and_output(
    tied: tuple[Path, Path], tmp_path: Path, base: Any, one: Any, keys: Any, rest: Any, norm: Any, name: str
) -> None:
    """The output's is what holds all inputs' values, tensor by tensor, or what is asked for; between is float32."""
    inputs = [in_type(tied[0], tmp_path / "a", **base), in_type(tied[1], tmp_path / "b", **one)]
    found = merged(inputs, tmp_path / "out", {"weight": 0.3}, **keys)
    old, new = map(read, inputs)
    for tensor_name, tensor in found.items():
        assert tensor.dtype == (norm if tensor_name == NORM else rest)
        start, end = old[tensor_name].double(), new[tensor_name].double()
        assert_nearest(tensor, start + 0.3 * (end - start), tensor_name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(loaded.dtype) == f"torch.{name}"


def test_the_configurations_type_is_that_of_most_elements(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """Of 20 tensors 13 small ones are float32."""
    models = []
    for path in tied:
        tensors = {name: tensor.bfloat16() if tensor.numel() > 1500 else tensor for name, tensor in read(path).items()}
        assert sum(tensor.dtype == F32 for tensor in tensors.values()) == 13
        models.append(write(tmp_path / f"mixed-{path.name}", tensors, path))
    merged(models, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == BF16
