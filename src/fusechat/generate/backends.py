"""Who answers, and who scores: a model in this process, or a server, which answers only."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusechat.data.conversations import Conversation
from fusechat.data.prepared import Prepared
from fusechat.errors import ModelError
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.asking import cut
from fusechat.models.chat_model import ChatModel
from fusechat.models.memory import free_memory
from fusechat.recipe.generate import Server
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run import ranks
from fusechat.run.files import digest_json, scratch
from fusechat.run.progress import Advance

BEYOND_SERVERS = "it has tools, variables or more than texts, which servers are not sent"
BATCH_TOKENS = 16384  # of a batch at most, with the room for answers
JOURNAL = "replies.jsonl"  # no step's, so that a server is not asked again when other prompts are answered


Nll = Callable[[Sequence[Prepared]], Iterator[tuple[int, np.ndarray]]]  # index of each conversation, nats of its rows


class Author(Protocol):
    """Who answers prompts, one answer each in their order. `notes`: what the manifest should tell of how."""

    notes: dict[str, Any]

    def answer(self, prompts: Sequence[Prompt], advance: Advance) -> list[Answer | Missing]: ...

    def close(self) -> None: ...


class Local:
    """A model in this process, by Transformers. `loading`: as `Generator` has it."""

    def __init__(self, chat_model: ChatModel, **loading: Any) -> None:
        from fusechat.models.generator import Generator

        self._generator: Generator | None = Generator(chat_model, batch_tokens=BATCH_TOKENS, **loading)
        self.notes: dict[str, Any] = {}

    def answer(self, prompts: Sequence[Prompt], advance: Advance) -> list[Answer | Missing]:
        assert self._generator is not None
        found = self._generator.answers(prompts, advance)
        if self._generator.most is not None:
            self.notes["answers_at_once"] = self._generator.most
        return found

    def close(self) -> None:
        """Gives the model's memory back."""
        self._generator = None
        free_memory()


class AskedServer:
    """A server that the recipe names at the key `what`. What came is in `journal`, and is not asked for again."""

    def __init__(self, server: Server, what: str, journal: Path) -> None:
        from fusechat.models.client import Client

        key = os.environ.get(server.key_env) if server.key_env else None
        key_names = [server.key_env or f"{what}.key_env"]
        self.client = Client(url=server.url, model=server.model, key=key, what=what, key_names=key_names)
        self._what, self._journal = what, journal

    def estimate(self, requests: Sequence[Any]) -> Any:
        return self.client.estimate(requests, self._journal)

    def ask(self, requests: Sequence[Any], description: str, *, lacking: str) -> list[Any]:
        """Raises ModelError where some lack a reply that a further run may get."""
        replies = self.client.ask(requests, self._journal, description=description)
        waiting = [reply for reply in replies if isinstance(reply, Missing) and not reply.for_good]
        if waiting:
            raise ModelError(
                f"{self._what}: {len(waiting)} of {len(replies)} {lacking} ({waiting[0].reason}); the others are kept: "
                "run again to go on"
            )
        return replies


class Served:
    """A model of a server. What came is in `journal`, and is not asked for again."""

    def __init__(self, name: str, server: Server, *, stop: Sequence[str], seed: int, journal: Path) -> None:
        self._name, self._stop, self._seed = name, tuple(stop), seed
        self._asked = AskedServer(server, f"sources.{name}.server", journal)
        self.notes: dict[str, Any] = {"served_at": self._asked.client.address}

    def answer(self, prompts: Sequence[Prompt], advance: Advance) -> list[Answer | Missing]:
        """Raises as `AskedServer.ask` does."""
        from fusechat.models.client import Request

        found: list[Answer | Missing] = [Missing(BEYOND_SERVERS)] * len(prompts)
        places = [place for place, one in enumerate(prompts) if one.about is None or not beyond_servers(one.about)]
        requests = [
            Request(
                one.messages,
                one.temperature,
                one.max_new_tokens,
                seed=int(digest_json([self._seed, one.key, one.sample])[:7], 16) if one.temperature else self._seed,
                top_p=one.top_p,
                stop=self._stop,
            )
            for one in (prompts[place] for place in places)
        ]
        replies = self._asked.ask(requests, f"answers of {self._name}", lacking="prompts have no answer")
        for place, reply in zip(places, replies, strict=True):
            found[place] = reply if isinstance(reply, Missing) else self._answer(reply)
        return found

    def _answer(self, reply: Any) -> Answer:
        at = cut(reply.text, self._stop)
        return Answer(reply.text[:at].strip(), reply.completion_tokens, at is not None or reply.finish != "length")

    def close(self) -> None:
        pass


