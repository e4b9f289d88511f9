"""Numba kernels under every merging method: stored numbers to float32 and back, sums in an order that nothing changes.

Kernels hold no lock of Python (nogil), so that blocks of a tensor are worked on by all cores at once.
"""

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

CHUNK = 4096  # elements whose sum is taken by itself; chunks are added up in their order, whoever worked on them
LANES = 512
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # how the elements of a tensor are stored

kernel = numba.njit(nogil=True, cache=True, error_model="numpy")


def _pointer_to(element: types.Type) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        signature = types.CPointer(element)(types.int64)

        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return signature, code

    return pointer


_to_uint16, _to_float32 = _pointer_to(types.uint16), _pointer_to(types.float32)


@kernel
def decode(addresses, kinds, start, block):  # type: ignore[no-untyped-def]
    """Elements from `start` on of tensors that lie at `addresses`, as float32 in `block` [tensors, n].

    Returns the number of the first tensor that holds something not finite there, -1 where none does. The caller keeps the
    tensors alive, and long enough.
    """
    bad = -1
    for row in range(block.shape[0]):
        out = block[row]
        n = out.size
        if kinds[row] == FLOAT32:
            single = numba.carray(_to_float32(addresses[row]), (start + n,))[start:]
            for i in range(n):
                out[i] = single[i]
        elif kinds[row] == BFLOAT16:
            stored = numba.carray(_to_uint16(addresses[row]), (start + n,))[start:]
            bits = out.view(np.uint32)
            for i in range(n):
                bits[i] = np.uint32(stored[i]) << np.uint32(16)
        else:
            stored = numba.carray(_to_uint16(addresses[row]), (start + n,))[start:]
            _decode_float16(stored, out)
        highest = np.uint32(0)
        bits = out.view(np.uint32)
        for i in range(n):
            highest = max(highest, bits[i] & np.uint32(0x7FFFFFFF))
        if highest >= np.uint32(0x7F800000) and bad < 0:
            bad = row
    return bad


@kernel
def _decode_float16(stored, out):  # type: ignore[no-untyped-def]
    """Exponent and fraction moved to their places in a float32, then scaled by 2**112, which is right for subnormals too."""
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
    """float32 to the nearest bfloat16 (ties to even) in `out` uint16; the number of elements that became infinite."""
    bits = values.view(np.uint32)
    lost = 0
    for i in range(values.size):
        rounded = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(rounded)
        lost += (rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)
    return lost


@kernel
def encode_float16(values, out):  # type: ignore[no-untyped-def]
    """float32 to the nearest float16 (ties to even) in `out` uint16; the number of elements that became infinite."""
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
    bits = values.view(np.uint32)
    lost = 0
    for i in range(values.size):
        lost += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return lost


@kernel
def chunk_squares(values, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` float64 [chunks] the squares of `values` float32 [n], chunk by chunk."""
    lanes = np.empty(LANES)
    for chunk in range(sums.size):
        lanes[:] = 0.0
        part = values[chunk * CHUNK : (chunk + 1) * CHUNK]
        for start in range(0, part.size, LANES):
            piece = part[start : start + LANES]
            for i in range(piece.size):
                value = np.float64(piece[i])
                lanes[i] += value * value
        total = 0.0
        for i in range(LANES):
            total += lanes[i]
        sums[chunk] += total
