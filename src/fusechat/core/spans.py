"""Byte spans of tokens: which UTF-8 bytes of a text each of its tokens stands for.

Spans come from the tokens' own bytes, because character offsets overlap where a character is split over several tokens.
How a token is spelt is decided by the tokenizer's decoder, not by what its vocabulary looks like.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fusechat.errors import ModelError

SPACE_MARK = "▁"


@dataclass(frozen=True)
class Encoded:
    """`ids` int32 [n]; `spans` int64 [n, 2] in UTF-8 bytes of the text; `exact` is False where the tokenizer changes the
    text, so that the spans had to be taken from its character offsets."""

    ids: np.ndarray
    spans: np.ndarray
    exact: bool


class TokenBytes:
    """The bytes that each token of a fast tokenizer stands for in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{tokenizer.name_or_path}: a slow tokenizer has no spans; a tokenizer.json is needed")
        self.tokenizer = tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = {part["type"]: part for part in _parts(state.get("decoder"), "decoders")}
        self.byte_level = "ByteLevel" in kinds
        self.space_mark = SPACE_MARK if not self.byte_level and _replaces_space_mark(kinds) else None
        self.byte_fallback = "ByteFallback" in kinds
        self.added = {token["id"]: token["content"].encode() for token in state.get("added_tokens", [])}
        self.special = frozenset(tokenizer.all_special_ids) | {
            token["id"] for token in state.get("added_tokens", []) if token["special"]
        }
        self._known: dict[int, bytes] = {}
        self._all: list[bytes] | None = None
        self._bytes: set[int] = set()

    def __getitem__(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            piece = self.tokenizer.convert_ids_to_tokens(int(token))
            found = self._known[token] = self._spell(token, piece)
        return found

    def __len__(self) -> int:
        return len(self.tokenizer)

    def all(self) -> list[bytes]:
        """The bytes of every token of the tokenizer, by id."""
        if self._all is None:
            self._all = [b""] * len(self)
            for piece, token in self.tokenizer.get_vocab().items():
                if token < len(self._all):
                    self._all[token] = self._spell(token, piece)
                    if self._writes_byte(piece):
                        self._bytes.add(token)
        return self._all

    def is_byte(self, token: int) -> bool:
        """Whether the token is a byte written as `<0x41>`, the last resort of a tokenizer with byte fallback."""
        self.all()
        return token in self._bytes

    def piece(self, data: str) -> str:
        """How `data`, in the middle of a text, is written in the tokenizer's own alphabet."""
        if self.byte_level:
            return "".join(_BYTE_TO_CHARACTER[byte] for byte in data.encode())
        return data.replace(" ", SPACE_MARK) if self.space_mark else data

    def _writes_byte(self, piece: str) -> bool:
        return self.byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def _spell(self, token: int, piece: str | None) -> bytes:
        if token in self.added:
            return self.added[token]
        if piece is None:  # an id past the tokenizer's, in a vocabulary that the model pads
            return b""
        if self.byte_level:
            return _from_byte_alphabet(piece)
        if self._writes_byte(piece):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace(self.space_mark, " ") if self.space_mark else piece).encode()


@lru_cache(maxsize=64)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """One `TokenBytes` a tokenizer, kept."""
    return TokenBytes(tokenizer)


def token_spans(tokenizer: Any, text: str) -> np.ndarray:
    """UTF-8 byte span `[begin, end)` of every token of `text`, encoded without adding special tokens.

    Returns int64 [n, 2], monotone; where the tokenizer keeps the text, the spans tile it. A token that stands for nothing
    in the text (a dummy prefix) has an empty span. Raises ModelError for a slow tokenizer, or for a text that holds half a
    surrogate pair. Source: METHOD, "Positions" and "Sequence alignment".
    """
    return encode_with_spans(tokenizer, text).spans


def encode_with_spans(tokenizer: Any, text: str) -> Encoded:
    """Ids and byte spans of `text`, encoded once, without adding special tokens."""
    table = token_bytes(tokenizer)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"half a surrogate pair at character {error.start} is not text") from None
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.int32)
    spans = _spans_from_bytes(ids, table, data)
    if spans is not None:
        return Encoded(ids, spans, exact=True)
    return Encoded(ids, _spans_from_offsets(encoding.offsets, text), exact=False)


