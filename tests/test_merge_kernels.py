"""Stored numbers and back, sums and random numbers, against NumPy, torch, math.fsum and published vectors."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import each, pairwise
from fusechat.errors import ModelError
from fusechat.merge.kernels import (
    BFLOAT16,
    CHUNK,
    FLOAT16,
    FLOAT32,
    count_not_finite,
    encode_bfloat16,
    encode_float16,
    update_squares,
)
from fusechat.merge.random import keep_mask, philox, tensor_key
from fusechat.merge.tensor import Stored, Tensor, Workers
from merging import floats, tensor_of

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
HALVES = PATTERNS[(PATTERNS & 0x7C00) != 0x7C00]  # of float16, those that are finite
BFLOATS = PATTERNS[(PATTERNS & 0x7F80) != 0x7F80]  # of bfloat16


def decoded(*rows: np.ndarray, block: int = CHUNK) -> np.ndarray:
    blocks = tensor_of(rows, Workers(1), block=block).blocks(lambda start, rows: rows.copy())
    return np.concatenate(blocks, axis=1)


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint32).tolist()


def test_every_number_is_read_as_numpy_and_torch_read_it_also_beside_other_types() -> None:
    single, halves = any_floats(len(HALVES)), HALVES.view(np.float16)
    assert bits(decoded(halves)[0]) == bits(halves.astype(np.float32))
    expected = torch.from_numpy(BFLOATS.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert bits(decoded(BFLOATS)[0]) == bits(expected)
    rows = decoded(single, halves, np.resize(BFLOATS, len(HALVES)))
    assert bits(rows[0]) == bits(single)
    assert bits(rows[1]) == bits(halves.astype(np.float32))
    assert (rows[2].view(np.uint32) >> 16).tolist() == np.resize(BFLOATS, len(HALVES)).tolist()


def any_floats(size: int, seed: int = 0) -> np.ndarray:
    """Finite numbers of every size: their bits are drawn."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 32, 2 * size, np.uint32).view(np.float32)
    return drawn[np.isfinite(drawn)][:size].copy()


def around(codes: np.ndarray) -> np.ndarray:
    """Numbers, those halfway from each to the one of the next code, and the float32 on both sides of these."""
    middle = (codes[:-1].astype(np.float64) + codes[1:].astype(np.float64)) / 2
    middle = middle.astype(np.float32)  # exact: a float32 has bits to spare
    sides = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([codes, middle, *sides])


