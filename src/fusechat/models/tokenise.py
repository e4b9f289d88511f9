"""Tokens and response rows of one conversation, rendered with one model's template.

A response is everything from the end of its prompt to the end of turn; see `Prepared` for its rows.
"""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from fusechat.data.conversations import Conversation
from fusechat.data.messages import join_turns as join
from fusechat.data.prepared import ROWS, Prepared
from fusechat.data.rejected import IN_A_ROW, TOO_LONG
from fusechat.models.spans import Encoded, encode_with_spans
from fusechat.models.templates import ChatTemplate, Rendered, Response, UnrenderableError


class RejectedError(Exception):
    """Why a conversation is left out."""


def prepare_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    *,
    max_length: int,
    join_turns: bool = False,
    truncate: str = "response",
) -> tuple[Prepared, dict[str, bool]]:
    """Tokens and rows of a conversation, and by name what was done to it. Raises RejectedError if no response is left.

    `truncated`: responses that end after `max_length` tokens are dropped; with `truncate` "token" the first of them is cut
    there, without end of turn. `system_folded`: into the first user message. `joined`: consecutive turns of one role, if
    `join_turns` allows it. `offsets`: the tokenizer changes the text, so that spans are from its character offsets.
    `other_class`: Transformers' class for the model would make other tokens. Also what the template leaves out.
    """
    _check(conversation)
    rendered, joined_now = _render(conversation, template, join_turns=join_turns)
    encoded = encode_with_spans(template.tokenizer, rendered.text)
    at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in rendered.text], dtype=np.int64)])
    kept: list[_Rows] = []
    for response, content in zip(rendered.responses, conversation.responses, strict=True):
        rows = _rows(response, encoded, at, template.end_of_turn, skipped=len(content[: response.skipped].encode()))
        if rows.position[-1] >= max_length:
            if truncate == "token" and (fits := rows.up_to(max_length)) is not None:
                kept.append(fits)
            break
        kept.append(rows)
    if not kept:
        raise RejectedError(f"{TOO_LONG} ({max_length} tokens)")
    truncated = len(kept) < len(rendered.responses) or kept[-1].cut
    columns = {name: np.concatenate([getattr(rows, name) for rows in kept]) for name in ROWS if name != "response"}
    columns["response"] = np.repeat(np.arange(len(kept)), [len(rows.position) for rows in kept])
    last = int(kept[-1].position[-1]) + 1
    return (
        Prepared(
            id=conversation.id,
            input_ids=encoded.ids[: last if truncated else max_length],
            **{name: columns[name].astype(kind) for name, kind in ROWS.items()},
            content_bytes=np.asarray([rows.width for rows in kept], dtype=np.int32),
        ),
        {
            "truncated": truncated,
            "system_folded": rendered.system_folded,
            **({"joined": True} if joined_now or conversation.joined else {}),
            **dict.fromkeys(rendered.marks, True),
            "offsets": not encoded.exact,
            "other_class": template.makes_other_tokens(rendered.text, encoded.ids),
        },
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of one response, as in `Prepared`. `reach`: bytes of the rendered content up to each row's end; `width`: all of
    its bytes. `cut`: its end is missing."""

    position: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    end_of_turn: np.ndarray
    lead: np.ndarray
    reach: np.ndarray
    width: int
    cut: bool = False

    def up_to(self, length: int) -> "_Rows | None":
        """Without tokens from index `length` on, and without end of turn; None if no content is left."""
        keep = (self.position < length) & ~self.end_of_turn
        if not (keep & ~self.lead).any():
            return None
        columns = self.position, self.begin, self.end, self.end_of_turn, self.lead, self.reach
        position, begin, end, closing, lead, reach = (each[keep] for each in columns)
        return _Rows(position, begin, end, closing, lead, reach, width=int(reach[-1]), cut=True)


def _rows(response: Response, encoded: Encoded, at: np.ndarray, end_token: int | None, *, skipped: int) -> _Rows:
    """`at`: the byte of each character of the rendered text; `skipped`: bytes of the content that the template left out."""
    places = response.asked, response.begin, response.end, response.gap_end, response.begin + response.own
    asked, begin, end, gap_end, own_end = (int(at[character]) for character in places)
    lead, own = _lead_rows(encoded.spans, asked, begin), _content_rows(encoded.spans, begin, end)
    rows = np.concatenate([lead, own])
    if not len(own):
        raise RejectedError("a response has no tokens of its own")
    if rows[0] == 0:
        raise RejectedError("a response begins the text, so that nothing predicts its first token")
    closing = _end_of_turn(encoded.ids, encoded.spans, end, gap_end, end_token)
    width = end - begin
    spans = encoded.spans[rows] - begin
    spans[:, 1] = np.minimum(spans[:, 1], width)
    reach = _with_end(spans[:, 1], width, closing)
    spans[spans[:, 0] >= own_end - begin] += response.offset
    positions = np.append(rows, closing) if closing is not None else rows
    return _Rows(
        position=positions,
        begin=_with_end(spans[:, 0], width, closing) + skipped,
        end=_with_end(spans[:, 1], width, closing) + skipped,
        end_of_turn=np.arange(len(positions)) >= len(rows),
        lead=np.arange(len(positions)) < len(lead),
        reach=reach,
        width=width,
    )


def _render(conversation: Conversation, template: ChatTemplate, *, join_turns: bool) -> tuple[Rendered, bool]:
    """The rendered conversation, and whether consecutive turns had to be joined."""
    try:
        return template.render(conversation.messages, conversation), False
    except UnrenderableError as error:
        reason = str(error)
    together = join(conversation.messages, roles=("system", "user", "assistant", "tool"))
    if len(together) < len(conversation.messages):
        with suppress(UnrenderableError):
            rendered = template.render(together, conversation)
            if join_turns and len(rendered.responses) == len(conversation.responses):
                return rendered, True
            reason = f"{IN_A_ROW}{reason}"
    raise RejectedError(reason)


def _check(conversation: Conversation) -> None:
    if not conversation.messages:
        raise RejectedError("it is empty")
    if not conversation.responses:
        raise RejectedError("no assistant turn")
    if any(
        message.is_response and not message.content.strip() and not message.more.get("tool_calls")
        for message in conversation.messages
    ):
        raise RejectedError("an assistant turn is empty")


def _lead_rows(spans: np.ndarray, asked: int, begin: int) -> np.ndarray:
    """Tokens between the prompt and the content, which begins at byte `begin`, including those of width 0 (the `▁` after an
    added token): the model must write them before the answer."""
    wide = spans[:, 1] > spans[:, 0]
    return np.flatnonzero((spans[:, 0] >= asked) & np.where(wide, spans[:, 1] <= begin, spans[:, 0] <= begin))


def _content_rows(spans: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Tokens that cover bytes of `[begin, end)`, and those of width 0 inside."""
    wide = spans[:, 1] > spans[:, 0]
    covers = wide & (spans[:, 0] < end) & (spans[:, 1] > begin)
    dummy = ~wide & (spans[:, 0] > begin) & (spans[:, 0] < end)
    return np.flatnonzero(covers | dummy)


def _end_of_turn(ids: np.ndarray, spans: np.ndarray, end: int, gap_end: int, token: int | None) -> int | None:
    """Index of the end-of-turn token in the template's text after the content."""
    if token is None:
        return None
    found = np.flatnonzero((ids == token) & (spans[:, 0] >= end) & (spans[:, 1] <= gap_end))
    return int(found[0]) if len(found) else None


def _with_end(values: np.ndarray, width: int, closing: int | None) -> np.ndarray:
    return np.append(values, width) if closing is not None else values
