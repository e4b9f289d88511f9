"""Capture by vLLM gives what capture by Transformers gives, on a real model and on tiny ones."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

vllm = pytest.importorskip(
    "vllm", reason="vLLM is not installed; make test-vllm installs and tests it", exc_type=ImportError
)

from vllm_process import vllm_serving  # noqa: E402

import vllm_like  # noqa: E402
from fusechat.capture.local import Local  # noqa: E402
from fusechat.errors import DataError, ModelError  # noqa: E402
from fusechat.models.vllm import open_vllm  # noqa: E402
from vllm_like import conversation, differences  # noqa: E402

SAME = 2e-3  # nats; float16 tells -4 from -4.002, and no less


def transformers(chat_model: Any, conversations: list[Any], *, dtype: str = "float32", k: int = 10) -> list[Any]:
    """The same by Transformers."""
    backend = Local(chat_model.model(dtype=dtype, device=torch.device("cpu")), k=k, batch_tokens=2048, name="it")
    found = backend.capture(conversations, nothing)
    backend.close()
    return found


def nothing(amount: int = 1, note: str = "") -> None:
    pass


def assert_same(found: list[Any], expected: list[Any], *, within: float = SAME) -> None:
    apart = np.array([differences(one, other) for one, other in zip(found, expected, strict=True)])
    print(f"greatest differences by place, of nll, by token: {apart.max(axis=0)}")
    assert apart.max() < within


def engines() -> list[str]:
    """Processes of vLLM that this one has started."""
    import psutil

    multiprocessing.active_children()  # takes leave of those that have ended
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    return [name for name in names if "VLLM" in name]


def gone(*, within: float) -> bool:
    """Whether they end in so many seconds."""
    end = time.monotonic() + within
    while engines() and time.monotonic() < end:
        time.sleep(0.5)
    return not engines()


@pytest.fixture(scope="module")
def expected(smollm: Any, conversations: list[Any]) -> list[Any]:
    return transformers(smollm, conversations)


@pytest.fixture(scope="module")
def server(smollm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_serving(smollm.directory, log, "--max-model-len", "400", VLLM_API_KEY="secret") as url:
        yield url


def test_in_this_process(smollm: Any, conversations: list[Any], expected: list[Any], open_backend: Any) -> None:
    backend = open_backend(smollm)
    done: list[int] = []
    assert_same(backend.capture(conversations, lambda amount: done.append(amount)), expected)
    assert sum(done) == len(conversations)
    assert_same(backend.capture(conversations, nothing), expected)  # nothing is answered from a cache
    assert engines()
    backend.close()
    assert gone(within=10), engines()


def test_bfloat16_is_as_near_to_float32_as_with_transformers(
    smollm: Any, conversations: list[Any], expected: list[Any], open_backend: Any
) -> None:
    found = open_backend(smollm, dtype="bfloat16").capture(conversations, nothing)
    other = transformers(smollm, conversations, dtype="bfloat16")

    def error(results: list[Any]) -> float:
        return (
            float(np.mean(np.concatenate([one.nll - two.nll for one, two in zip(results, expected, strict=True)]) ** 2))
            ** 0.5
        )

    print(f"root mean square error of nll in bfloat16: vLLM {error(found):.4f}, Transformers {error(other):.4f}")
    assert error(found) < 1.5 * error(other)
    assert_same(found, expected, within=1.5)


def test_by_a_server(
    server: str, smollm: Any, conversations: list[Any], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    backend = opened(smollm, server)
    assert_same(backend.capture(conversations, nothing), expected)
    assert_same(backend.capture(conversations, nothing), expected)
    with pytest.raises(DataError) as caught:
        backend.capture([conversation([1] * 400, name="long")], nothing)
    assert str(caught.value) == (
        f"capture.url: the server at {server}: takes at most 399 tokens, and conversation long has 400; start it with a greater "
        "--max-model-len, or set data.max_length: 399"
    )
    longest = conversation([1] * 399)
    assert_same(backend.capture([longest], nothing), transformers(smollm, [longest]))
    backend.close()


def test_what_a_server_refuses(
    server: str, smollm: Any, wide: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    who = f"capture.url: the server at {server}"
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert refusal(smollm, server) == f"{who}: refuses the key; the environment variable VLLM_API_KEY has to hold it"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert refusal(smollm, server, k=30) == (
        f"{who}: gives at most 20 tokens a position, and capture.top_k asks for 30; start it with --max-logprobs 30, or set "
        "capture.top_k: 20"
    )
    tiny = vllm_like.chat_model(wide["llama"])
    line = refusal(tiny, server, k=20)
    assert line.startswith(f"{who}: gave token "), line
    assert line.endswith(", but the model knows only 400; is it another model?")
    base = server.removesuffix("/v1")
    assert refusal(smollm, base) == (
        f"capture.url: the server at {base}: does not answer as vLLM does; is the URL the one that ends in /v1? (Error code: 404)"
    )


def opened(chat_model: Any, url: str, k: int = 10) -> Any:
    return open_vllm(chat_model, dtype="float32", k=k, max_length=512, tensor_parallel=1, url=url)


def refusal(chat_model: Any, url: str, k: int = 10) -> str:
    with pytest.raises(ModelError) as caught:
        opened(chat_model, url, k).close()
    return str(caught.value)


def some(vocabulary: int, *lengths: int) -> list[Any]:
    """Conversations of random tokens that begin with the same ones."""
    generator = np.random.default_rng(0)
    start = generator.integers(vocabulary, size=max(lengths)).tolist()
    return [
        conversation(
            [*start[: length // 2], *generator.integers(vocabulary, size=length - length // 2).tolist()],
            name=f"c{number}",
        )
        for number, length in enumerate(lengths)
    ]


def test_long_prompts_in_pieces_and_a_padded_vocabulary(
    wide: dict[str, Path], open_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the engine takes 256 tokens here; the longest prompt has as many as the model has positions."""
    from fusechat.models import vllm

    monkeypatch.setattr(vllm, "_LOGITS", 1)
    monkeypatch.setattr(vllm, "_TOKENS_AT_ONCE", 2500)
    chat_model = vllm_like.chat_model(wide["mistral"])
    vocabulary = chat_model.vocabulary_size()
    assert vocabulary > len(chat_model.tokenizer())
    members = some(vocabulary, 2048, 2, 255, 256, 257, 258, 511, 513, 1500)
    backend = open_backend(chat_model, k=vocabulary, max_length=5000)
    found = backend.capture(members, nothing)
    assert_same(found, transformers(chat_model, members, k=vocabulary))
    assert all(sorted(row) == list(range(vocabulary)) for one in found for row in one.ids.tolist()[:3])
    with pytest.raises(DataError) as caught:
        backend.capture(some(vocabulary, 2049), nothing)
    assert str(caught.value) == (
        f"pivot ({wide['mistral']}): takes at most 2048 tokens, and conversation c0 has 2049; set data.max_length: 2048"
    )


