"""Capture with a vLLM server: `POST /v1/completions` with token ids as the prompt and `prompt_logprobs`, several at a time.

Compares the server's model with the recipe's as far as it can: name, limits, vocabulary, tokenizer.
"""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.models.prompt_logprobs import refuse_long, sparse_distribution
from fusechat.models.server_errors import OTHER_SHAPE, root_cause, said_by_server
from fusechat.run.extras import import_extra
from fusechat.run.progress import Advance, log

T = TypeVar("T")
R = TypeVar("R")
KEY = "VLLM_API_KEY"  # the environment variable of vLLM's own server
_AT_ONCE = 16  # concurrent requests; the server makes its own batches
_RETRIES = 5  # after a failed connection, a timeout, 429 and 5xx; the client waits 0.5 to 8 s in between
_PATIENCE, _CONNECT = 1800.0, 10.0  # seconds for an answer, queueing included, and for a connection
_TEXT = "The quick brown fox jumps over the lazy dog: 12 + 34 = 46, größer als 45. 你好 🙂 def f(x): return x"
_COMPARED = 8  # last tokens; versions of a tokenizer differ in what they put before a text
_NOT_JSON = "not JSON compliant"  # a server's error when it has to write NaN
_NO_VLLM = "does not answer as vLLM does; is the URL the one that ends in /v1?"


