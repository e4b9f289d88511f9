"""Capture with vLLM, for models that are too slow with Transformers: in this process, or from a server.

The engine reads each conversation once, as a prompt of token ids, and returns the most probable tokens at each position
(`prompt_logprobs`). They equal those of `fusechat.capture.top_k` to float16 accuracy. vLLM's batching varies, so that a second
run may differ in the last bits.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.errors import ModelError, RecipeError, first_line
from fusechat.models.chat_model import ChatModel
from fusechat.models.prompt_logprobs import refuse_long, sparse_distribution
from fusechat.run import ranks
from fusechat.run.extras import import_extra
from fusechat.run.progress import Advance

# float32 logits that a step of the engine may hold: 512 MiB, in addition to what vLLM measures and takes for itself
_LOGITS = 1 << 27
_TOKENS_AT_ONCE = 1 << 16  # given to the engine at once: each returns as k Python objects
_FAREWELL = 10.0  # seconds for the engine to end by itself
# Run next to the engine: when this process is gone, however it ended (its end of the pipe closes), it ends the engine's.
_WATCH = """
import os, signal, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    try:
        os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # CUDA and threads may be in use here already
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for one token more than the model takes, see `_room`
}


def open_vllm(
    chat_model: ChatModel, *, dtype: str, k: int, max_length: int, tensor_parallel: int, url: str | None
) -> "InProcess | Any":
    """A capture backend with `capture(conversations, advance)` and `close()`. Raises RecipeError or ModelError.

    `k`: tokens at a position, at most the vocabulary. `max_length`: tokens of the longest conversation. `tensor_parallel`:
    number of GPUs. With `url`, of an OpenAI-compatible vLLM server, the server decides `dtype` and GPUs.
    """
    if url is not None:
        from fusechat.models.vllm_server import Server

        return Server(chat_model, k=k, url=url)
    refuse_processes()
    return InProcess(chat_model, dtype=dtype, k=k, max_length=max_length, tensor_parallel=tensor_parallel)


def refuse_processes() -> None:
    """Raises RecipeError under `torchrun`."""
    if ranks.world() > 1:
        raise RecipeError(
            "capture.backend: vllm starts the processes for its GPUs itself; run the capture without torchrun "
            "(capture.tensor_parallel spreads a model), or give capture.url"
        )


class InProcess:
    """Log-probabilities of prompts by vLLM's engine in this process."""

    def __init__(self, chat_model: ChatModel, *, dtype: str, k: int, max_length: int, tensor_parallel: int) -> None:
        self._vocabulary = chat_model.vocabulary_size()
        self._k = min(k, self._vocabulary)
        self._engine = Engine(
            chat_model,
            lambda config: _room(config, max_length),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            skip_tokenizer_init=True,
            max_logprobs=self._k,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,  # cached tokens have no log-probabilities
            enable_chunked_prefill=True,
            max_num_batched_tokens=min(max(_LOGITS // self._vocabulary, 256), 8192),
            max_num_seqs=64,
            enforce_eager=True,  # graphs pay off only in generation
        )
        options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._k, "detokenize": False}
        self._parameters = self._engine.parameters(**options)

    def capture(self, conversations: Sequence[Prepared], advance: Advance) -> list[SparseDistribution | None]:
        """One result for each conversation, in order; None if a value is not finite."""
        who = self._engine.who
        refuse_long(conversations, self._engine.takes, who)
        results: list[SparseDistribution | None] = []
        for part in _parts(conversations):
            outputs = self._engine.generate([one.input_ids.tolist() for one in part], self._parameters)
            for conversation, output in zip(part, outputs, strict=True):
                found, vocabulary = output.prompt_logprobs, self._vocabulary
                results.append(sparse_distribution(conversation, found, k=self._k, vocabulary=vocabulary, who=who))
            advance(len(part))
        return results

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()


class Engine:
    """vLLM's engine, in processes that this one starts and `close()` ends. `room`: from vLLM's model configuration, the maximum
    tokens of a prompt (`takes`) and the length to configure. `options` are vLLM's own. `who`: its name in errors."""

    def __init__(
        self, chat_model: ChatModel, room: Callable[[Any], tuple[int, int]], *, dtype: str, **options: Any
    ) -> None:
        self._vllm = _import_vllm()
        self.who = f"{chat_model.name} ({chat_model.reference})"
        model = {
            "model": str(chat_model.directory),
            "dtype": dtype,
            "trust_remote_code": chat_model.reference.trust_remote_code,
            "skip_tokenizer_init": options.pop("skip_tokenizer_init"),
            "load_format": "safetensors",  # never a pickle
            "generation_config": "vllm",
        }
        before = {child.pid for child in multiprocessing.active_children()}
        try:
            self.takes, length = room(self._vllm.EngineArgs(**model).create_model_config())
            self._llm = self._vllm.LLM(**model, max_model_len=length, seed=0, **options)
        except Exception as error:
            raise self._failure("cannot run it", error) from error
        self._processes = [child for child in multiprocessing.active_children() if child.pid not in before]
        self._watch = _watch([process.pid for process in self._processes])

    def parameters(self, **options: Any) -> Any:
        """vLLM's sampling parameters."""
        return self._vllm.SamplingParams(**options)

    def generate(self, prompts: Sequence[list[int]], parameters: Any) -> list[Any]:
        """vLLM's outputs, in the prompts' order. `parameters`: for all prompts, or a list with one for each."""
        try:
            return list(self._llm.generate([{"prompt_token_ids": one} for one in prompts], parameters, use_tqdm=False))
        except Exception as error:
            raise self._failure("failed", error) from error

    def close(self) -> None:
        """Ends the engine's processes and frees their memory. Further calls do nothing."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            for process in self._processes:
                process.join(_FAREWELL)
                if process.is_alive():  # an engine that failed may hang
                    process.kill()
                    process.join()
            self._watch.kill()
            self._watch.communicate()
            del llm
            gc.collect()

    def _failure(self, what: str, error: Exception) -> Exception:
        """A ModelError of one line about the user's model or machine; FuseChat's own errors unchanged."""
        if isinstance(error, AttributeError | NameError | TypeError):
            return error
        return ModelError(f"{self.who}: vLLM {what}: {first_line(error)}")


def _room(config: Any, max_length: int) -> tuple[int, int]:
    """Maximum tokens of a conversation, and the length to configure: one more, for the token that vLLM always generates. The
    model never reads that token, so the length may exceed its positions by one."""
    takes = min(config.max_model_len, max_length)
    if takes == config.max_model_len and "longrope" in str(getattr(config.hf_text_config, "rope_parameters", "")):
        return takes - 1, takes  # with one more, vLLM would use the rotations for long texts
    return takes, takes + 1


def _watch(pids: Sequence[int | None]) -> "subprocess.Popen[bytes]":
    """Ends these processes when this one is gone; they would keep the GPU's memory."""
    command = [sys.executable, "-c", _WATCH, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # no Ctrl-C reaches it


def _parts(conversations: Sequence[Prepared]) -> Iterator[list[Prepared]]:
    """The conversations in order, a bounded number of tokens at a time."""
    part: list[Prepared] = []
    tokens = 0
    for conversation in conversations:
        if part and tokens + len(conversation.input_ids) > _TOKENS_AT_ONCE:
            yield part
            part, tokens = [], 0
        part.append(conversation)
        tokens += len(conversation.input_ids)
    if part:
        yield part


def _import_vllm() -> Any:
    """Imports vLLM without its logging, output and usage reports."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    instead = "a server that has it can be named as capture.url"
    return import_extra("vllm", "capture.backend: vllm", "vllm", instead)
