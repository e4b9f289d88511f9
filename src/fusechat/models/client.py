"""Chat completions of an OpenAI-compatible server, several at a time, stored in a journal as they arrive.

The client library's own retries are not used: they have no deadline for an answer that arrives byte by byte.
"""

import asyncio
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fusechat.errors import ModelError, RecipeError, WorkdirError
from fusechat.models.answers import Missing
from fusechat.models.completions import Reply, Request, clean, reply_of
from fusechat.models.journal import Journal, read_journal
from fusechat.models.server_errors import OTHER_SHAPE, Fault, fault_of
from fusechat.run.extras import import_extra
from fusechat.run.progress import log, progress

JUDGE_KEYS = ("FUSECHAT_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set counts
MODEL_KEY = "FUSECHAT_MODEL_KEY"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a retry; doubles each time
_PATIENT, _MOST_PATIENT = 60.0, 600.0  # seconds that a server may ask to wait: without a log line, and at most
_CONNECT = 10.0  # seconds for a connection
_IN_A_ROW = 5  # failed requests without any reply of the server
_UNSUPPORTED = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|extra inputs", re.IGNORECASE)
# Of what a server does not support.
_INSTEAD = {"max_tokens": "max_completion_tokens", **dict.fromkeys(("temperature", "top_p", "stop", "seed"))}


@dataclass(frozen=True)
class Estimate:
    """`calls`: distinct requests; `answered`: those in the journal. The tokens are of the others: prompt tokens estimated at
    four bytes each, completion tokens at most."""

    judge: str
    calls: int
    answered: int
    prompt_tokens: int
    completion_tokens: int

    def __str__(self) -> str:
        before = f", {self.answered:,} of them answered before" if self.answered else ""
        tokens = f"about {self.prompt_tokens:,} tokens to read, at most {self.completion_tokens:,} to write"
        return f"judge {self.judge}: {self.calls:,} call{'' if self.calls == 1 else 's'}{before}; {tokens}"


class Client:
    """One model of one server. `model` and `address` may be printed.

    `what`: its name in errors, such as --judge-url. `timeout`: seconds for one try; `retries`: further tries. `key_names`: the
    environment variables of `key`. Raises RecipeError for a URL that is invalid or contains a key, a key that cannot be sent,
    and if the package `openai` is missing.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key: str | None,
        what: str,
        concurrency: int = 8,
        timeout: float = 300.0,
        retries: int = 5,
        key_names: Sequence[str] = JUDGE_KEYS,
    ) -> None:
        self._key_names = " or ".join(key_names)
        what = what.replace(url, "a URL") if any(sign in url for sign in "@?#") else what  # it may contain a key
        check_url(url, what, self._key_names)
        self._openai = import_extra("openai", f"{what}: the client of the server", "judge")
        self.address = url.rstrip("/")
        self.model = model
        self._key = (key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise RecipeError(f"{what}: the key in {self._key_names} has characters that no key has")
        self._who = what if self.address in what else f"{what}: the server at {self.address}"
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._instead: dict[str, str | None] = {}  # parameters that this server names differently, or lacks
        self._replied, self._refusals = False, 0  # whether it ever answered, and refusals since
        self._heard = self._told = False  # it replied at all; a long wait was logged
        self._in_a_row = 0

    def ask(self, requests: Sequence[Request], journal: Path, *, description: str) -> list[Reply | Missing]:
        """One result for each request, in order. Equal requests, and those in the journal, are not sent again.

        Each reply is in the journal as soon as it arrives. Missing ones are not, and are asked again next time. Raises
        ModelError if all requests would fail: no server, no such model, a refused key, no credit.
        """
        keys = [request.key(self.model) for request in requests]
        missing: dict[str, Missing] = {}
        with Journal(journal) as answered:
            waiting = {key: one for key, one in zip(keys, requests, strict=True) if key not in answered}
            if waiting:
                with progress(description, len(waiting), "requests") as advance:

                    def done(key: str, result: Reply | Missing) -> None:
                        if isinstance(result, Missing):
                            missing[key] = result
                        else:
                            answered.add(key, asdict(result))
                        advance(1, f"{len(missing)} without an answer" if missing else "")

                    asyncio.run(self._all(waiting, done))
            return [missing[key] if key in missing else _from_journal(answered[key], journal) for key in keys]

    def estimate(self, requests: Sequence[Request], journal: Path) -> Estimate:
        """What `ask` would send. Sends and writes nothing."""
        answered = read_journal(journal)
        distinct = {request.key(self.model): request for request in requests}
        waiting = [request for key, request in distinct.items() if key not in answered]
        read = sum(len(clean(text).encode()) for request in waiting for _, text in request.messages)
        return Estimate(
            judge=f"{self.model} at {self.address}",
            calls=len(distinct),
            answered=len(distinct) - len(waiting),
            prompt_tokens=math.ceil(read / 4),
            completion_tokens=sum(request.max_tokens for request in waiting),
        )

    async def _all(self, waiting: dict[str, Request], done: Callable[[str, Reply | Missing], None]) -> None:
        queue = iter(waiting.items())
        # without a key a placeholder is sent: the client would else send OPENAI_API_KEY to another server
        async with self._openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key or "none",
            timeout=self._openai.Timeout(self._timeout, connect=_CONNECT),
            max_retries=0,
        ) as client:
            tasks = [
                asyncio.create_task(self._work(client, queue, done))
                for _ in range(min(self._concurrency, len(waiting)))
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(
        self, client: Any, queue: Iterator[tuple[str, Request]], done: Callable[[str, Reply | Missing], None]
    ) -> None:
        for key, request in queue:
            done(key, await self._answer(client, request))

    async def _answer(self, client: Any, request: Request) -> Reply | Missing:
        tried = 0
        while True:
            body = self._body(request)
            result = await self._try(client, body, logprobs=request.top_logprobs is not None)
            if isinstance(result, Reply):
                self._replied, self._refusals = True, 0
                return result
            self._refuse_hopeless(result)
            if self._adapts(result, body):
                continue
            tried += 1
            if not result.may_pass:
                return Missing(result.said)
            if tried > self._retries:
                self._give_up(result)
                said = f"{result.said}, asked {tried} times" if tried > 1 else result.said
                return Missing(said, for_good=False)
            await asyncio.sleep(self._pause(result, tried))

    async def _try(self, client: Any, body: dict[str, Any], *, logprobs: bool) -> Reply | Fault:
        """Sends one request. A fault's text never contains the key."""
        try:
            async with asyncio.timeout(self._timeout):
                answer = await client.post("/chat/completions", body=body, cast_to=object)
            result: Reply | Fault = reply_of(answer, logprobs=logprobs)
        except (self._openai.OpenAIError, TimeoutError, *OTHER_SHAPE) as error:
            result = fault_of(error, self._openai, timeout=self._timeout, secret=self._key)
        if isinstance(result, Reply) or result.heard:
            self._heard, self._in_a_row = True, 0
        return result

    def _body(self, request: Request) -> dict[str, Any]:
        body = request.body(self.model)
        names = {name: self._instead.get(name, name) for name in body}
        return {new: body[name] for name, new in names.items() if new is not None}

    def _adapts(self, fault: Fault, body: dict[str, Any]) -> bool:
        """Whether the request can be changed because the server does not support a parameter. Later requests are changed too."""
        if fault.status not in (400, 422) or not _UNSUPPORTED.search(f"{fault.code} {fault.said}"):
            return False
        for name, instead in _INSTEAD.items():
            if name in body and (fault.param == name if fault.param else re.search(rf"\b{name}\b", fault.said)):
                if name not in self._instead:  # logged by one of several requests
                    what = f"it is asked for {instead} instead" if instead else f"{name} is left out from here on"
                    log.log(20 if instead else 30, "%s: %s; %s", self._who, fault.said, what)
                self._instead[name] = instead
                return True
        return False

    def _refuse_hopeless(self, fault: Fault) -> None:
        """Raises ModelError for a fault that every request would have."""
        said = None
        self._refusals += fault.status in (403, 404, 405)
        alone = self._replied and self._refusals < _IN_A_ROW  # it answered others, so only this request is refused
        if fault.status == 401 or (fault.status == 403 and not alone):
            said = f"refuses the key; {self._key_names} in the environment has to hold it"
            said += f" ({fault.said})" if fault.status == 403 else ""  # 401: servers repeat parts of the key
        elif fault.status in (404, 405) and not alone:
            said = f"has no model {self.model}, or the URL is not the one that ends in /v1 ({fault.said})"
        elif fault.status == 402 or fault.code == "insufficient_quota":
            said = fault.said
        elif fault.kind == "refused" and not self._heard:
            said = f"{fault.said}; is it running?"
        if said:
            raise ModelError(f"{self._who}: {said}")

    def _give_up(self, fault: Fault) -> None:
        """Raises ModelError after several failed requests without any reply of the server."""
        if fault.heard:
            return
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise ModelError(
                f"{self._who}: {fault.said}, {self._in_a_row} requests in a row; is it running? What was answered is kept; "
                "run again to continue"
            )

    def _pause(self, fault: Fault, tried: int) -> float:
        """Seconds until the next try: what the server asks for, plus a random part."""
        wait = random.uniform(0.5, 1.0) * min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tried - 1))
        if fault.wait is None:
            return wait
        patience = min(fault.wait, _MOST_PATIENT)
        if patience > _PATIENT and not self._told:
            self._told = True
            log.warning("%s: asks to wait %.0f s (%s); waiting %.0f s", self._who, fault.wait, fault.said, patience)
        return patience + wait


def judge_key() -> str | None:
    """The judge's key: FUSECHAT_JUDGE_KEY, else OPENAI_API_KEY; None if the first is set and empty."""
    return next((os.environ[name] for name in JUDGE_KEYS if name in os.environ), None) or None


def model_key() -> str | None:
    """The key of a server with a measured model."""
    return os.environ.get(MODEL_KEY) or None


def check_url(url: str, what: str, key_names: str) -> None:
    """Raises RecipeError, naming the option `what`, for a URL that is invalid or contains a key."""
    if not url.startswith(("http://", "https://")):
        raise RecipeError(f"{what}: should be a URL that starts with http:// or https://")
    try:
        parts = urlsplit(url)
        host = parts.hostname and (parts.port or 1)
    except ValueError:
        host = None
    if not host or not url.isprintable() or " " in url:
        raise RecipeError(f"{what}: this is no URL of a server")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(
            f"{what}: should be a URL without user, password, ? and #; keys come from the environment: {key_names}"
        )


def _from_journal(value: Any, journal: Path) -> Reply:
    try:
        return Reply(**value)
    except TypeError as error:
        raise WorkdirError(f"{journal}: is the journal of something else; it holds no replies of a server") from error
