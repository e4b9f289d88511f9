"""Prompts and answers of models, by any backend."""

from dataclasses import dataclass, field

from fusechat.data.messages import Conversation


@dataclass(frozen=True)
class Prompt:
    """A prompt. `messages`: (role, content) pairs, the user's last. `about`: the conversation that they are from, with its tools
    and variables. `key`, together with `sample` (the number among several answers to one question), is unique in its suite.
    `top_p`: the probability mass of the most probable tokens that are sampled."""

    key: str
    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    sample: int = 0
    about: Conversation | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """An answer. `complete`: it ended by itself, not at its maximum length. `tokens`: their number, None if a server does not
    say. `ids`: the generated tokens if known, without the one that ended them, which is `end`."""

    text: str
    tokens: int | None
    complete: bool
    ids: tuple[int, ...] = field(default=(), compare=False)
    end: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Missing:
    """There is no answer. `reason`: one line. `for_good`: asking again would give the same."""

    reason: str
    for_good: bool = True