def _spans_from_bytes(ids: np.ndarray, table: TokenBytes, data: bytes) -> np.ndarray | None:
    """Walks the runs between added tokens: a run's bytes stand in the text as they are, or less a dummy prefix."""
    spans = np.zeros((len(ids), 2), dtype=np.int64)
    cursor, first = 0, 0
    while first < len(ids):
        last = first
        while last < len(ids) and int(ids[last]) not in table.added:
            last += 1
        pieces = [table[int(token)] for token in ids[first:last]]
        closing = table.added[int(ids[last])] if last < len(ids) else None
        offset = _run_offset(data, cursor, b"".join(pieces), closing, has_mark=table.space_mark is not None)
        if offset is None:
            return None
        ends = cursor - offset + np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        begins = ends - [len(piece) for piece in pieces]
        spans[first:last, 0] = np.maximum(begins, cursor)
        spans[first:last, 1] = np.maximum(ends, cursor)
        cursor = int(ends[-1]) if len(ends) else cursor
        if closing is not None:
            spans[last] = cursor, cursor + len(closing)
            cursor += len(closing)
        first = last + 1
    return spans if cursor == len(data) else None


def _run_offset(data: bytes, cursor: int, run: bytes, closing: bytes | None, *, has_mark: bool) -> int | None:
    """How many bytes of `run` (0, or 1 for a dummy prefix) are not in the text; None where it does not fit."""
    for offset in (0, 1) if has_mark and run.startswith(b" ") else (0,):
        end = cursor + len(run) - offset
        if data[cursor:end] == run[offset:] and (
            end == len(data) if closing is None else data.startswith(closing, end)
        ):
            return offset
    return None


def _spans_from_offsets(offsets: list[tuple[int, int]], text: str) -> np.ndarray:
    """Character offsets as byte spans, made monotone: tokens that share a character give it to the first of them, and bytes
    that no token covers go to the token before (at the start: to the first)."""
    at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text], dtype=np.int64)])
    spans = np.zeros((len(offsets), 2), dtype=np.int64)
    previous: int = -1  # the last token with a width
    for index, (begin, end) in enumerate(offsets):
        cursor = int(spans[previous, 1]) if previous >= 0 else 0
        if at[end] <= cursor:
            continue
        begin_byte = max(int(at[begin]), cursor) if previous >= 0 else 0
        if previous >= 0:
            spans[previous, 1] = begin_byte  # no byte is left uncovered
        spans[index] = begin_byte, at[end]
        previous = index
    if previous >= 0:
        spans[previous, 1] = at[-1]
    for index in np.flatnonzero(spans[:, 1] == spans[:, 0]).tolist():
        spans[index] = int(spans[index - 1, 1]) if index else 0
    return spans


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _replaces_space_mark(kinds: dict[str, dict[str, Any]]) -> bool:
    if "Metaspace" in kinds:
        return True
    replace = kinds.get("Replace")
    return replace is not None and replace["pattern"].get("String") == SPACE_MARK and replace["content"] == " "


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in for each byte that byte-level BPE uses: itself where printable, else a letter from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _from_byte_alphabet(piece: str) -> bytes:
    """The bytes that a piece of byte-level BPE stands for; a character outside the alphabet stands for itself."""
    try:
        return piece.translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return b"".join(_CHARACTER_TO_BYTE.get(character, character.encode()) for character in piece)


_BYTE_TO_CHARACTER = _byte_alphabet()
_CHARACTER_TO_BYTE = {character: byte.to_bytes() for byte, character in _BYTE_TO_CHARACTER.items()}
# What is not of the alphabet is sent where Latin-1 has nothing, so that it is not taken for a byte.
_TO_LATIN = dict.fromkeys(range(256), "\ufffd") | {
    ord(character): byte for byte, character in _BYTE_TO_CHARACTER.items()
}