def beyond_servers(about: Conversation) -> bool:
    """Whether it holds what servers are not sent."""
    return bool(about.tools or about.variables or any(one.more for one in about.messages))


def share(recipe: Recipe, name: str, count: int) -> list[int]:
    """The shards of this process; a server's answers come to the first one."""
    if name not in (PIVOT, *recipe.models):
        return list(range(count)) if ranks.is_first() else []
    capture = recipe.capture_for(name)
    return ranks.share(count, one_a_machine=capture.backend == "transformers" and capture.device_map is not None)


@contextmanager
def open_author(directory: Path, recipe: Recipe, name: str, prompts: Sequence[Prompt]) -> Iterator[Author]:
    """Who answers for a source, or the pivot. `prompts`: those that will be asked."""
    if name not in (PIVOT, *recipe.models):
        source = recipe.sources[name]
        assert source.server is not None
        yield Served(name, source.server, stop=source.stop or (), seed=recipe.seed, journal=directory.parent / JOURNAL)
        return
    with open_model(directory, recipe, recipe.chat_model(name), prompts) as author:
        yield author


@contextmanager
def open_model(directory: Path, recipe: Recipe, chat_model: ChatModel, prompts: Sequence[Prompt]) -> Iterator[Author]:
    """A model that answers, as the recipe captures one of its name. `prompts`: those that will be asked."""
    capture = recipe.capture_for(chat_model.name)
    with loading(directory, recipe, chat_model.name) as how:
        if capture.backend == "vllm":
            from fusechat.models.vllm_answers import VllmAnswers

            where: dict[str, Any] = {"tensor_parallel": capture.tensor_parallel, "url": capture.url}
            author: Author = VllmAnswers(chat_model, prompts, dtype=capture.dtype, seed=recipe.seed, **where)
        else:
            author = Local(chat_model, seed=recipe.seed, **how)
        with closing(author):
            yield author


@contextmanager
def open_scorer(directory: Path, recipe: Recipe, chat_model: ChatModel) -> Iterator[Nll]:
    """What tells how likely a model finds the rows of conversations."""
    from fusechat.models.load import choose_device
    from fusechat.models.teacher_forcing import TeacherForcing
    from fusechat.models.vllm import open_vllm

    capture = recipe.capture_for(chat_model.name)
    if capture.backend == "vllm":
        where: dict[str, Any] = {"tensor_parallel": capture.tensor_parallel, "url": capture.url}
        length = recipe.data.max_length
        with closing(open_vllm(chat_model, dtype=capture.dtype, k=1, max_length=length, **where)) as backend:
            yield lambda conversations: _captured(backend, conversations)
        return
    name, keys = f"{chat_model.name} ({chat_model.reference})", ("capture.batch_tokens", "data.max_length")
    with loading(directory, recipe, chat_model.name) as how:
        how["device"] = choose_device(how["device"])
        model = chat_model.model(**how)
        yield TeacherForcing(model, batch_tokens=capture.batch_tokens, name=name, keys=keys).nll
    del model
    free_memory()


def _captured(backend: Any, conversations: Sequence[Prepared]) -> Iterator[tuple[int, np.ndarray]]:
    found = backend.capture(conversations, lambda amount=1, note="": None)
    for index, (one, result) in enumerate(zip(conversations, found, strict=True)):
        yield index, np.full(len(one), np.nan, np.float32) if result is None else result.nll


@contextmanager
def loading(directory: Path, recipe: Recipe, name: str) -> Iterator[dict[str, Any]]:
    """How a model is loaded, while there is room for what of it does not fit in memory."""
    capture = recipe.capture_for(name)
    with scratch(directory) as room:
        yield {"dtype": capture.dtype, "device": recipe.device, "device_map": capture.device_map, "offload": room}
