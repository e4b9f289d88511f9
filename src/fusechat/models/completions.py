"""Requests to a chat completions server, and its replies."""

import math
from dataclasses import dataclass
from typing import Any

from fusechat.run.files import digest_json

_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON does not have, as in vLLM


@dataclass(frozen=True)
class Request:
    """A request. `messages`: (role, content) pairs. `top_logprobs`: ask for log-probabilities of the answer's tokens. `stop`:
    strings that end an answer."""

    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_tokens: int
    top_logprobs: int | None = None
    seed: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def key(self, model: str) -> str:
        """SHA-256 of the request and the model, independent of the address."""
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
        """The JSON body."""
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
    """A reply. `finish`: "stop", "length", …. `logprobs`: for each token `token`, `logprob` (nats) and `top_logprobs`, a list of
    the same; None if not requested or not supported."""

    text: str
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: list[dict[str, Any]] | None = None


def reply_of(answer: Any, *, logprobs: bool) -> Reply:
    """The first choice of a server's answer; empty text without content. Raises ValueError, or an error of a lookup in another
    JSON shape, if it is no chat completion."""
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
    """The text with surrogate pairs combined, and without single surrogates, which UTF-8 does not have."""
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
