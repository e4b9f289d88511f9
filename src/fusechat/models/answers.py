"""What a model is asked, and what it answers: here, by vLLM, by a server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """`messages`: (role, content) pairs that end with the user's. `key`: unique in its suite."""

    key: str
    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """`complete`: it ended by itself, not where it became too long. `tokens`: None where a server does not tell."""

    text: str
    tokens: int | None
    complete: bool


@dataclass(frozen=True)
class Missing:
    """There is no answer. `reason`: one line."""

    reason: str
