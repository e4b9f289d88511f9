"""How one model is asked, and what the tokens that it gives say: the same whoever runs it."""

from collections.abc import Sequence

from fusechat.data.conversations import Message
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.load import stop_tokens, without_embedding
from fusechat.models.templates import UnrenderableError


class Asking:
    """`room`: tokens that prompt and answer may have together; `rows`: embeddings that the model has; `stops`: tokens that end an
    answer, beside the strings that do."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.template = chat_model.template()
        self.tokenizer = self.template.tokenizer
        self.room = chat_model.positions() or 1 << 30
        self.rows = chat_model.vocabulary_size()
        self.stops = stop_tokens(chat_model.generation_config(), self.tokenizer, self.template.end_of_turn)
        self.stop_texts = list(chat_model.stop)

    def encode(self, prompt: Prompt) -> list[int] | Missing:
        """The tokens of the asked prompt."""
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
        """What was generated, up to what ends it: a token, or a stop string, of which nothing is kept."""
        end = next((at for at, token in enumerate(row) if token in self.stops), None)
        kept = list(row if end is None else row[:end])
        text = self._decode(kept)
        at = cut(text, self.stop_texts)
        if at is None:
            return Answer(text.strip(), len(kept), end is not None, tuple(kept))
        text = text[:at].strip()
        while kept and self._decode(kept[:-1]).strip().startswith(text):
            kept = kept[:-1]
        return Answer(text, len(kept), True, tuple(kept))

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def cut(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some strings begins, None where there is none."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)
