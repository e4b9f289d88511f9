"""Answers by vLLM, for models that are too slow with Transformers: in this process, or from a server.

Prompts and answers are token ids, as for other backends. vLLM's batching varies, so that a second run may differ where two
tokens are almost equally probable.
"""

from collections.abc import Sequence
from typing import Any

from fusechat.errors import ModelError
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.asking import Asking
from fusechat.models.chat_model import ChatModel
from fusechat.models.vllm import Engine, refuse_processes
from fusechat.models.vllm_server import Server
from fusechat.run.files import digest_json
from fusechat.run.progress import Advance


class VllmAnswers:
    """`prompts`: all that will be answered; the longest, with its answer, sets the engine's length. With `url`, of an
    OpenAI-compatible vLLM server, the server decides `dtype` and GPUs."""

    def __init__(
        self,
        chat_model: ChatModel,
        prompts: Sequence[Prompt],
        *,
        dtype: str,
        tensor_parallel: int,
        url: str | None,
        seed: int,
    ) -> None:
        self._asking, self._key = Asking(chat_model), [seed, chat_model.identity]
        self.notes: dict[str, Any] = {} if url is None else {"served_at": url}
        self._server: Server | None = None
        self._engine: Engine | None = None
        if url is not None:
            self._server = Server(chat_model, k=1, url=url)
            self._asking.room = min(self._asking.room, self._server.takes or self._asking.room)
            return
        refuse_processes()
        encoded = [(self._asking.encode(one), one.max_new_tokens) for one in prompts]
        most = max((len(ids) + longest for ids, longest in encoded if not isinstance(ids, Missing)), default=1)

        def room(config: Any) -> tuple[int, int]:
            takes = min(config.max_model_len, most)
            return takes, takes

        self._engine = Engine(
            chat_model,
            room,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            skip_tokenizer_init=not chat_model.stop,  # vLLM searches text for these
        )
        self._asking.room = min(self._asking.room, self._engine.takes)

    def answer(self, prompts: Sequence[Prompt], advance: Advance) -> list[Answer | Missing]:
        """One answer for each prompt, in order."""
        encoded = [self._asking.encode(one) for one in prompts]
        places = [place for place, ids in enumerate(encoded) if not isinstance(ids, Missing)]
        asked = [list(ids) for ids in encoded if not isinstance(ids, Missing)]
        options = [self._options(prompts[place], len(ids)) for place, ids in zip(places, asked, strict=True)]
        if self._server is not None:
            found = self._by_server(self._server, asked, options, advance)
        else:
            assert self._engine is not None
            parameters = [self._engine.parameters(detokenize="stop" in each, **each) for each in options]
            outputs = self._engine.generate(asked, parameters)
            found = [self._asking.answer(list(output.outputs[0].token_ids)) for output in outputs]
            advance(len(prompts))
        answers: list[Answer | Missing] = [one if isinstance(one, Missing) else Missing("") for one in encoded]
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
        return answers

    def _options(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        """vLLM's names of the options, for this process and a server."""
        options: dict[str, Any] = {
            "max_tokens": min(prompt.max_new_tokens, self._asking.room - tokens),
            "temperature": prompt.temperature,
            "stop_token_ids": sorted(self._asking.stops),
        }
        if prompt.temperature:
            key = digest_json([*self._key, prompt.key, prompt.sample])
            options |= {"top_p": prompt.top_p, "seed": int(key[:7], 16)}
        return options | ({"stop": self._asking.stop_texts} if self._asking.stop_texts else {})

    def _by_server(
        self, server: Server, asked: Sequence[list[int]], options: Sequence[dict[str, Any]], advance: Advance
    ) -> list[Answer]:
        bodies = [{"prompt": ids, **each, "return_token_ids": True} for ids, each in zip(asked, options, strict=True)]
        found = server.complete(bodies, advance)
        if any(choice.get("token_ids") is None for choice in found):
            raise ModelError(f"{server.who}: gives no token ids of its answers; is it vLLM, of version 0.10 or newer?")
        return [self._asking.answer(list(choice["token_ids"])) for choice in found]

    def close(self) -> None:
        """Ends the engine, or the connections to the server. Further calls do nothing."""
        for one in (self._engine, self._server):
            if one is not None:
                one.close()
