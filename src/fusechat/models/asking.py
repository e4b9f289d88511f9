"""How a model is prompted, and how its generated tokens become an answer: the same for all backends."""

from collections.abc import Sequence
from typing import Any

from fusechat.data.conversations import Message
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.load import stop_tokens, without_embedding
from fusechat.models.templates import UnrenderableError


class Asking:
    """Encodes prompts and decodes answers. `room`: maximum tokens of prompt and answer together; `rows`: the size of the
    embedding; `stops`: tokens that end an answer, besides the stop strings. `template`: the model's, if it is open
    already."""

    def __init__(self, chat_model: ChatModel, template: Any = None) -> None:
        self.template = template or chat_model.template()
        self.tokenizer = self.template.tokenizer
        self.room = chat_model.positions() or 1 << 30
        self.rows = chat_model.vocabulary_size()
        self.stops = stop_tokens(chat_model.generation_config(), self.tokenizer, self.template.end_of_turn)
        self.stop_texts = list(chat_model.stop)

    def encode(self, prompt: Prompt) -> list[int] | Missing:
        """The tokens of the rendered prompt, or Missing."""
        about = prompt.about
        messages = about.messages if about else [Message(role, content) for role, content in prompt.messages]
        try:
            text = self.template.prompt(messages, about)
        except UnrenderableError as error:
            return Missing(str(error))
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        wrong = without_embedding(tokens, self.rows, self.tokenizer)
        if wrong:
            return Missing(f"its prompt has {wrong}")
        if len(tokens) >= self.room:
            return Missing(f"its prompt leaves no room in the model's {self.room} tokens")
        return tokens

    def answer(self, row: Sequence[int]) -> Answer:
        """The answer in generated tokens, up to the token or stop string that ends it, without this."""
        end = next((at for at, token in enumerate(row) if token in self.stops), None)
        kept = list(row if end is None else row[:end])
        text = self._decode(kept)
        at = cut(text, self.stop_texts)
        if at is None:
            return Answer(text.strip(), len(kept), end is not None, tuple(kept), None if end is None else row[end])
        text = text[:at].strip()
        while kept and self._decode(kept[:-1]).strip().startswith(text):
            kept = kept[:-1]
        return Answer(text, len(kept), True, tuple(kept))

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def cut(text: str, stop: Sequence[str]) -> int | None:
    """The index of the first of several strings in the text; None if there is none."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)