class _Loop:
    """Runs coroutines in a thread of its own, because in a notebook the caller's thread has a loop already."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stops the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Server:
    """A client of one server and one of its models."""

    def __init__(self, chat_model: ChatModel, *, k: int, url: str) -> None:
        self._openai = import_extra("openai", "capture.url: the client of the server", "server")
        self._url = url.rstrip("/")
        self.who = f"capture.url: the server at {self._url}"
        self._name = f"{chat_model.name} ({chat_model.reference})"
        self._vocabulary = chat_model.vocabulary_size()
        self._k = min(k, self._vocabulary)
        self._loop = _Loop()
        self._client = self._openai.AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get(KEY) or "none",
            timeout=self._openai.Timeout(_PATIENCE, connect=_CONNECT),
            max_retries=_RETRIES,
        )
        try:
            self._loop.run(self._open(chat_model))
        except BaseException:
            self.close()
            raise

    def capture(self, conversations: Sequence[Prepared], advance: Advance) -> list[SparseDistribution | None]:
        """One result for each conversation, in order; None if a value is not finite."""
        if self._takes is not None:
            refuse_long(conversations, self._takes, self.who, "start it with a greater --max-model-len, or ")
        return self._loop.run(self._all(conversations, self._ask, advance))

    @property
    def takes(self) -> int | None:
        """Maximum tokens of prompt and answer together, if the server says."""
        return None if self._takes is None else self._takes + 1

    def complete(self, bodies: Sequence[dict[str, Any]], advance: Advance) -> list[dict[str, Any]]:
        """The first completion of each request, as the API returns it. Raises ModelError for a refused one."""
        return self._loop.run(self._all(bodies, self._choice, advance))

    def close(self) -> None:
        """Closes the connections; the server continues. Further calls do nothing."""
        client, self._client = self._client, None
        if client is not None:
            self._loop.run(client.close())
            self._loop.close()

    async def _all(self, items: Sequence[T], ask: Callable[[T], Coroutine[Any, Any, R]], advance: Advance) -> list[R]:
        """The results of `ask` for all items, several at a time."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(item: T) -> R:
            async with gate:
                result = await ask(item)
            advance(1)
            return result

        tasks = [asyncio.create_task(one(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, conversation: Prepared) -> SparseDistribution | None:
        body = {
            "prompt": conversation.input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self._k,
        }
        try:
            found = (await self._choice(body)).get("prompt_logprobs")
        except ModelError as error:
            if _NOT_JSON in str(error.__cause__):
                return None
            raise
        return sparse_distribution(conversation, found, k=self._k, vocabulary=self._vocabulary, who=self.who)

    async def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first completion. `body`: the request without the model's name."""
        try:
            answer = await self._client.post("/completions", body={"model": self._model, **body}, cast_to=object)
            return dict(answer["choices"][0])
        except self._openai.OpenAIError as error:
            raise self._refused(error) from error
        except OTHER_SHAPE as error:
            raise ModelError(f"{self.who}: {_NO_VLLM}") from error

    async def _open(self, chat_model: ChatModel) -> None:
        """Finds the model and sends a short request, so that errors appear before the work begins."""
        names = {
            chat_model.reference.parts[0],
            chat_model.reference.parts[0].partition("@")[0],
            str(chat_model.directory),
        }
        self._model, self._takes = await self._choose(names)
        tokenizer = chat_model.tokenizer()
        await self._ask(_conversation([0, min(self._vocabulary, len(tokenizer)) - 1]))
        ours = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        theirs = await self._tokenize(_TEXT)
        if theirs is not None and theirs[-_COMPARED:] != ours[-_COMPARED:]:
            raise ModelError(f"{self.who}: {self._model} cuts text into other tokens than {self._name}: another model")

    async def _choose(self, names: set[str]) -> tuple[str, int | None]:
        """The model to request, by its possible names, and the maximum tokens of a conversation, if the server says. A server
        with a single model may name it freely."""
        try:
            answer = await self._client.get("/models", cast_to=object)
            cards = {str(card["id"]): card for card in answer["data"]}
        except self._openai.OpenAIError as error:
            raise self._refused(error) from error
        except OTHER_SHAPE as error:
            raise ModelError(f"{self.who}: {_NO_VLLM}") from error
        fitting = [name for name, card in cards.items() if names & {name, card.get("root")}]
        if not fitting and len(cards) != 1:
            served = ", ".join(sorted(cards)) or "nothing"
            raise ModelError(f"{self.who}: serves {served}; none of these names is that of {self._name}")
        name = [*fitting, *cards][0]
        if not fitting:
            log.info("%s serves %s, which is taken to be %s", self.who, name, self._name)
        length = cards[name].get("max_model_len")
        return name, None if length is None else int(length) - 1  # less one for the generated token

    async def _tokenize(self, text: str) -> list[int] | None:
        """The server's tokens of a text, if it has `/tokenize` next to `/v1`."""
        beside = self._client.with_options(base_url=self._url.removesuffix("/v1"), max_retries=0)
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            return list((await beside.post("/tokenize", body=body, cast_to=object))["tokens"])
        except (self._openai.OpenAIError, *OTHER_SHAPE):
            return None

    def _refused(self, error: Exception) -> ModelError:
        """A ModelError that says what to do about the client's exception."""
        said = said_by_server(error)
        limit = re.search(r"greater than max allowed: (\d+)", said)
        if limit:
            what = (
                f"gives at most {limit[1]} tokens a position, and capture.top_k asks for {self._k}; start it with "
                f"--max-logprobs {self._k}, or set capture.top_k: {limit[1]}"
            )
        elif "out of vocabulary" in said:
            what = f"{said}; {self._model} is another model than {self._name}"
        elif isinstance(error, self._openai.APITimeoutError):
            what = "does not answer in time, even when asked again; run again to continue"
        elif isinstance(error, self._openai.APIConnectionError):
            what = f"no connection ({root_cause(error)}); is it running?"
        elif isinstance(error, self._openai.AuthenticationError | self._openai.PermissionDeniedError):
            what = f"refuses the key; the environment variable {KEY} has to hold it"
        elif isinstance(error, self._openai.NotFoundError | self._openai.APIResponseValidationError):
            what = f"{_NO_VLLM} ({said})"
        else:
            what = said
        return ModelError(f"{self.who}: {what}")


def _conversation(tokens: list[int]) -> Prepared:
    """Tokens with rows for all but the first."""
    rows = np.arange(1, len(tokens), dtype=np.int32)
    none = np.zeros_like(rows)
    return Prepared("", np.array(tokens, np.int32), rows, none, none, none, none.astype(bool), none[:1])
