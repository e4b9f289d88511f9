"""Answers of a model to a suite's prompts, kept in a journal: what was answered is not asked again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.evaluate.records import ASKED, DRAWN
from fusechat.evaluate.subjects import Subject
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import MODEL_KEY, Client, Request, model_key
from fusechat.models.journal import Journal
from fusechat.run.files import digest_json
from fusechat.run.progress import log, progress

FILE = "answers.jsonl"


Ask = Callable[[Sequence[Prompt]], list[Answer | Missing]]


@dataclass(frozen=True)
class Answering:
    """How models are asked. `dtype` None: bfloat16 on a GPU, float32 elsewhere. The last two are for servers: requests under
    way, and seconds that one may take."""

    directory: Path
    dtype: str | None = None
    device: str | None = None
    batch_tokens: int = 16384
    seed: int = 0
    concurrency: int = 8
    timeout: float = 300.0
    spread: Mapping[str, Any] = field(default_factory=dict)  # how a model lies on devices: `Generator`

    @contextmanager
    def __call__(self, subject: Subject) -> Iterator[Ask]:
        """A model is loaded when it is first asked something new, and gone afterwards."""
        journal = self.directory / subject.folder / FILE
        if subject.server is not None:
            yield lambda prompts: self._by_server(subject, prompts, journal)
            return
        loaded: list[Any] = []
        try:
            yield lambda prompts: self._local(subject, prompts, journal, loaded)
        finally:
            if loaded:
                from fusechat.models.memory import free_memory

                loaded.clear()
                free_memory()

    def _local(
        self, subject: Subject, prompts: Sequence[Prompt], file: Path, loaded: list[Any]
    ) -> list[Answer | Missing]:
        assert subject.chat_model is not None
        settings = [ASKED, subject.identity, self.dtype, self.device, self.batch_tokens, self.seed, len(prompts)]
        settings += [DRAWN] if any(prompt.temperature for prompt in prompts) else []
        settings += [subject.chat_model.stop] if subject.chat_model.stop else []
        batches = digest_json(
            [*settings, [_as_json(prompt) for prompt in prompts]]
        )  # what is in a batch decides last digits
        keys = [digest_json([batches, prompt.key]) for prompt in prompts]
        with Journal(file) as journal:
            answers: list[Answer | Missing | None] = [
                Answer(**journal[key]) if key in journal else None for key in keys
            ]
            waiting = sum(answer is None for answer in answers)
            if waiting:
                if not loaded:
                    from fusechat.models.generator import Generator

                    options: dict[str, Any] = {
                        "dtype": self.dtype,
                        "device": self.device,
                        "seed": self.seed,
                        **self.spread,
                    }
                    loaded.append(Generator(subject.chat_model, batch_tokens=self.batch_tokens, **options))
                with progress(f"answers of {subject.label}", waiting, "prompts") as advance:

                    def done(index: int, answer: Answer | Missing) -> None:
                        if answers[index] is None:  # of a batch that was begun before, some are there
                            answers[index] = answer
                            if isinstance(answer, Answer):
                                journal.add(
                                    keys[index], {key: getattr(answer, key) for key in ("text", "tokens", "complete")}
                                )
                            advance(1)

                    loaded[0].answer(prompts, done, [answer is not None for answer in answers])
        found = [answer or Missing("was not answered") for answer in answers]
        _tell(subject, found)
        return found

    def _by_server(self, subject: Subject, prompts: Sequence[Prompt], journal: Path) -> list[Answer | Missing]:
        server = subject.server
        assert server is not None
        client = Client(
            url=server.url,
            model=server.name,
            key=model_key(),
            what=f"{subject.label}, served at {server.url}",
            concurrency=self.concurrency,
            timeout=self.timeout,
            key_names=(MODEL_KEY,),
        )
        requests = [
            Request(prompt.messages, prompt.temperature, prompt.max_new_tokens, seed=self.seed) for prompt in prompts
        ]
        before = client.estimate(requests, journal).answered
        if before:
            log.info(
                "%s: %d answers are from before; remove %s if another model is served now",
                subject.label,
                before,
                journal,
            )
        replies = client.ask(requests, journal, description=f"answers of {subject.label}")
        found = [
            reply
            if isinstance(reply, Missing)
            else Answer(reply.text.strip(), reply.completion_tokens, reply.finish != "length")
            for reply in replies
        ]
        _tell(subject, found)
        return found


def _tell(subject: Subject, answers: Sequence[Answer | Missing]) -> None:
    """What a user should know before a judge is paid for it."""
    cut = sum(isinstance(answer, Answer) and not answer.complete for answer in answers)
    if cut:
        log.info("%s: %d of %d answers end where they became too long", subject.label, cut, len(answers))
    missing = [answer for answer in answers if isinstance(answer, Missing)]
    if missing:
        log.warning("%s: %d prompts have no answer: %s", subject.label, len(missing), missing[0].reason)


def _as_json(prompt: Prompt) -> list[Any]:
    return [prompt.key, prompt.messages, prompt.temperature, prompt.max_new_tokens]
