"""Finds a pivot token for bytes without counts. See docs/alignment.md; `edit` is FuseLLM's (arXiv 2401.10491)."""

from collections.abc import Sequence

import numpy as np

from fusechat.align.dtw import surface
from fusechat.models.token_bytes import TokenBytes

TAIL = -1  # no pivot token: the mass joins the tail
ORIGINS = ("seen", "special", "same bytes", "first token", "longest prefix", "edit distance", "tail", "same token")
SEEN, SPECIAL, SAME_BYTES, FIRST_TOKEN, LONGEST_PREFIX, EDIT, TO_TAIL, SAME_TOKEN = ORIGINS
_CELLS = 1 << 25  # distances computed at a time


class BackOff:
    """Finds a pivot token for bytes that were never aligned.

    In this order: the token with the same bytes; the first token of the pivot's encoding of them in the middle of a text; for
    bytes that are not UTF-8, the longest token that is a prefix of them; none. `rows`: the size of the model's embedding, if
    its tokenizer may have more tokens, which are then not used.
    """

    def __init__(self, pivot: TokenBytes, rows: int | None = None) -> None:
        self.pivot = pivot
        self.size = len(pivot) if rows is None else min(rows, len(pivot))
        self._by_bytes: dict[bytes, int] = {}
        # A byte-fallback token comes last: tokenizers use it only if no other token spells the byte.
        for token in sorted(range(self.size), key=pivot.is_byte):
            data = pivot.pieces[token]
            if data and token not in pivot.special:
                self._by_bytes.setdefault(data, token)  # the lowest id wins a tie
        self._longest = max(map(len, self._by_bytes), default=0)

    def lookup(self, data: bytes) -> tuple[int, str]:
        """The pivot token (or TAIL) for `data`, and its origin, one of `ORIGINS`."""
        found = self.same_bytes(data)
        if found[0] != TAIL or not data:
            return found
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return self._longest_prefix(data)
        first = self._first_token(text)
        return (first, FIRST_TOKEN) if first is not None else self._longest_prefix(data)

    def same_bytes(self, data: bytes) -> tuple[int, str]:
        """The pivot token with the same bytes, or TAIL, and its origin (`exact`; "EM" in the paper)."""
        token = self._by_bytes.get(data, TAIL)
        return token, TO_TAIL if token == TAIL else SAME_BYTES

    def nearest(self, several: Sequence[bytes]) -> list[tuple[int, str]]:
        """For each, the pivot token with the smallest edit distance, the lowest id of equals (`edit`; "MinED" in the paper)."""
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist

        found = [self.same_bytes(data) for data in several]
        tokens = np.array(sorted(self._by_bytes.values()), dtype=np.int64)
        surfaces = [surface(self.pivot.pieces[token]) for token in tokens.tolist()]
        missing = [index for index, (token, _) in enumerate(found) if token == TAIL and several[index] and surfaces]
        step = max(1, _CELLS // max(len(surfaces), 1))
        for begin in range(0, len(missing), step):
            part = missing[begin : begin + step]
            asked = [surface(several[index]) for index in part]
            distances = cdist(asked, surfaces, scorer=Levenshtein.distance, dtype=np.uint16, workers=1)
            for index, token in zip(part, tokens[distances.argmin(axis=1)].tolist(), strict=True):
                found[index] = token, EDIT
        return found

    def _first_token(self, text: str) -> int | None:
        backend = self.pivot.tokenizer.backend_tokenizer
        if (
            self.pivot.byte_level and backend.pre_tokenizer is not None
        ):  # it splits words, which the model must not join
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)[:1]:
                found = self._first_piece(word, text)
                if found is not None:
                    return found
        return self._first_piece(self.pivot.piece(text), text)

    def _first_piece(self, word: str, text: str) -> int | None:
        """The first token of a word in the tokenizer's own alphabet, if the text begins with its bytes."""
        pieces = self.pivot.tokenizer.backend_tokenizer.model.tokenize(word)
        token = int(pieces[0].id) if pieces else TAIL
        data = self.pivot.pieces[token] if 0 <= token < self.size and token not in self.pivot.special else b""
        return token if data and text.encode().startswith(data) else None

    def _longest_prefix(self, data: bytes) -> tuple[int, str]:
        for length in range(min(len(data), self._longest), 0, -1):
            token = self._by_bytes.get(data[:length])
            if token is not None:
                return token, LONGEST_PREFIX
        return TAIL, TO_TAIL
