"""Chat templates: renders a conversation for one model, and finds its responses in the text (`responses.py`)."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from fusechat.data.messages import Conversation, Message, fold_system
from fusechat.errors import ModelError
from fusechat.models.dates import dated
from fusechat.models.responses import (
    OPEN,
    REASONING,
    Place,
    Rendered,
    Response,
    UnrenderableError,
    places,
    response_places,
    words_offset,
)
from fusechat.models.spans import encode_with_spans
from fusechat.models.token_bytes import token_bytes
from fusechat.run.progress import log

__all__ = ["ChatTemplate", "Rendered", "Response", "UnrenderableError", "choose_template"]
OWN_PROMPT = "{#- a model that was trained with this template is asked by its generation prompt -#}"
_TOLD_BY_ROLE = ("tool_calls", "tool_call_id", *REASONING)  # message keys that are reported separately


class ChatTemplate:
    """One model's chat template: its own, or the recipe's.

    `name` selects one of several. `variables` are passed at every rendering; a conversation's own override them. `date`
    (YYYY-MM-DD): the date that it sees, None for today. `end_of_turn`: the id of the token that it writes after a response, or
    None. `by_class`: the tokenizer of Transformers' class for the model, if it differs from `tokenizer.json`.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        model: str,
        *,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
        date: str | None = None,
        by_class: Any | None = None,
    ) -> None:
        self.tokenizer, self._by_class = tokenizer, by_class
        self.template, self.date = template or choose_template(tokenizer.chat_template, name, model), date
        self._dated = dated(self.template, date)
        self.variables = dict(variables or {})
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.end_of_turn: int | None = None
        try:
            self.end_of_turn = self._find_end_of_turn()
        except UnrenderableError as error:
            raise ModelError(f"{model}: its chat template fails on a plain question and answer: {error}") from None

    def render(self, messages: Sequence[Message], about: Conversation | None = None) -> Rendered:
        """Renders a conversation and finds its responses. Raises UnrenderableError with the reason.

        `about`: the conversation of the messages, for its tools and variables. A system message that the template refuses or
        leaves out goes in front of the first user message.
        """
        try:
            return self._locate(messages, about)
        except UnrenderableError:
            folded = fold_system(messages)
            if folded is None:
                raise
            return replace(self._locate(folded, about), system_folded=bool(messages[0].content.strip()))

    def prompt(self, messages: Sequence[Message], about: Conversation | None = None) -> str:
        """The text up to where the model answers, as in training. `about`: see `render`. Raises UnrenderableError."""
        folded = fold_system(messages)
        if folded is not None and self._folds(messages, about):
            return self.prompt(folded, about)
        try:
            if OWN_PROMPT in self.template:
                return self._apply(messages, about, ask=True).rstrip(" ")
            answered = self._apply([*messages, Message("assistant", OPEN)], about)
            if OPEN not in answered:
                raise UnrenderableError("the template leaves out the assistant message")
        except UnrenderableError:
            if folded is None:
                raise
            return self.prompt(folded, about)
        return answered[: self._asked(messages, answered, answered.rindex(OPEN), about)]

    def _folds(self, messages: Sequence[Message], about: Conversation | None) -> bool:
        """Whether a conversation that begins so is rendered with its system message in front of the first user message."""
        answered = [*messages, Message("assistant", "Hello!")]
        for each, folded in ((answered, False), (fold_system(answered) or answered, True)):
            with suppress(UnrenderableError):
                self._locate(each, about)
                return folded
        return False

    def on_its_day(self, template: str) -> str:
        """A template's text with this template's date in place of today."""
        return dated(template, self.date)

    def text(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The template's text for these messages, with its own generation prompt if `ask` is set. Raises UnrenderableError."""
        return self._apply(messages, ask=ask)

    def elsewhere(self, template: str) -> "ChatTemplate":
        """A template with this tokenizer as other programs use it: without the variables set here."""
        other = copy.copy(self)
        other.template, other._dated, other.variables = template, dated(template, self.date), {}
        other.__dict__.pop("is_ambiguous", None)
        return other

    @cached_property
    def is_ambiguous(self) -> bool:
        """Whether plain answers do not follow the template's generation prompt, so that the prompt in training depends on the
        answers: with reasoning, or without."""
        question = [Message("user", "Hello.")]
        try:
            return self._apply(question, ask=True).rstrip(" ") != self.prompt(question)
        except UnrenderableError:
            return False

    def makes_other_tokens(self, text: str, ids: np.ndarray) -> bool:
        """Whether the tokenizer of Transformers' class makes other tokens of a text than `ids`."""
        if self._by_class is None:
            return False
        try:
            return bool(self._by_class(text, add_special_tokens=False)["input_ids"] != ids.tolist())
        except Exception:  # a class for another vocabulary may fail on any text
            return True

    def _asked(self, before: Sequence[Message], text: str, begin: int, about: Conversation | None = None) -> int:
        """The end, in the rendered `text`, of the prompt for the response to `before`, whose content begins at `begin`.

        It is the generation prompt if only white space follows before the content. Else it is all text before the content: some
        templates write more there (an empty reasoning block), or have no generation prompt. Never ends in a space: tokens begin
        with their space, so that an answer would have another first token.
        """
        own = self._own_prompt(before, text, about)
        end = own if own is not None and own <= begin and not text[own:begin].strip() else begin
        return len(text[:end].rstrip(" "))

    def _own_prompt(self, before: Sequence[Message], text: str, about: Conversation | None) -> int | None:
        """The end of the template's generation prompt after these messages in `text`; None if that does not begin with it."""
        try:
            own = self._apply(before, about, ask=True)
        except UnrenderableError:  # no messages, or messages that it refuses without an answer
            return None
        return len(own) if own and text.startswith(own) else None

    def _before_answer(self, before: Sequence[Message], text: str, about: Conversation | None) -> int | None:
        """As `_own_prompt`; else where a plain answer to these messages would begin, if `text` agrees up to there."""
        end = self._own_prompt(before, text, about)
        if end is not None:
            return end
        plain = self._apply([*before, Message("assistant", OPEN)], about)
        prefix = plain[: plain.rfind(OPEN)]
        return len(prefix) if OPEN in plain and text.startswith(prefix) else None

    def _locate(self, messages: Sequence[Message], about: Conversation | None) -> Rendered:
        text = self._apply(messages, about)

        def apply(changed: Sequence[Message]) -> str:
            return self._apply(changed, about)

        learnt = [index for index, message in enumerate(messages) if message.is_response]
        try:
            if any(message.more for message in messages if message.role == "assistant"):
                raise UnrenderableError("the template rewrites a message")
            every = places(messages, text, apply)
            found = {index: every[index] for index in learnt}
        except UnrenderableError as error:
            found = self._compared(messages, text, about, error)
        responses = tuple(
            self._response(place, self._asked(messages[:index], text, place.begin, about), text)
            for index, place in found.items()
        )
        return Rendered(text, responses, marks=frozenset(self._marks(messages, text, about, found)))

    def _compared(
        self, messages: Sequence[Message], text: str, about: Conversation | None, error: UnrenderableError
    ) -> dict[int, Place]:
        """Places of the responses if marks for all contents do not find them. Raises `error` if comparing does not either."""
        end = None if self.end_of_turn is None else self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        try:
            return response_places(
                messages,
                text,
                lambda changed: self._apply(changed, about),
                asked=lambda index: self._before_answer(messages[:index], text, about),
                end_text=end,
            )
        except UnrenderableError as other:
            raise (other if any(message.more for message in messages) else error) from None

    def _response(self, place: Place, asked: int, text: str) -> Response:
        words = text[place.begin + place.own : place.end]
        offset = words_offset(words) if words else 0
        return Response(asked, place.begin, place.end, place.gap_end, place.skipped, place.own, offset)

    def _marks(
        self, messages: Sequence[Message], text: str, about: Conversation | None, found: Mapping[int, Place]
    ) -> list[str]:
        """What the template ignores, control tokens in texts, and whether the last response is trained after the template's own
        generation prompt, if that matters."""
        marks = ["reasoning_dropped"] if any(place.dropped for place in found.values()) else []
        if self.is_ambiguous and found:
            last = max(found)
            own = self._own_prompt(messages[:last], text, about)
            if own is not None and self._asked(messages[:last], text, found[last].begin, about) == len(
                text[:own].rstrip(" ")
            ):
                marks.append("own_prompt")
        if about is not None and about.tools and self._apply(messages, replace(about, tools=())) == text:
            marks.append("tools_dropped")
        keys = {key for message in messages for key in message.more if key not in _TOLD_BY_ROLE}
        if any(not re.search(rf"\b{re.escape(key)}\b", self.template) for key in keys):
            marks.append("keys_dropped")
        if any(self._control.search(message.content) for message in messages):
            marks.append("control_tokens")
        return marks

    def _apply(self, messages: Sequence[Message], about: Conversation | None = None, *, ask: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content, **message.more} for message in messages]
        options = {**self.variables, **(about.variables if about else {})}
        options |= {"chat_template": self._dated, "tokenize": False, "add_generation_prompt": ask}
        tools = list(about.tools) if about and about.tools else None
        try:
            return str(self.tokenizer.apply_chat_template(turns, tools=tools, **options))
        except Exception as error:  # a template is a program, and may raise anything
            if not any(message.more.get("tool_calls") for message in messages):
                raise UnrenderableError(f"the template refuses it: {error}") from None
        try:  # some templates expect a call's arguments as JSON text, as OpenAI has them
            return str(self.tokenizer.apply_chat_template([_as_text(turn) for turn in turns], tools=tools, **options))
        except Exception as error:
            raise UnrenderableError(f"the template refuses it: {error}") from None

    def _find_end_of_turn(self) -> int | None:
        """The first special or added token that the template writes after the last response."""
        rendered = self.render([Message("user", "Hello."), Message("assistant", "Hello!")])
        encoded = encode_with_spans(self.tokenizer, rendered.text)
        table = token_bytes(self.tokenizer)
        content_end = len(rendered.text[: rendered.responses[-1].end].encode())
        for token, (begin, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
            if begin >= content_end and end > begin and (token in table.added or token in table.special):
                return int(token)
        return None


def choose_template(given: Any, name: str | None, model: str) -> str:
    """The template of this name (default: `default`) among a model's own. Raises ModelError with the names."""
    if not given:
        raise ModelError(f"{model}: has no chat template; a recipe can give it one: set chat_template for it")
    if isinstance(given, str):
        if name in (None, "default"):
            return given
        raise ModelError(f"{model}: has one chat template without a name, none called {name}")
    names = ", ".join(sorted(given))
    if name is None and "default" in given:
        _tell_names(model, names)
    if (name or "default") not in given:
        raise ModelError(
            f"{model}: has no chat template {name or 'default'}; it has {names}: choose one by chat_template: {{name: …}}"
        )
    return str(given[name or "default"])


@cache
def _tell_names(model: str, names: str) -> None:
    """Logs the names, once for each model."""
    log.warning(
        "%s: has several chat templates (%s); default is used: chat_template: {name: …} takes another", model, names
    )


def _as_text(turn: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls' arguments as JSON text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", ())
    ]
    return {**turn, "tool_calls": calls} if calls else turn
