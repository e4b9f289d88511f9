"""What is asked of a server of chat completions, and what it answers."""

import math
from dataclasses import dataclass
from typing import Any

from fusechat.run.files import digest_json

_LEAST_LOGPROB = -9999.0  # what stands for minus infinity, which JSON cannot hold; vLLM writes it too


@dataclass(frozen=True)
class Request:
    """`messages`: (role, content) pairs. With `top_logprobs` the log-probabilities of the answer's tokens are asked for. `stop`:
    strings that end an answer."""

    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_tokens: int
    top_logprobs: int | None = None
    seed: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def key(self, model: str) -> str:
        """SHA-256 of what is asked of which model; the same at any address."""
        return digest_json(
            {
                "model": model,
                "messages": [list(message) for message in self.messages],
                "temperature": float(self.temperature),
                "max_tokens": self.max_tokens,
                "top_logprobs": self.top_logprobs,
                "seed": self.seed,
                **self._if_set,
            }
        )

    @property
    def _if_set(self) -> dict[str, Any]:
        found = {"top_p": self.top_p} if self.top_p < 1 else {}
        return {**found, **({"stop": list(self.stop)} if self.stop else {})}

    def body(self, model: str) -> dict[str, Any]:
        """The JSON to send."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": role, "content": clean(content)} for role, content in self.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.seed is not None:
            body["seed"] = self.seed
        return body | self._if_set


@dataclass(frozen=True)
class Reply:
    """`finish`: "stop", "length", …. `logprobs`: for each token `token`, `logprob` (nats) and `top_logprobs`, a list of the
    same; None where they were not asked for or the server gives none."""

    text: str
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: list[dict[str, Any]] | None = None


def reply_of(answer: Any, *, logprobs: bool) -> Reply:
    """The first choice of a server's answer; without content its text is empty. Raises ValueError, or what comes of looking
    into another shape, where it is no chat completion."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise ValueError(f"no choices in {answer}")
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    content, finish = choice["message"].get("content"), choice.get("finish_reason")
    if not isinstance(content, str | None):
        raise ValueError(f"content: {content}")
    tokens = (choice.get("logprobs") or {}).get("content") if logprobs else None
    return Reply(
        text=clean(content or ""),
        finish=None if finish is None else str(finish),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        logprobs=None if tokens is None else [_entry(one) | {"top_logprobs": _likely(one)} for one in tokens],
    )


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot; pairs become what they stand for."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _count(found: Any) -> int | None:
    return None if found is None else int(found)


def _entry(one: dict[str, Any]) -> dict[str, Any]:
    logprob = float(-math.inf if one["logprob"] is None else one["logprob"])
    if math.isnan(logprob):
        raise ValueError("a log-probability is NaN")
    return {"token": str(one["token"]), "logprob": max(logprob, _LEAST_LOGPROB)}


def _likely(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [_entry(each) for each in one.get("top_logprobs") or []]
