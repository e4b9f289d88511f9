"""Byte spans of tokens: the UTF-8 bytes of a text that each of its tokens covers.

Spans come from the tokens' own bytes, because character offsets overlap where several tokens share a character. Offsets are used
only where the tokenizer changes the text or drops some of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from fusechat.errors import ModelError
from fusechat.models.token_bytes import TokenBytes, token_bytes


@dataclass(frozen=True)
class Encoded:
    """`ids` int32 [n]; `spans` int64 [n, 2] in UTF-8 bytes of the text. `exact`: False if the tokenizer changes the text, so
    that some spans are from character offsets."""

    ids: np.ndarray
    spans: np.ndarray
    exact: bool


def token_spans(tokenizer: Any, text: str) -> np.ndarray:
    """The UTF-8 bytes `[begin, end)` of every token of `text`, encoded without special tokens: int64 [n, 2].

    Spans are monotone; if the tokenizer keeps the text, they tile it. A token without text (a dummy prefix) has an empty span,
    and an added token covers the spaces that it strips. Raises ModelError for a slow tokenizer or single surrogates.
    """
    return encode_with_spans(tokenizer, text).spans


def encode_with_spans(tokenizer: Any, text: str) -> Encoded:
    """Ids and byte spans of `text`, encoded without special tokens. Raises ModelError as `token_spans` does."""
    table = token_bytes(tokenizer)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"half a surrogate pair at character {error.start} is not text") from None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for it
    backend.no_padding()
    encoding = backend.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int32)
    if ids.max(initial=-1) >= len(table):  # tokens were added later
        token_bytes.cache_clear()
        table = token_bytes(tokenizer)
    marks = np.zeros(0, dtype=np.int64)
    if table.space_mark and table.space_mark in text:  # the tokenizer reads it as a space
        text, data, marks = _marks_as_spaces(text, data, table.space_mark)
    widths = _widths_from_bytes(ids, table, data)
    if widths is not None:
        ends = np.cumsum(widths, dtype=np.int64)
        spans, exact = np.stack([ends - widths, ends], axis=1), True
    else:
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
        spans, exact = _spans_by_cluster(ids, offsets, table, text)
    if len(marks):
        spans += np.searchsorted(marks, spans) * (len(str(table.space_mark).encode()) - 1)
    return Encoded(ids, spans, exact)


def _marks_as_spaces(text: str, data: bytes, mark: str) -> tuple[str, bytes, np.ndarray]:
    """The text with its space marks replaced by spaces, its bytes, and the positions of these marks."""
    plain = text.replace(mark, " ")
    lengths = [len(part.encode()) for part in text.split(mark)[:-1]]
    return plain, plain.encode(), np.cumsum(lengths, dtype=np.int64) + np.arange(len(lengths))


def _widths_from_bytes(ids: np.ndarray, table: TokenBytes, data: bytes) -> np.ndarray | None:
    """The width of each token in bytes, [n], if the tokens' bytes joined are the text, apart from a dummy prefix at its start or
    after an added token; else None."""
    joined = b"".join(map(table.pieces.__getitem__, ids.tolist()))
    widths = table.lengths[ids]
    if joined == data:
        return widths
    cursor, begin = 0, 0
    ends = np.cumsum(widths, dtype=np.int64)
    edges = [-1, *np.flatnonzero(table.is_added[ids]).tolist(), len(ids) - 1]
    for last, closing in pairwise(edges):  # a run with the added token that ends it
        if last == closing:
            continue
        run = joined[begin : int(ends[closing])]
        begin += len(run)
        if not data.startswith(run, cursor):
            if not (run.startswith(b" ") and data.startswith(run[1:], cursor)):
                return None
            run = run[1:]
            widths[last + 1] -= 1
        cursor += len(run)
    return widths if cursor == len(data) else None


class _Cluster(NamedTuple):
    """A minimal group of tokens that share no characters with others; `offsets` in bytes, one for each token. `begin`, `end`:
    what the offsets cover; `cursor`, `limit`: the end of the previous cluster and the start of the next."""

    tokens: list[int]
    offsets: list[list[int]]
    cursor: int
    begin: int
    end: int
    limit: int


def _spans_by_cluster(ids: np.ndarray, offsets: np.ndarray, table: TokenBytes, text: str) -> tuple[np.ndarray, bool]:
    """Spans [n, 2] of a text that the tokenizer changes, and whether all are from the tokens' own bytes."""
    data = text.encode()
    at = np.append(np.flatnonzero((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80), len(data))  # characters begin
    offsets = at[offsets]
    reached = np.maximum.accumulate(offsets[:, 1])
    firsts = np.flatnonzero(np.append(True, offsets[1:, 0] >= reached[:-1])[: len(ids)])
    bounds = np.append(firsts, len(ids))
    begins, ends = np.append(offsets[firsts, 0], len(data)), reached[bounds[1:] - 1]
    spans, equal = _spans_where_equal(ids, bounds, (begins[:-1], ends), table, data)
    exact = True
    for index in np.flatnonzero(~equal).tolist():
        first, last = bounds[index : index + 2].tolist()
        cluster = _Cluster(
            tokens=ids[first:last].tolist(),
            offsets=offsets[first:last].tolist(),
            cursor=int(spans[first - 1, 1]) if first else 0,
            begin=int(begins[index]),
            end=int(ends[index]),
            limit=int(begins[index + 1]),
        )
        found = _from_added(cluster, table, data) or _from_bytes(cluster, table, data)
        exact = exact and found is not None
        spans[first:last] = found or _from_offsets(cluster, table, data)
    covered = int((spans[:, 1] - spans[:, 0]).sum())
    return _without_gaps(spans, len(data)), exact and covered == len(data)


def _spans_where_equal(
    ids: np.ndarray, bounds: np.ndarray, covered: tuple[np.ndarray, np.ndarray], table: TokenBytes, data: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Spans [n, 2] by the tokens' own bytes from each cluster's start, and bool, the clusters where the text has these bytes.
    Added tokens are excluded, because they may cover spaces around them."""
    begins, ends = covered
    widths = table.lengths[ids].astype(np.int64)
    stops = np.append(0, np.cumsum(widths))
    shift = np.repeat(begins - stops[bounds[:-1]], np.diff(bounds))
    own = np.frombuffer(b"".join(map(table.pieces.__getitem__, ids.tolist())), dtype=np.uint8)
    there = np.minimum(np.arange(len(own)) + np.repeat(shift, widths), len(data))
    differ = np.append(0, np.cumsum(own != np.frombuffer(data + b"\0", dtype=np.uint8)[there]))
    edges, added = stops[bounds], np.append(0, np.cumsum(table.is_added[ids]))[bounds]
    equal = (np.diff(edges) == ends - begins) & (np.diff(differ[edges]) == 0) & (np.diff(added) == 0)
    return np.stack([stops[:-1], stops[1:]], axis=1) + shift[:, None], equal


def _from_added(cluster: _Cluster, table: TokenBytes, data: bytes) -> list[tuple[int, int]] | None:
    """The span of an added token, with the spaces that it strips."""
    token = table.added.get(cluster.tokens[0])
    if token is None or len(cluster.tokens) > 1:
        return None
    content = table[cluster.tokens[0]]
    begin = data.find(content, cluster.cursor, cluster.limit)
    if begin < 0:
        return None
    end = begin + len(content)
    if token.lstrip:
        begin = cluster.cursor + len(data[cluster.cursor : begin].decode().rstrip().encode())
    if token.rstrip:
        end = cluster.limit - len(data[end : cluster.limit].decode().lstrip().encode())
    return [(min(begin, cluster.begin), max(end, cluster.end))]


def _from_bytes(cluster: _Cluster, table: TokenBytes, data: bytes) -> list[tuple[int, int]] | None:
    """Spans by a reading of the tokens that matches the text at the cursor, or right before the cluster's end: offsets may leave
    out a space that the tokens have."""
    for pieces in _readings(cluster, table, data):
        own = b"".join(pieces)
        for begin in (cluster.cursor, cluster.end - len(own)):
            end = begin + len(own)
            fits = cluster.cursor <= begin <= cluster.begin and cluster.end <= end <= cluster.limit
            if fits and data.startswith(own, begin):
                return list(pairwise(accumulate(map(len, pieces), initial=begin)))
    return None


def _readings(cluster: _Cluster, table: TokenBytes, data: bytes) -> Iterator[list[bytes]]:
    """Byte strings that the tokens may stand for: their bytes, or a literal `<0x41>`; also without a dummy prefix."""
    own = [table.pieces[token] for token in cluster.tokens]
    readings = [own]
    if not table.byte_tokens.isdisjoint(cluster.tokens):
        written = [data[begin:end] for begin, end in cluster.offsets]
        readings.append(
            [
                there if token in table.byte_tokens and there == b"<0x%02X>" % piece[0] else piece
                for token, piece, there in zip(cluster.tokens, own, written, strict=True)
            ]
        )
    for pieces in readings:
        yield pieces
        if pieces[0].startswith(b" "):
            yield [pieces[0][1:], *pieces[1:]]


def _from_offsets(cluster: _Cluster, table: TokenBytes, data: bytes) -> list[tuple[int, int]]:
    """Spans by offsets: the first of several tokens gets a shared character. Its leading space was left out, or is a dummy
    prefix."""
    (begin, end), *others = cluster.offsets
    first, cursor = table[cluster.tokens[0]], cluster.cursor
    if first.startswith(b" ") and not data[begin:end].decode()[:1].isspace():
        end = begin if first == b" " else end
        begin -= data.endswith(b" ", cursor, begin)
    spans = []
    for start, stop in [(begin, end), *others]:
        spans.append((max(start, cursor), stop) if stop > cursor else (cursor, cursor))
        cursor = spans[-1][1]
    return spans


def _without_gaps(spans: np.ndarray, size: int) -> np.ndarray:
    """Monotone spans [n, 2]. Bytes without a token go to the token with a width before them, at the start to the first of these;
    if none has a width, all go to the last token."""
    wide = np.flatnonzero(spans[:, 1] > spans[:, 0])
    wide = wide if len(wide) else np.array([len(spans) - 1])
    edges = np.concatenate([[0], spans[wide[1:], 0], [size]])
    after = np.searchsorted(wide, np.arange(len(spans)), side="right")  # how many spans with a width begin up to here
    before = np.searchsorted(wide, np.arange(len(spans)), side="left")
    return np.stack([edges[before], edges[after]], axis=1)
