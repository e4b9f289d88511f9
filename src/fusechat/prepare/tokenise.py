"""One conversation, rendered with one model's template, as tokens and response rows.

A response is everything after the text that a model is asked by, up to the end of turn; see `Prepared` for its rows."""

import numpy as np

from fusechat.core.conversations import Conversation
from fusechat.core.prepared import ROWS, Prepared
from fusechat.core.spans import encode_with_spans
from fusechat.core.templates import ChatTemplate, UnrenderableError


class RejectedError(Exception):
    """Why a conversation is left out."""


def prepare_conversation(
    conversation: Conversation, template: ChatTemplate, *, max_length: int
) -> tuple[Prepared, dict[str, bool]]:
    """Tokens and rows of a conversation, and what had to be done to it: `truncated` (responses that end after `max_length`
    tokens are gone), `system_folded` (into the first user message, by a template that refuses it), `offsets` (the tokenizer
    changes the text, so that spans come from its character offsets), `other_class` (Transformers' class for the model would make
    other tokens of it).

    Raises RejectedError with the reason where nothing is left to learn from.
    """
    _check(conversation)
    try:
        rendered = template.render(conversation.messages)
    except UnrenderableError as error:
        raise RejectedError(str(error)) from None
    encoded = encode_with_spans(template.tokenizer, rendered.text)
    at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in rendered.text], dtype=np.int64)])
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ROWS}
    content_bytes: list[int] = []
    tokens = len(encoded.ids)
    for index, (response, content) in enumerate(zip(rendered.responses, conversation.responses, strict=True)):
        places = response.asked, response.begin, response.end, response.gap_end
        asked, begin, end, gap_end = (int(at[character]) for character in places)
        lead, own = _lead_rows(encoded.spans, asked, begin), _content_rows(encoded.spans, begin, end)
        rows = np.concatenate([lead, own])
        closing = _end_of_turn(encoded.ids, encoded.spans, end, gap_end, template.end_of_turn)
        positions = np.append(rows, closing) if closing is not None else rows
        if not len(own):
            raise RejectedError("a response has no tokens of its own")
        if rows[0] == 0:
            raise RejectedError("a response begins the text, so that nothing predicts its first token")
        if positions[-1] >= max_length:
            tokens = int(columns["position"][-1][-1]) + 1 if content_bytes else 0
            break
        skipped = len(content[: response.skipped].encode())
        spans = encoded.spans[rows] - begin
        width = end - begin
        columns["position"].append(positions)
        columns["response"].append(np.full(len(positions), index))
        columns["begin"].append(_with_end(spans[:, 0], width, closing) + skipped)
        columns["end"].append(_with_end(np.minimum(spans[:, 1], width), width, closing) + skipped)
        columns["end_of_turn"].append(np.arange(len(positions)) >= len(rows))
        columns["lead"].append(np.arange(len(positions)) < len(lead))
        content_bytes.append(width)
    if not content_bytes:
        raise RejectedError(f"its first response ends after max_length ({max_length} tokens)")
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return (
        Prepared(
            id=conversation.id,
            input_ids=encoded.ids[: min(tokens, max_length)],
            **{name: joined[name].astype(kind) for name, kind in ROWS.items()},
            content_bytes=np.asarray(content_bytes, dtype=np.int32),
        ),
        {
            "truncated": len(content_bytes) < len(rendered.responses),
            "system_folded": rendered.system_folded,
            "offsets": not encoded.exact,
            "other_class": template.makes_other_tokens(rendered.text, encoded.ids),
        },
    )


def _check(conversation: Conversation) -> None:
    if not conversation.messages:
        raise RejectedError("it is empty")
    if not conversation.responses:
        raise RejectedError("no assistant turn")
    if any(not response.strip() for response in conversation.responses):
        raise RejectedError("an assistant turn is empty")


def _lead_rows(spans: np.ndarray, asked: int, begin: int) -> np.ndarray:
    """Tokens between the asked prompt and the content that begins at byte `begin`, those without width counted (the `▁` of a
    tokenizer that puts one after an added token): the model has to write them before the answer."""
    wide = spans[:, 1] > spans[:, 0]
    return np.flatnonzero((spans[:, 0] >= asked) & np.where(wide, spans[:, 1] <= begin, spans[:, 0] <= begin))


def _content_rows(spans: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Tokens that cover bytes of `[begin, end)`, and those without width inside it."""
    wide = spans[:, 1] > spans[:, 0]
    covers = wide & (spans[:, 0] < end) & (spans[:, 1] > begin)
    dummy = ~wide & (spans[:, 0] > begin) & (spans[:, 0] < end)
    return np.flatnonzero(covers | dummy)


def _end_of_turn(ids: np.ndarray, spans: np.ndarray, end: int, gap_end: int, token: int | None) -> int | None:
    """Index of the end-of-turn token in the template's own text after the content."""
    if token is None:
        return None
    found = np.flatnonzero((ids == token) & (spans[:, 0] >= end) & (spans[:, 1] <= gap_end))
    return int(found[0]) if len(found) else None


def _with_end(values: np.ndarray, width: int, closing: int | None) -> np.ndarray:
    return np.append(values, width) if closing is not None else values
