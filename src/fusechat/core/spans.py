"""Byte spans of tokens: which UTF-8 bytes of a text each of its tokens stands for.

Spans come from the tokens' own bytes, because character offsets overlap where a character is split over several tokens.
How a token is spelt is decided by the tokenizer's decoder, not by what its vocabulary looks like.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat.core.token_bytes import TokenBytes, token_bytes
from fusechat.errors import ModelError


@dataclass(frozen=True)
class Encoded:
    """`ids` int32 [n]; `spans` int64 [n, 2] in UTF-8 bytes of the text; `exact` is False where the tokenizer changes the
    text, so that the spans had to be taken from its character offsets."""

    ids: np.ndarray
    spans: np.ndarray
    exact: bool


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
        closing = table[int(ids[last])] if last < len(ids) else None
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
