"""A conversation of a finished run: both models' tokens of its responses, with the captured distributions and their alignment."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from fusechat.align.stage import directories
from fusechat.data.conversations import Conversation, DataSet, read_conversations
from fusechat.data.distributions import SparseDistribution, open_distributions
from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.errors import DataError
from fusechat.models.chat_model import ChatModel
from fusechat.models.token_bytes import token_bytes
from fusechat.run.steps import Step
from fusechat.show.glyphs import visible
from fusechat.show.passages import AlignedText, Candidate, Model, NextTokens, Token, TokenView, piece_of, tokens_of

PIVOT = "pivot"


class Branch:
    """Both models' data of the conversations that a source taught, from a finished align step and its upstream steps. `verify`:
    check the captures' checksums first."""

    def __init__(self, aligned: Step, pivot: ChatModel, source: ChatModel, *, verify: bool = True) -> None:
        self.chat_models = (pivot, source)
        self.sides = tuple(PreparedSet(*directories(aligned, part)) for part in (PIVOT, "source"))
        captured = open_distributions(*directories(aligned, "capture"), verify=verify)
        self.forecasts = (open_distributions(aligned.directory, verify=verify), captured)

    @property
    def ids(self) -> list[str]:
        """The ids of the pivot's conversations."""
        return list(self.sides[0].row_of)

    def coverage(self, identity: str) -> float | None:
        """The share of the pivot's response tokens that start where a source token starts; None without response tokens."""
        starts = [_starts(side[side.row_of[identity]]) for side in self.sides if identity in side.row_of]
        if not len(starts[0]):
            return None
        return float(np.isin(starts[0], starts[1]).mean()) if len(starts) == 2 else 0.0

    def shown(self, sets: Sequence[DataSet], identities: Sequence[str]) -> list[TokenView]:
        """Views of the conversations; `sets`: the data that they were read from. Raises DataError if it changed."""
        messages = _read(sets, identities)
        return [self._shown(messages[identity]) for identity in identities]

    def _shown(self, messages: Conversation) -> TokenView:
        identity = messages.id
        rows = []
        for chat_model, data, forecasts in zip(self.chat_models, self.sides, self.forecasts, strict=True):
            known = identity in data.row_of
            table = token_bytes(chat_model.tokenizer())
            distributions = forecasts[identity] if known and identity in forecasts else None
            rows.append(_Row(table, data[data.row_of[identity]] if known else None, distributions))
        pivot, source = self.chat_models
        labels = [pivot.reference.label, f"{source.name} ({source.reference.label})"]
        return _shown(messages, rows[0], rows[1], labels=labels, conversation=identity)


def _starts(prepared: Prepared) -> np.ndarray:
    """int64 [n]: a number for each place where a token starts; all ends of turn of a response are one place."""
    begin = np.where(prepared.end_of_turn, (1 << 32) - 1, np.maximum(prepared.begin, 0)).astype(np.int64)
    return ((prepared.response.astype(np.int64) << 32) + begin)[~prepared.lead]


def _read(sets: Sequence[DataSet], identities: Sequence[str]) -> dict[str, Conversation]:
    wanted, found = set(identities), {}
    if not wanted:
        return {}
    for conversation in chain.from_iterable(map(read_conversations, sets)):
        if isinstance(conversation, Conversation) and conversation.id in wanted:
            found[conversation.id] = conversation
            if len(found) == len(wanted):
                return found
    files, missing = ", ".join(data.path for data in sets), next(iter(wanted - found.keys()))
    raise DataError(f"{files}: no longer {'holds' if len(sets) == 1 else 'hold'} conversation {missing}")


class _Row:
    """One model's part of the view. `prepared` is None if it could not use the conversation."""

    def __init__(self, table: Any, prepared: Prepared | None, distributions: SparseDistribution | None) -> None:
        self.table, self.prepared, self.distributions = table, prepared, distributions
        self.exact = True

    def tokens(self, response: int, data: bytes) -> tuple[Token, ...]:
        if self.prepared is None:
            return ()
        rows = np.flatnonzero(self.prepared.response == response)
        spans = np.stack([self.prepared.begin, self.prepared.end], axis=1)[rows]
        tokens = tokens_of(
            self.table,
            data,
            ids=self.prepared.gold[rows],
            spans=spans,
            end_of_turn=self.prepared.end_of_turn[rows],
            lead=self.prepared.lead[rows],
        )
        self.exact &= all(token.end_of_turn or data[token.begin : token.end] in token.data for token in tokens)
        return tuple(
            replace(token, forecast=self.forecast(int(row), token)) for row, token in zip(rows, tokens, strict=True)
        )

    def forecast(self, row: int, token: Token) -> NextTokens:
        if self.distributions is None or (self.distributions.ids[row] < 0).all():
            return NextTokens()
        nll = self.distributions.nll
        return NextTokens(
            tuple(
                Candidate(int(other), self._text(int(other)), float(probability), int(other) == token.id)
                for other, probability in zip(
                    self.distributions.ids[row], self.distributions.probabilities[row], strict=True
                )
                if other >= 0
            ),
            tail=float(self.distributions.tail[row]),
            gold=float(np.exp(-nll[row])) if len(nll) else None,
        )

    def _text(self, token: int) -> str:
        data = self.table[token]
        return visible(data) if data else piece_of(self.table, token)


def _shown(messages: Conversation, pivot: _Row, source: _Row, *, labels: list[str], conversation: str) -> TokenView:
    passages: list[AlignedText] = []
    asked: list[str] = []
    count = len(messages.responses)
    for message in messages.messages:
        if not message.is_response:
            asked.append(message.content)
            continue
        number, data = len(passages), message.content.encode()
        passage = AlignedText(
            message.content,
            pivot.tokens(number, data),
            source.tokens(number, data),
            title=f"response {number + 1} of {count}",
            asked="\n\n".join(asked),
        )
        passages.append(passage)
        asked = []
    lost = [
        f"{label} could not use this conversation" if row.prepared is None else f"{label} lost responses to max_length"
        for label, row in zip(labels, (pivot, source), strict=True)
        if row.prepared is None or len(row.prepared.content_bytes) < count
    ]
    models = [Model(label, row.exact) for label, row in zip(labels, (pivot, source), strict=True)]
    return TokenView(models[0], models[1], tuple(passages), conversation=conversation, notes=tuple(lost))
