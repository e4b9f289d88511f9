"""Servers of chat completions for tests: a real one that serves a small model, a canned one, and a proxy that misbehaves."""

import importlib.util
import itertools
import json
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fusechat.models.client import Client, Request

_SERVE = """
import sys
from xllamacpp import CommonParams, Server
from xllamacpp.xllamacpp import CommonGrammar
p = CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], 0
p.n_ctx, p.n_parallel, p.n_gpu_layers = 32768, 4, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # more wait for each other where others compute as well
p.warmup = False
if sys.argv[2]:
    p.sampling.grammar = CommonGrammar(1, sys.argv[2])  # 1: as the user wrote it
server = Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the test that started it ends, however it does
"""
PASSING = ("cut", "half", "429", "500", "503", "nonsense", "shape", "drip")  # faults after which asking again helps
_DRIP = 0.2  # seconds a byte
# The model cannot judge; but its first letter depends on what it read, and here everything else goes by that letter.
GRADES = """\
root ::= [b-k] " [[3]] [[A]]" | "l [[10]] [[B]]" | [no] " [[4.5]] [[C]]" | others
others ::= [pqr] " [6] [[A]]" | [st] " will not say" | [u-z] " [[2]] [[A]]"
"""


@contextmanager
def real_server(grammar: str | None = None) -> Iterator[str]:
    """The tiny llama behind llama.cpp's own server, in a process of its own; gives the URL that ends in /v1. `grammar`: what all
    its answers keep to; log-probabilities are the model's all the same."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    place = tempfile.TemporaryDirectory()
    command = [sys.executable, "-c", _SERVE, str(_judge(Path(place.name))), grammar or ""]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "the server is not ready"
        root = process.stdout.readline().strip()
        assert root, "the server ended"
        yield f"{root}/v1"
    finally:
        process.kill()
        process.communicate()
        place.cleanup()


def _judge(directory: Path) -> Path:
    """The tiny llama with a head of its own, by which m and M, AlpacaEval's names of the two outputs, are mostly the likeliest: all
    that is read goes a little in one direction, and these two go there far. No answer has half a character."""
    tokenizer = tiny.tokenizer_of("llama")
    model = tiny.model_of("llama", tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.3
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["m", "M"])] += 10
        model.lm_head.weight[[number for token, number in tokenizer.get_vocab().items() if not token.isascii()]] = 0
    return tiny.write_gguf(directory / "judge.gguf", model, tokenizer)


def completion(text: str | None, *, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"object": "chat.completion", "choices": [choice | {"logprobs": logprobs}], "usage": usage}


@dataclass
class Canned:
    """Answers the same to the same question, after `delay` seconds; after `pauses_after` questions none until `go_on` is set.
    To be overridden: `answer`."""

    delay: float = 0.0
    pauses_after: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "File Not Found"}}
        self.asked.append(body)
        time.sleep(self.delay)
        if self.pauses_after is not None and len(self.asked) > self.pauses_after:
            self.go_on.wait(60)
        return self.answer(body)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, completion(f"Answer to {body['messages'][-1]['content']}: [[7]]")


@dataclass
class Remembered(Canned):
    """Passes on to `upstream` (a URL that ends in /v1) what it was not asked before; so that the same question gets the same
    answer, which a real model's may not be to the last bit: it depends on what else it reads meanwhile."""

    upstream: str = ""
    _known: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        asked = json.dumps(body, sort_keys=True)
        if asked not in self._known:
            url, headers = (
                f"{self.upstream}/chat/completions",
                {"Content-Type": "application/json", "Authorization": None},
            )
            self._known[asked] = _forward(url, asked.encode(), headers)
        return self._known[asked]


