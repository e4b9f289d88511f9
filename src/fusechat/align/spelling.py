"""Compares the bytes of many tokens at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusechat.models.token_bytes import TokenBytes
from fusechat.run.compiled import compiled


@dataclass(frozen=True)
class Spelling:
    """All tokens' bytes in one array: token t is `data[offset[t] : offset[t + 1]]`, uint8. Ids past the end have no bytes."""

    data: np.ndarray
    offset: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [tokens]: the length of each in bytes."""
        return np.diff(self.offset)

    @classmethod
    def of(cls, tokens: TokenBytes) -> "Spelling":
        """The spelling of a tokenizer. Special tokens have no bytes: they begin with nothing, and nothing begins with them."""
        pieces = [b"" if token in tokens.special else piece for token, piece in enumerate(tokens.pieces)]
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        return cls(data, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def left_over(self, candidates: np.ndarray, tokens: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Bytes that a candidate has after the first `given` bytes of a token: int32 [n, k]; -1 if it does not begin with them.
        `candidates` [n, k]: token ids, -1 pads. `tokens`, `given`: int64 [n]."""
        tokens, given = tokens.astype(np.int64), given.astype(np.int64)
        return _left_over(self.data, self.offset, candidates, tokens, given)


@compiled()
def _left_over(
    data: np.ndarray, offset: np.ndarray, candidates: np.ndarray, tokens: np.ndarray, given: np.ndarray
) -> np.ndarray:
    result = np.full(candidates.shape, -1, dtype=np.int32)
    size = len(offset) - 1
    for row in range(len(tokens)):
        token, length = tokens[row], given[row]
        if token >= size or offset[token + 1] - offset[token] < length:
            continue
        begin = offset[token]
        for column in range(candidates.shape[1]):
            candidate = candidates[row, column]
            if candidate < 0 or candidate >= size:
                continue
            first = offset[candidate]
            rest = offset[candidate + 1] - first - length
            if rest < 0 or offset[candidate + 1] == first:
                continue
            same = True
            for at in range(length):
                if data[first + at] != data[begin + at]:
                    same = False
                    break
            if same:
                result[row, column] = rest
    return result
