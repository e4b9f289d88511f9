"""What vLLM answers, for tests without vLLM: `prompt_logprobs` of a real tiny model as vLLM 0.32 writes them, and a server on
loopback that speaks as its OpenAI-compatible server does, refusals included."""

import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.data.prepared import Prepared
from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference


@dataclass
class Logprob:
    """As vLLM's own class."""

    logprob: float
    rank: int | None
    decoded_token: str | None = None


def chat_model(directory: Path, name: str = "pivot") -> ChatModel:
    return ChatModel(name, Reference((str(directory),)))


def conversation(tokens: Sequence[int], rows: Sequence[int] | None = None, name: str = "one") -> Prepared:
    """Tokens, of which those at `rows` (all but the first) are a response."""
    position = np.array(range(1, len(tokens)) if rows is None else rows, dtype=np.int32)
    none = np.zeros_like(position)
    return Prepared(name, np.array(tokens, np.int32), position, none, none, none, none.astype(bool), none[:1])


def naive(logprobs: np.ndarray, tokens: Sequence[int], k: int) -> list[dict[int, Logprob] | None]:
    """vLLM's answer: for each token after the first, itself and the k most likely. `logprobs` float [tokens - 1, V]."""
    found: list[dict[int, Logprob] | None] = [None]
    for row, token in zip(logprobs, tokens[1:], strict=True):
        entries = {int(token): Logprob(float(row[token]), int((row >= row[token]).sum()))}
        for rank, likely in enumerate(np.argsort(-row, kind="stable")[:k].tolist(), start=1):
            entries[likely] = Logprob(float(row[likely]), rank)
        found.append(entries)
    return found


def as_json(found: list[dict[int, Logprob] | None]) -> Any:
    """What a client gets of it from a server: keys are strings, and -inf is -9999."""
    clamped = [
        entries and {token: vars(entry) | {"logprob": max(entry.logprob, -9999.0)} for token, entry in entries.items()}
        for entries in found
    ]
    return json.loads(json.dumps(clamped))


@dataclass
class Engine:
    """A model as a server has it, and how the server behaves."""

    model: Any
    tokenizer: Any
    name: str = "served"
    root: str = "/elsewhere"
    max_logprobs: int = 20
    max_model_len: int = 256
    key: str | None = None
    busy: int = 0  # requests that get 503 first
    others: tuple[str, ...] = ()
    asked: list[dict[str, Any]] = field(default_factory=list)

    def get(self, path: str) -> tuple[int, Any]:
        if path != "/v1/models":
            return 404, {"detail": "Not Found"}
        cards = [{"id": self.name, "root": self.root, "max_model_len": self.max_model_len}]
        return 200, {"object": "list", "data": cards + [{"id": other, "root": "/other"} for other in self.others]}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        self.asked.append(body)
        if self.busy > 0:
            self.busy -= 1
            return 503, {"error": {"message": "busy"}}
        if "prompt_logprobs" not in body:
            return self.generate(body)
        return self.complete(body["prompt"], body["prompt_logprobs"], body["model"])

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The most likely tokens, one after the other, whatever the temperature."""
        tokens, found = list(body["prompt"]), []
        if len(tokens) + body["max_tokens"] > self.max_model_len:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        ended = False
        while len(found) < body["max_tokens"] and not ended:
            with torch.inference_mode():
                found.append(int(self.model(torch.tensor([tokens + found])).logits[0, -1].argmax()))
            text = self.tokenizer.decode(found, skip_special_tokens=True)
            ended = found[-1] in body["stop_token_ids"] or any(stop in text for stop in body.get("stop", ()))
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        return 200, {"choices": [choice | ({"token_ids": found} if body.get("return_token_ids") else {})]}

    def complete(self, tokens: list[int], k: int, name: str) -> tuple[int, Any]:
        if name != self.name:
            return _error(404, f"The model `{name}` does not exist.")
        if len(tokens) >= self.max_model_len:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        if max(tokens) >= self.model.config.vocab_size:
            return _error(400, f"Token id {max(tokens)} is out of vocabulary")
        if k > self.max_logprobs:
            return _error(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens])).logits[0, :-1].double()
        logprobs = logits.log_softmax(dim=1).numpy()
        if np.isnan(logprobs).any():
            return _error(400, "Out of range float values are not JSON compliant")
        return 200, {"choices": [{"index": 0, "text": "x", "prompt_logprobs": as_json(naive(logprobs, tokens, k))}]}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@contextmanager
def serving(engine: Any) -> Iterator[str]:
    """Runs a server with `get` and `post` as above on a free port of loopback; gives its root URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(engine.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = getattr(engine, "key", None)
            if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                return self.reply((401, {"error": "Unauthorized"}))
            return self.reply(engine.post(self.path, body))

        def reply(self, answer: tuple[int, Any]) -> None:
            status, content = answer
            data = content if isinstance(content, bytes) else json.dumps(content, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def differences(found: Any, expected: Any) -> tuple[float, float, float]:
    """How far two captures are apart: of the log-probabilities by place, of the nll, and of the log-probabilities by token,
    where a token that the other does not have counts as if it were the other's last. The greatest of each, in nats."""
    assert found.ids.shape == expected.ids.shape
    assert found.ids.dtype == np.int32
    assert found.nll.dtype == np.float32
    by_token = 0.0
    for one, other in ((found, expected), (expected, found)):
        for ids, values, other_ids, other_values in zip(
            one.ids.tolist(), one.logprobs.tolist(), other.ids.tolist(), other.logprobs.tolist(), strict=True
        ):
            there = dict(zip(other_ids, other_values, strict=True))
            assert len(there) == len(other_ids)
            floor = min(other_values, default=-math.inf)
            apart = [abs(value - there.get(token, floor)) for token, value in zip(ids, values, strict=True)]
            by_token = max(by_token, *apart)
    return (
        float(np.abs(found.logprobs - expected.logprobs).max()),
        float(np.abs(found.nll - expected.nll).max()),
        by_token,
    )
