"""The tokens that a model sampled as rows of a conversation, and the text that they are: kept as they were sampled, never encoded
again, with byte spans from the tokens' own bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat.data.messages import Conversation, Message
from fusechat.data.prepared import Prepared
from fusechat.data.prompts import answered
from fusechat.models.token_bytes import TokenBytes, token_bytes
from fusechat.models.tokenise import prepare_conversation

EMPTY = "it is empty"
_CONTENT = "x"


@dataclass(frozen=True)
class Opening:
    """What a model's tokens have before the content of an answer: `data`, the bytes; `template`: how many of these the template
    writes. The others are a dummy prefix, of no width."""

    data: bytes = b""
    template: int = 0

    @classmethod
    def of(cls, template: Any) -> "Opening":
        """As the template writes a plain answer to a plain question: of every answer, then."""
        table = token_bytes(template.tokenizer)
        plain = answered(Conversation((Message("user", "Hello."),), ""), _CONTENT)
        rows, _ = prepare_conversation(plain, template, max_length=1 << 30)
        data = b"".join(table[token] for token in rows.gold[~rows.end_of_turn].tolist())
        at = data.find(_CONTENT.encode())
        return cls(data[:at], max(0, -int(rows.begin[0]))) if at > 0 else cls()


@dataclass(frozen=True)
class Sampled:
    """`text`: what the tokens say, None where they say nothing; `rows`: of these tokens, as `Prepared` has them."""

    text: str | None
    rows: Prepared | None = None


def sampled(
    identity: str,
    prompt: Sequence[int],
    tokens: Sequence[int],
    end: int | None,
    table: TokenBytes,
    opening: Opening,
    *,
    max_length: int,
) -> Sampled:
    """The answer `tokens`, which the token `end` ended (None where nothing did), after the tokens of a prompt.

    The text is as long as the tokens are text: up to a special token, or to bytes that are no UTF-8. The token that comes there
    stands in the row that ends the turn: what follows the text is what the teacher is asked there too. Tokens from `max_length` on
    are gone."""
    room = max(0, max_length - len(prompt))
    tokens, end = list(tokens[:room]), end if len(tokens) < room else None
    pieces = [table[token] for token in tokens]
    odd = (
        at for at, (token, piece) in enumerate(zip(tokens, pieces, strict=True)) if token in table.special or not piece
    )
    pieces = pieces[: next(odd, len(tokens))]
    data = b"".join(pieces)
    before = opening if data.startswith(opening.data) else Opening()
    first, ends = len(before.data), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    count = next((n for n in range(len(pieces), 0, -1) if _is_text(data[first : int(ends[n - 1])])), 0)
    text = data[first : int(ends[count - 1])].decode() if count else ""
    if not text.strip():
        return Sampled(None)
    closing = tokens[count] if count < len(tokens) else end
    if count < len(pieces) == len(tokens) and end is None and _is_cut(data[first:]):
        closing = None  # inside of a character
    dummy, width = first - before.template, len(text.encode())
    edges = np.maximum(np.concatenate([[0], ends[:count]]), dummy) - first
    closes = [] if closing is None else [closing]
    n = count + len(closes)
    return Sampled(
        text,
        Prepared(
            id=identity,
            input_ids=np.array([*prompt, *tokens[:count], *closes], dtype=np.int32),
            position=np.arange(len(prompt), len(prompt) + n, dtype=np.int32),
            response=np.zeros(n, dtype=np.int32),
            begin=np.append(edges[:-1], [width] * len(closes)).astype(np.int32),
            end=np.append(edges[1:], [width] * len(closes)).astype(np.int32),
            end_of_turn=np.arange(n) >= count,
            lead=np.append(edges[1:] <= 0, [False] * len(closes)).astype(bool),
            content_bytes=np.array([width], dtype=np.int32),
        ),
    )


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_cut(data: bytes) -> bool:
    """Whether a text ends inside of a character, and is whole up to there."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return "unexpected end" in error.reason
    return False
