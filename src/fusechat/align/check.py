"""Checks of two models' stored rows of a conversation: same text, matching distributions."""

import unicodedata

import numpy as np

from fusechat.align.aligner import Pair, Side
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.errors import WorkdirError
from fusechat.models.responses import WORDS, is_dropped


def check_conversation(
    pivot: Prepared,
    source: Prepared,
    captured: SparseDistribution | None,
    *,
    pair: Pair,
    names: tuple[str, str],
    sizes: tuple[int, int],
) -> None:
    """Raises WorkdirError, naming model and conversation, for rows that do not match. `sizes`: both models' vocabulary sizes."""
    where = f"conversation {pivot.id}"
    for rows, name, size in zip((pivot, source), names, sizes, strict=True):
        if not len(rows):
            raise WorkdirError(f"{name}: {where} has no response tokens; run its prepare step again")
        _check_ids(rows.input_ids, size, f"{name}: {where}")
    if captured is not None:
        if len(captured) != len(source) or len(captured.nll) != len(source):
            raise WorkdirError(
                f"{names[1]}: {where} has {len(captured)} distributions for {len(source)} response tokens: "
                "they were captured from another text"
            )
        _check_ids(captured.ids, sizes[1], f"{names[1]}: {where}", "its distributions hold")
    for response in np.intersect1d(pivot.response, source.response).tolist():
        texts = [content(rows, side, response) for rows, side in ((pivot, pair.pivot), (source, pair.source))]
        if texts[0] is not None and texts[1] is not None and not _agree(texts[0], texts[1]):
            raise WorkdirError(f"{names[0]} and {names[1]}: the texts of {where} differ")


def _check_ids(ids: np.ndarray, size: int, where: str, what: str = "it holds") -> None:
    if len(ids) and int(ids.max()) >= size:
        raise WorkdirError(f"{where}: {what} token {int(ids.max())}, past the model's vocabulary of {size} tokens")


def content(rows: Prepared, side: Side, response: int) -> tuple[int, bytes, bool] | None:
    """The first byte of a response that a model has, the text from there by its tokens' bytes, and whether that is all.

    It is not if the last token continues after the content, or the end was truncated. The template's own words are left out.
    None if the tokens' bytes do not match their spans (a tokenizer that changes the text, a dummy prefix), or one is special.
    """
    mine = rows.response == response
    which = np.flatnonzero(mine & ~rows.end_of_turn & ~rows.lead & (rows.begin < WORDS))
    tokens, begin, end = rows.gold[which], rows.begin[which], rows.end[which]
    lengths = side.spelling.lengths
    width = np.where(tokens < len(lengths), lengths[np.minimum(tokens, len(lengths) - 1)], 0)
    exact = width == end - begin
    if not len(which) or not exact[:-1].all():
        return None
    data = b"".join([side.tokens[token] for token in tokens[: None if exact[-1] else -1].tolist()])
    is_whole = bool(exact[-1]) and bool((mine & rows.end_of_turn).any())
    return max(int(begin[0]), 0), data[max(-int(begin[0]), 0) :], is_whole


def _agree(one: tuple[int, bytes, bool], other: tuple[int, bytes, bool]) -> bool:
    """Whether two parts of a response have the same text where they overlap, and elsewhere only dropped spaces or reasoning."""
    first = max(one[0], other[0])
    last = max(min(one[0] + len(one[1]), other[0] + len(other[1])), first)
    parts = [(data[: first - at], data[first - at : last - at], data[last - at :]) for at, data, _ in (one, other)]
    alone = [before for before, _, _ in parts] + [after for _, _, after in parts if one[2] and other[2]]
    same = parts[0][1] == parts[1][1] or _plain(parts[0][1]) == _plain(parts[1][1])
    return same and all(is_dropped(data.decode(errors="replace")) for data in alone)


def _plain(data: bytes) -> str:
    """The text without differences that a tokenizer may introduce at equal length: normalisation and case."""
    return unicodedata.normalize("NFKC", data.decode(errors="replace")).casefold()
