"""What a model is asked, and what it answers: here, by vLLM, by a server."""

from dataclasses import dataclass, field

from fusechat.data.messages import Conversation


@dataclass(frozen=True)
class Prompt:
    """`messages`: (role, content) pairs that end with the user's; `about`: the conversation that they are all of, with what else
    its messages hold, its tools and variables. `key`: unique in its suite, together with `sample`, the number among several
    answers to one question. `top_p`: the share of the probability, of the most likely tokens, that is drawn from."""

    key: str
    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    sample: int = 0
    about: Conversation | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """`complete`: it ended by itself, not where it became too long. `tokens`: how many, None where a server does not tell;
    `ids`: the tokens as they were generated, without what ended them, where they are known."""

    text: str
    tokens: int | None
    complete: bool
    ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Missing:
    """There is no answer. `reason`: one line. `for_good`: it would be the same if asked again."""

    reason: str
    for_good: bool = True
