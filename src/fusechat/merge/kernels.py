"""Numba kernels of all methods: conversion between stored dtypes and float32, and sums in a fixed order.

Kernels release Python's lock (nogil), so that all cores work on blocks of a tensor at once.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from fusechat.run.compiled import compiled

CHUNK = 4096  # elements summed separately; the sums of chunks are added in order, whichever thread computed them
LANES = 512
INFINITE = np.uint32(0x7F800000)
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # kinds of stored elements


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call, and caches it on disk."""
    made: Callable[..., Any] = compiled(error_model="numpy")(function)
    return made


def _pointer_to(element: types.Type) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        signature = types.CPointer(element)(types.int64)

        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return signature, code

    return pointer


_to_uint8, _to_uint16, _to_float32 = (_pointer_to(kind) for kind in (types.uint8, types.uint16, types.float32))


_pread = types.ExternalFunction("pread", types.intp(types.int32, types.CPointer(types.uint8), types.uintp, types.int64))


@kernel
def read(handles, places, kinds, start, raw, block):  # type: ignore[no-untyped-def]
    """Reads elements of several tensors from `start` on into `block` float32 [tensors, n]. `raw` uint8: a buffer for n float32.

    A tensor begins at byte `places[row]` of the open file `handles[row]`, or at that address if the handle is -1. Returns (row,
    -1) for a file that ends early, (row, 1) for values that are not finite, else (0, 0).
    """
    for row in range(block.shape[0]):
        out = block[row]
        n = out.size
        width = 4 if kinds[row] == FLOAT32 else 2
        address = places[row] + start * width
        if handles[row] >= 0:
            done = 0
            while done < n * width:
                step = _pread(handles[row], _to_uint8(raw.ctypes.data + done), n * width - done, address + done)
                if step <= 0:
                    return row, -1
                done += step
            address = raw.ctypes.data
        if kinds[row] == FLOAT32:
            single = numba.carray(_to_float32(address), (n,))
            for i in range(n):
                out[i] = single[i]
        elif kinds[row] == BFLOAT16:
            stored = numba.carray(_to_uint16(address), (n,))
            bits = out.view(np.uint32)
            for i in range(n):
                bits[i] = np.uint32(stored[i]) << np.uint32(16)
        else:
            _decode_float16(numba.carray(_to_uint16(address), (n,)), out)
        highest = np.uint32(0)
        bits = out.view(np.uint32)
        for i in range(n):
            highest = max(highest, bits[i] & np.uint32(0x7FFFFFFF))
        if highest >= np.uint32(0x7F800000):
            return row, 1
    return 0, 0


@kernel
def _decode_float16(stored, out):  # type: ignore[no-untyped-def]
    """Moves exponent and fraction to their places in a float32, then multiplies by 2**112, which handles subnormals too."""
    bits = out.view(np.uint32)
    scale = np.float32(2.0**112)
    for i in range(out.size):
        half = np.uint32(stored[i])
        bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(out.size):
        out[i] *= scale
    for i in range(out.size):
        half = np.uint32(stored[i])
        if (half & np.uint32(0x7C00)) == np.uint32(0x7C00):
            bits[i] |= np.uint32(0x7F800000)
        bits[i] |= (half & np.uint32(0x8000)) << np.uint32(16)


@kernel
def encode_bfloat16(values, out):  # type: ignore[no-untyped-def]
    """Rounds float32 to bfloat16 (ties to even) in `out` uint16. Returns how many elements became infinite."""
    bits = values.view(np.uint32)
    lost = 0
    for i in range(values.size):
        rounded = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(rounded)
        lost += (rounded & np.uint32(0x7F80)) == np.uint32(0x7F80) or (bits[i] & INFINITE) == INFINITE
    return lost


@kernel
def encode_float16(values, out):  # type: ignore[no-untyped-def]
    """Rounds float32 to float16 (ties to even) in `out` uint16. Returns how many elements became infinite."""
    bits = values.view(np.uint32)
    lost = 0
    half = np.float32(0.5)
    half_bits = np.uint32(126 << 23)
    magic = np.empty(1, np.float32)
    magic_bits = magic.view(np.uint32)
    for i in range(values.size):
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        size = bits[i] & np.uint32(0x7FFFFFFF)
        if size >= np.uint32(0x47800000):  # 65,536 and more
            coded = np.uint32(0x7C00)
        elif size < np.uint32(0x38800000):  # below 2**-14: adding 0.5 leaves the subnormal's bits lowest
            magic_bits[0] = size
            magic[0] += half
            coded = magic_bits[0] - half_bits
        else:
            odd = (size >> np.uint32(13)) & np.uint32(1)
            coded = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        lost += coded >= np.uint32(0x7C00)
        out[i] = np.uint16(coded | sign)
    return lost


@kernel
def count_not_finite(values):  # type: ignore[no-untyped-def]
    """The number of NaN and infinite elements."""
    bits = values.view(np.uint32)
    lost = 0
    for i in range(values.size):
        lost += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return lost


@kernel
def update_squares(block, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` float64 [rows - 1, chunks] the squared differences of the rows of `block` [rows, n] to the first."""
    lanes = np.empty(LANES)
    n = block.shape[1]
    for j in range(1, block.shape[0]):
        for chunk in range(sums.shape[1]):
            lanes[:] = 0.0
            for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n), LANES):
                stop = min(start + LANES, n)
                base, row = block[0, start:stop], block[j, start:stop]
                for i in range(base.size):
                    update = np.float64(row[i] - base[i])
                    lanes[i] += update * update
            total = 0.0
            for i in range(LANES):
                total += lanes[i]
            sums[j - 1, chunk] += total