@contextmanager
def canned(server: Canned | None = None) -> Iterator[str]:
    """Serves it; gives the URL that ends in /v1."""
    upstream = server or Canned()

    def handle(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        status, content = upstream.post(handler.path, json.loads(body))
        _send(handler, status, content if isinstance(content, bytes) else json.dumps(content).encode())

    with _listening(handle) as (url, _):
        yield url


@dataclass
class Misbehaving:
    """A proxy before `upstream` (a URL that ends in /v1). Each request takes the next of `faults`, None to pass it on; where
    they end, all are passed on.

    cut        closes the connection                half       does so within the body of the answer
    nonsense   answers what is no JSON              shape      JSON of another shape
    drip       the answer, a byte every 0.2 s       no score   the answer with another text
    429        with Retry-After: `retry_after`      400, …     the status, with a message
    """

    upstream: str
    faults: Iterable[str | None] = ()
    retry_after: str = "1"
    got: int = 0
    passed: int = 0  # of those, answered in full by the upstream
    authorizations: set[str | None] = field(default_factory=set)
    settle: Callable[[], None] = lambda: None  # waits until nobody is connected
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.script(self.faults)

    def script(self, faults: Iterable[str | None]) -> None:
        """What the next requests get, and none that was sent before."""
        self.settle()
        self._next = itertools.chain(faults, itertools.repeat(None))

    def handle(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self._lock:
            self.got += 1
            self.authorizations.add(handler.headers["Authorization"])
            fault = next(self._next)
        if fault == "cut":
            handler.close_connection = True
        elif fault == "nonsense":
            _send(handler, 200, b'{"choices": [{"mess')
        elif fault == "shape":
            _send(handler, 200, b'{"object": "chat.completion", "choices": []}')
        elif fault is not None and fault.isdigit():
            wait = {"Retry-After": self.retry_after} if fault == "429" else {}
            _send(handler, int(fault), json.dumps({"error": {"message": f"told to say {fault}"}}).encode(), wait)
        else:
            self._pass_on(handler, body, fault)

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str | None) -> None:
        status, answer = _forward(self.upstream.removesuffix("/v1") + handler.path, body, handler.headers)
        if fault == "no score":
            answer = json.dumps(json.loads(answer) | completion("I would rather not say.")).encode()
        if fault in ("half", "drip"):
            _head(handler, status, len(answer))
            for byte in answer if fault == "drip" else ():
                handler.wfile.write(bytes([byte]))
                time.sleep(_DRIP)
            handler.wfile.write(answer[: len(answer) // 2] if fault == "half" else b"")
            handler.close_connection = True
            return
        with self._lock:
            self.passed += 1
        _send(handler, status, answer)


@contextmanager
def misbehaving(upstream: str, faults: Iterable[str | None] = ()) -> Iterator[tuple[str, Misbehaving]]:
    """The URL of a proxy on loopback, which ends in /v1, and the proxy."""
    proxy = Misbehaving(upstream, faults)
    with _listening(proxy.handle) as (url, proxy.settle):
        yield url, proxy


class _Server(ThreadingHTTPServer):
    """Knows which of its connections are open."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._accepted: set[Any] = set()
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self._accepted.add(client_address)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._open.discard(request)

    def settle(self) -> None:
        """Waits until all who connected before now were heard and are gone. A client that keeps its connection is waited for."""
        until = time.monotonic() + 30
        with socket.create_connection(self.server_address[:2]) as last:  # connections are accepted in their order
            while last.getsockname() not in self._accepted:
                assert time.monotonic() < until, "the server accepts no connection"
                time.sleep(0.005)
        while self._open:
            assert time.monotonic() < until, f"{len(self._open)} connections stay open"
            time.sleep(0.005)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@contextmanager
def _listening(handle: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serves what is posted on a free port of loopback; gives the URL with /v1, and what waits until it is idle."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with suppress(ConnectionError):
                handle(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.settle
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _forward(url: str, body: bytes, headers: Any) -> tuple[int, bytes]:
    sent = {name: headers[name] for name in ("Content-Type", "Authorization") if headers[name]}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, sent), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _head(handler: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()


def _send(handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
    _head(handler, status, len(data), headers)
    handler.wfile.write(data)


def question(number: int, **options: Any) -> Request:
    """The `number`-th of requests that are all different."""
    text = f"What is {number} + {number}?"
    return Request((("system", "Be short."), ("user", text)), **({"temperature": 0.0, "max_tokens": 8} | options))


def client(url: str, **options: Any) -> Client:
    return Client(**({"url": url, "model": "judge", "key": None, "what": "--judge-url"} | options))


def journal_keys(path: Path) -> list[str]:
    """Of every line, in order. A last line without its end is left out, as a killed run leaves it."""
    return re.findall(r'^{"key": "(\w+)".*}\n', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