def as_torch(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


POSITIVE_HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
POSITIVE_BFLOATS = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
LARGEST = float(np.finfo(np.float32).max)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EDGES = floats(0.0, -0.0, 1e-45, -1e-45, 2.0**-25, 2.0**-24, 65504, 65519.996, 65520, 65536, 1e30, LARGEST, -LARGEST)


@each("encode, dtype, codes", [
    (encode_float16, torch.float16, POSITIVE_HALVES),
    (encode_bfloat16, torch.bfloat16, POSITIVE_BFLOATS),
])  # fmt: skip
def test_numbers_are_rounded_as_torch_rounds_them(encode, dtype, codes) -> None:  # type: ignore[no-untyped-def]
    values = np.concatenate([around(codes), -around(codes), EDGES, any_floats(200_000)])
    out = np.zeros(values.size, np.uint16)
    lost = encode(values, out)
    expected = as_torch(values, dtype)
    assert np.flatnonzero(out != expected).tolist() == []
    infinite = torch.from_numpy(values).to(dtype).isinf().sum().item()
    assert infinite > 0
    assert lost == infinite


def test_what_is_or_becomes_infinite_is_counted() -> None:
    for encode, largest, beyond in (
        (encode_float16, 65519.996, 65520.0),
        (encode_bfloat16, np.nextafter(np.float32(2.0**128 - 2.0**119), np.float32(0)), 2.0**128 - 2.0**119),
    ):
        out = np.zeros(6, np.uint16)
        assert encode(floats(largest, -largest, 0, -0.0, 1, 1e-45), out) == 0, encode
        assert out[2:4].tolist() == [0, 0x8000]
        assert encode(floats(beyond, -beyond, math.inf, -math.inf, math.nan, largest), out) == 5
    assert count_not_finite(floats(1, math.inf, -math.inf, math.nan, LARGEST, -0.0, 1e-45)) == 3


@each("size", [0, 1, 511, 512, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 700])
def test_squared_updates_are_added_up_chunk_by_chunk_onto_what_is_there(size: int) -> None:
    block = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    sums = np.full((2, -(-size // CHUNK)), 5.0)
    update_squares(block, sums)
    updates = (block[1:] - block[0]).astype(np.float64)
    for row, update in zip(sums, updates, strict=True):
        parts = np.split(update, range(CHUNK, size, CHUNK)) if size else []
        assert row == pytest.approx([5 + math.fsum(part**2) for part in parts], rel=1e-13)


@each("value", [1e-30, 3e38])
def test_squares_of_numbers_of_any_size_are_those_of_float64(value: float) -> None:
    sums = np.zeros((1, 1))
    update_squares(np.array([[0, 1, 0], [value, 1, value]], np.float32), sums)
    assert sums[0, 0] == 2 * float(np.float32(value)) ** 2 > 0


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def words_of(counter: list[int], key: list[int]) -> list[int]:
    """Of one counter and key, both from the least significant word on."""
    words = np.array(counter, np.uint32).reshape(4, 1)
    philox(words, np.uint64(key[0] | key[1] << 32))
    return words[:, 0].tolist()


@each("counter, key, expected", [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_philox_gives_the_vectors_that_its_authors_published(counter: str, key: str, expected: str) -> None:
    """`kat_vectors` of Random123, philox4x32 with 10 rounds."""
    assert words_of(hexadecimal(counter), hexadecimal(key)) == hexadecimal(expected)


def mask(key: int, target: int, start: int, density: float, size: int) -> np.ndarray:
    out = np.zeros(size, np.bool_)
    keep_mask(key, target, start, density, out)
    return out


@each("start", [0, 4, 4096, (1 << 34) - 8])
def test_a_mask_is_of_the_words_that_the_counter_gives(start: int) -> None:
    """Also past element 2³⁴, where the counter's second word begins to count."""
    key, size = 0xFEDCBA9876543210, 1030
    words = []
    for group in range(start // 4, start // 4 + size // 4 + 1):
        words += words_of([group & 0xFFFFFFFF, group >> 32, 3, 0], [key & 0xFFFFFFFF, key >> 32])
    assert mask(key, 3, start, 0.3, size).tolist() == [word < round(0.3 * 2**32) for word in words[:size]]


def test_a_mask_does_not_depend_on_where_it_is_begun_or_on_its_length() -> None:
    whole = mask(7, 0, 0, 0.5, 10_000)
    for start in (4, 1020, 1024, 4096, 9996):
        for size in (1, 3, 1023, 1025, 10_000 - start):
            if start + size <= 10_000:
                assert mask(7, 0, start, 0.5, size).tolist() == whole[start : start + size].tolist()


@each("density", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_the_share_kept_is_the_density(density: float) -> None:
    """Within four standard deviations, which 0 and 1 do not have."""
    size = 1 << 20
    share = mask(tensor_key(42, "w"), 1, 0, density, size).mean()
    assert abs(share - density) <= 4 * math.sqrt(density * (1 - density) / size)


def test_masks_of_different_targets_tensors_and_seeds_are_independent() -> None:
    size = 1 << 18
    one = mask(tensor_key(0, "a"), 0, 0, 0.5, size)
    for key, target in ((tensor_key(0, "a"), 1), (tensor_key(0, "b"), 0), (tensor_key(1, "a"), 0)):
        assert abs((one == mask(key, target, 0, 0.5, size)).mean() - 0.5) < 4 * 0.5 / math.sqrt(size)


@each("wrong, dtype, place", pairwise((math.nan, math.inf, -math.inf), DTYPES, (0, CHUNK - 1, 2 * CHUNK + 3)))
def test_a_value_that_is_not_finite_is_named(wrong: float, dtype: torch.dtype, place: int) -> None:
    values = torch.ones(2 * CHUNK + 4)
    values[place] = wrong
    row = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
    row = values.numpy() if dtype == torch.float32 else row.view(np.float16) if dtype == torch.float16 else row
    with pytest.raises(ModelError) as error:
        decoded(np.ones(values.numel(), np.float32), row)
    assert str(error.value) == f"tensor: holds values that are not finite in model 1 (element {place})"
    for code in (0x7C01, 0x7DFF, 0xFC01, 0xFFFF, 0x7C00):  # of float16
        with pytest.raises(ModelError, match="not finite"):
            decoded(np.array([0, code], np.uint16).view(np.float16))


def in_file(file: Path, kind: int, size: int, place: int) -> Tensor:
    """A tensor that begins at byte `place` of a file."""
    return Tensor("w", (Stored(kind, size, os.open(file, os.O_RDONLY), place, "model a"),), size, Workers(1), CHUNK)


@each("kind, dtype", [(FLOAT32, np.float32), (FLOAT16, np.float16), (BFLOAT16, np.uint16)])
def test_a_tensor_is_read_where_it_lies_in_a_file(tmp_path: Path, kind: int, dtype: type) -> None:
    values, file = np.random.default_rng(0).integers(1, 1000, 2 * CHUNK + 5).astype(dtype), tmp_path / "weights"
    for place in (0, 4, 7):
        file.write_bytes(bytes(place) + values.tobytes())
        tensor = in_file(file, kind, values.size, place)
        found = np.concatenate(tensor.blocks(lambda start, rows: rows.copy()), axis=1)
        assert found.tolist() == decoded(values).tolist(), place
        os.close(tensor.inputs[0].handle)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for missing in (1, 4, 8 * CHUNK + 12):
        file.write_bytes(np.ones(2 * CHUNK + 5, np.float32).tobytes()[:-missing])
        tensor = in_file(file, FLOAT32, 2 * CHUNK + 5, 0)
        with pytest.raises(ModelError, match=r"^w: cannot be read from model a; was a file cut short meanwhile\?$"):
            tensor.blocks(lambda start, rows: None)
        os.close(tensor.inputs[0].handle)


@each("dtype", [np.float32, np.float16, np.uint16])
def test_the_rest_of_a_tensor_begins_where_it_is_told(dtype: type) -> None:
    values = np.arange(1, CHUNK + 10).astype(dtype)
    rest = Stored.of(values).rest(7)
    (rows,) = Tensor("w", (rest,), rest.size, Workers(1), 2 * CHUNK).blocks(lambda start, rows: rows.copy())
    assert rows.tolist() == decoded(values[7:], block=2 * CHUNK).tolist()