def test_values_that_are_not_finite_reject_one_conversation(
    wide: dict[str, Path], open_backend: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wide["mistral"])
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    vllm_like.chat_model(wide["mistral"]).tokenizer().save_pretrained(tmp_path / "nan")
    members = [conversation([1, 5, 6]), conversation([1, 100, 6]), conversation([1, 6, 7])]
    found = open_backend(tmp_path / "nan").capture(members, nothing)
    assert [one is None for one in found] == [False, True, False]
    with vllm_serving(tmp_path / "nan", tmp_path / "log", "--max-model-len", "512") as url:
        backend = opened(vllm_like.chat_model(tmp_path / "nan"), url)
        assert [one is None for one in backend.capture(members, nothing)] == [False, True, False]
        backend.close()


def test_a_model_that_vllm_cannot_run_is_told(models: dict[str, Path], open_backend: Any) -> None:
    """Its heads are too small for the engine, which ends; nothing is left of it."""
    backend = open_backend(models["llama"])
    with pytest.raises(ModelError) as caught:
        backend.capture([conversation([1, 5, 6])], nothing)
    assert str(caught.value).startswith(f"pivot ({models['llama']}): vLLM failed: ")
    backend.close()
    assert gone(within=30), engines()


def test_a_run_that_is_killed_leaves_no_engine_behind(wide: dict[str, Path]) -> None:
    import psutil

    here = Path(__file__).parent
    held = subprocess.Popen(
        [sys.executable, here / "held.py", wide["llama"]],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parent)},
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "open\n"
        started = psutil.Process(held.pid).children(recursive=True)
        assert any("VLLM" in process.name() for process in started)
    finally:
        held.kill()
        held.wait()
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
