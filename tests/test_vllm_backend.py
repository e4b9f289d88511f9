"""Capture by vLLM, as far as it can be tested without vLLM. `make test-vllm` runs tests/with_vllm with the real one."""

import itertools
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vllm_like
from cases import each
from fusechat.data.distributions import SparseDistribution
from fusechat.errors import DataError, FuseChatError, ModelError
from fusechat.models import vllm, vllm_server
from fusechat.models.prompt_logprobs import sparse_distribution
from vllm_like import Engine, Logprob, conversation, serving

INSIDE = {7: Logprob(-0.5, 1), 3: Logprob(-1.5, 2)}  # the token of the prompt is among the most likely
OUTSIDE = {5: Logprob(-4.25, 6), 7: Logprob(-0.25, 1), 2: Logprob(-2.0, 2)}


def parsed(tokens: list[int], found: Any, k: int = 2, rows: list[int] | None = None) -> SparseDistribution | None:
    return sparse_distribution(conversation(tokens, rows), found, k=k, vocabulary=10, who="it")


@each("form", [list, vllm_like.as_json])
def test_entries_become_rows_by_rank(form: Any) -> None:
    result = parsed([0, 3, 5], form([None, INSIDE, OUTSIDE]))
    assert result is not None
    assert result.ids.tolist() == [[7, 3], [7, 2]]
    assert result.ids.dtype == np.int32
    assert result.logprobs.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    assert result.nll.tolist() == [1.5, 4.25]
    assert result.nll.dtype == np.float32


@each("tokens, found, rows, ids", [
    ([0, 3, 5], [None, {}, OUTSIDE], [2], [[7, 2]]),  # the rows that are asked for, no others
    ([0, 3], [None, INSIDE], [], []),
    ([0, 5], [None, {token: Logprob(entry.logprob, None) for token, entry in OUTSIDE.items()}], None, [[7, 2]]),  # no ranks
    # minus infinity of a token that nobody asked about
    ([0, 5], [None, {5: Logprob(-0.5, 1), 2: Logprob(-1.0, 2), 9: Logprob(float("-inf"), 3)}], None, [[5, 2]]),
])  # fmt: skip
def test_rows_that_are_asked_for(tokens: list[int], found: Any, rows: Any, ids: list[list[int]]) -> None:
    result = parsed(tokens, found, rows=rows)
    assert result is not None
    assert result.ids.shape == (len(ids), 2)
    assert result.ids.tolist() == ids
    assert result.nll.tolist() == ([4.25] if rows == [2] else result.nll.tolist())


def test_values_that_are_not_finite_reject_a_conversation() -> None:
    for bad, token in itertools.product((float("nan"), float("-inf"), -9999.0, None), (7, 5)):
        entries = [{str(each): vars(entry) for each, entry in OUTSIDE.items()} for _ in range(2)]
        entries[1][str(token)] = {"logprob": bad, "rank": entries[1][str(token)]["rank"]}
        assert parsed([0, 5, 5], [None, *entries]) is None, (bad, token)
        assert parsed([0, 5, 5], [None, entries[0], {}], rows=[1]) is not None


@each("found, line", [
    (None, "it: asked for prompt_logprobs of 2 tokens, it gave none; is it vLLM?"),
    ([None], "it: asked for prompt_logprobs of 2 tokens, it gave those of 1; is it vLLM?"),
    ([None, None], "it: gave 0 tokens at a position where the 2 most likely were asked for"),
    ([None, {7: INSIDE[7]}], "it: gave 1 tokens at a position where the 2 most likely were asked for"),
    ([None, INSIDE], "it: left out a token that it was asked about"),
    ([None, {5: Logprob(-1.0, 1), 12: Logprob(-1.5, 2)}], "it: gave token 12, but the model knows only 10; is it another model?"),
    ([None, {5: Logprob(4.0, 1), 3: Logprob(3.5, 2)}],
     "it: gives logits instead of log-probabilities; set its --logprobs-mode raw_logprobs"),
])  # fmt: skip
def test_what_is_no_answer_is_refused(found: Any, line: str) -> None:
    with pytest.raises(ModelError) as caught:
        parsed([0, 5], found)
    assert str(caught.value) == line


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 30), st.integers(1, 40), st.sampled_from([0.5, 5.0])
)
def test_any_distributions_come_back_as_their_most_likely_tokens(
    seed: int, n: int, vocabulary: int, k: int, spread: float
) -> None:
    k = min(k, vocabulary)
    generator = np.random.default_rng(seed)
    logits = np.round(generator.normal(scale=spread, size=(n, vocabulary)), 1)  # rounded: ties happen
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = generator.integers(vocabulary, size=n + 1).tolist()
    answer = vllm_like.naive(logprobs, tokens, k)
    for form in (answer, vllm_like.as_json(answer)):
        result = sparse_distribution(conversation(tokens), form, k=k, vocabulary=vocabulary, who="it")
        assert result is not None
        np.testing.assert_allclose(result.logprobs, -np.sort(-logprobs, axis=1)[:, :k], rtol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(logprobs, result.ids, axis=1), result.logprobs, rtol=1e-6)
        assert all(len(set(row)) == k for row in result.ids.tolist())
        left_out = np.sort(np.exp(logprobs), axis=1)[:, : vocabulary - k].sum(axis=1)
        np.testing.assert_allclose(result.tail, left_out, rtol=1e-5, atol=1e-6)
        assert ((result.tail == 0) | (result.tail >= 1e-6)).all()
        np.testing.assert_allclose(result.nll, -logprobs[np.arange(n), tokens[1:]], rtol=1e-6)


def test_parts_hold_some_tokens_each_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_TOKENS_AT_ONCE", 10)
    members = [conversation(range(length), name=str(length)) for length in (4, 6, 1, 30, 2, 2)]
    parts = [[len(one.input_ids) for one in part] for part in vllm._parts(members)]
    assert parts == [[4, 6], [1], [30], [2, 2]]
    assert list(vllm._parts([])) == []


def opened(directory: Path, url: str | None = None, k: int = 4) -> Any:
    chat_model = vllm_like.chat_model(directory)
    return vllm.open_vllm(chat_model, dtype="float32", k=k, max_length=256, tensor_parallel=1, url=url)


def refusal(directory: Path, url: str | None = None, k: int = 4) -> str:
    with pytest.raises(FuseChatError) as caught:
        opened(directory, url, k).close()
    return str(caught.value)


def test_what_is_missing_is_told_in_a_line(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert refusal(models["llama"]) == (
        "capture.backend: vllm is not installed (pip install 'fusechat[vllm]'); a server that has it can be named as "
        "capture.url"
    )
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert refusal(models["llama"]) == (
        "capture.backend: vllm is installed, but cannot be imported: operator torchvision::nms does not exist"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(models["llama"]) == (
        "capture.backend: vllm starts the processes for its GPUs itself; run the capture without torchrun "
        "(capture.tensor_parallel spreads a model), or give capture.url"
    )
    monkeypatch.setitem(sys.modules, "openai", None)
    assert refusal(models["llama"], "http://127.0.0.1:1/v1") == (
        "capture.url: the client of the server is not installed (pip install 'fusechat[server]')"
    )


def test_no_server_at_the_url(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_RETRIES", 1)
    with socket.socket() as taken:  # nobody listens at it
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        line = refusal(models["llama"], url)
    assert line == f"capture.url: the server at {url}: no connection (Connection refused); is it running?"


@pytest.fixture
def engine(loaded: dict[str, Any], tokenizers: dict[str, Any]) -> Engine:
    return Engine(loaded["mistral"], tokenizers["mistral"])


def conversations(count: int = 40) -> list[Any]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 60, size=count)
    return [
        conversation([1, *generator.integers(3, 270, size=length).tolist()], name=f"c{number}")
        for number, length in enumerate(lengths)
    ]


def test_a_server_gives_what_the_model_gives(models: dict[str, Path], loaded: dict[str, Any], engine: Engine) -> None:
    done: list[int] = []
    members = conversations()
    with serving(engine) as root:
        backend = opened(models["mistral"], root + "/v1/", k=12)
        found = backend.capture(members, lambda amount: done.append(amount))
        again = backend.capture(members[3:5], lambda amount: None)
        backend.close()
        backend.close()
    assert sum(done) == len(members)
    for one, result in zip(members, found, strict=True):
        with torch.inference_mode():
            logits = loaded["mistral"](torch.from_numpy(one.input_ids[None].astype(np.int64))).logits[0, :-1]
        logprobs = logits.double().log_softmax(dim=1)
        np.testing.assert_allclose(result.logprobs, logprobs.topk(12).values, atol=1e-4)
        np.testing.assert_allclose(result.nll, -logprobs[range(len(one)), one.gold], atol=1e-4)
        np.testing.assert_allclose(result.tail, logprobs.sort(dim=1).values[:, :-12].exp().sum(dim=1), rtol=1e-3)
    assert np.array_equal(again[0].ids, found[3].ids)
    assert all(
        set(body) == {"model", "prompt", "max_tokens", "temperature", "prompt_logprobs"} for body in engine.asked
    )


def test_a_padded_vocabulary_is_the_models_not_the_tokenizers(models: dict[str, Path], engine: Engine) -> None:
    size = engine.model.config.vocab_size
    assert size > len(engine.tokenizer)
    engine.max_logprobs = size
    with serving(engine) as root:
        backend = opened(models["mistral"], root + "/v1", k=10_000)
        (result,) = backend.capture(conversations(1), lambda amount: None)
        backend.close()
    assert sorted(result.ids[0].tolist()) == list(range(size))
    np.testing.assert_allclose(np.exp(result.logprobs.astype(float)).sum(axis=1), 1, atol=1e-5)


def test_a_busy_server_is_asked_again(models: dict[str, Path], engine: Engine) -> None:
    engine.busy = 2
    with serving(engine) as root:
        backend = opened(models["mistral"], root + "/v1")
        assert backend.capture(conversations(2), lambda amount: None)[1] is not None
        backend.close()
    assert engine.busy == 0
    assert len(engine.asked) == 3 + 2


def test_nan_at_the_server_rejects_that_conversation_alone(models: dict[str, Path], engine: Engine) -> None:
    import copy

    engine.model = copy.deepcopy(engine.model)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[100] = float("nan")
    members = [conversation([1, 5, 6]), conversation([1, 100, 6]), conversation([1, 6, 7])]
    with serving(engine) as root:
        backend = opened(models["mistral"], root + "/v1")
        found = backend.capture(members, lambda amount: None)
        backend.close()
    assert [result is None for result in found] == [False, True, False]


def test_a_limit_of_the_server_is_told_before_the_work(models: dict[str, Path], engine: Engine) -> None:
    with serving(engine) as root:
        line = refusal(models["mistral"], root + "/v1", k=50)
    assert line == (
        f"capture.url: the server at {root}/v1: gives at most 20 tokens a position, and capture.top_k asks for 50; start "
        "it with --max-logprobs 50, or set capture.top_k: 20"
    )


def test_a_long_conversation_is_not_cut(models: dict[str, Path], engine: Engine) -> None:
    engine.max_model_len = 9
    with serving(engine) as root:
        backend = opened(models["mistral"], root + "/v1")
        assert backend.capture([conversation(range(8))], lambda amount: None)[0] is not None
        asked = len(engine.asked)
        with pytest.raises(DataError) as caught:
            backend.capture([conversation(range(8)), conversation(range(9), name="long")], lambda amount: None)
        backend.close()
    assert len(engine.asked) == asked
    assert str(caught.value) == (
        f"capture.url: the server at {root}/v1: takes at most 8 tokens, and conversation long has 9; start it with a greater "
        "--max-model-len, or set data.max_length: 8"
    )


def test_another_tokenizer_at_the_server_is_refused(
    models: dict[str, Path], tokenizers: dict[str, Any], engine: Engine
) -> None:
    engine.tokenizer = tokenizers["llama"]
    with serving(engine) as root:
        assert refusal(models["mistral"], root + "/v1") == (
            f"capture.url: the server at {root}/v1: served cuts text into other tokens than pivot ({models['mistral']}): "
            "another model"
        )


def test_a_greater_vocabulary_at_the_server_is_refused(
    models: dict[str, Path], loaded: dict[str, Any], engine: Engine
) -> None:
    small = min(loaded, key=lambda kind: loaded[kind].config.vocab_size)
    size = loaded[small].config.vocab_size
    with serving(engine) as root:
        line = refusal(models[small], root + "/v1", k=20)
    assert re.fullmatch(
        rf"capture.url: the server at {root}/v1: gave token \d+, but the model knows only {size}; is it another model\?",
        line,
    )


def test_a_smaller_vocabulary_at_the_server_is_refused(
    models: dict[str, Path], loaded: dict[str, Any], tokenizers: dict[str, Any], engine: Engine
) -> None:
    by_size = sorted(loaded, key=lambda kind: loaded[kind].config.vocab_size)
    small, large = by_size[0], by_size[-1]
    engine.model, engine.tokenizer = loaded[small], tokenizers[small]
    last = min(len(tokenizers[large]), loaded[large].config.vocab_size) - 1
    with serving(engine) as root:
        line = refusal(models[large], root + "/v1")
    assert line == (
        f"capture.url: the server at {root}/v1: Token id {last} is out of vocabulary; served is another model than "
        f"pivot ({models[large]})"
    )


def test_of_several_models_the_one_of_that_name_is_asked(models: dict[str, Path], engine: Engine) -> None:
    engine.others = ("another", "third")
    with serving(engine) as root:
        assert refusal(models["mistral"], root + "/v1") == (
            f"capture.url: the server at {root}/v1: serves another, served, third; none of these names is that of "
            f"pivot ({models['mistral']})"
        )
        engine.root = str(models["mistral"])
        opened(models["mistral"], root + "/v1").close()
    assert engine.asked[-1]["model"] == "served"


def test_the_key_comes_from_the_environment(
    models: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.key = "open sesame"
    with serving(engine) as root:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "open sesame")  # which is for another server
        assert refusal(models["mistral"], root + "/v1") == (
            f"capture.url: the server at {root}/v1: refuses the key; the environment variable VLLM_API_KEY has to hold it"
        )
        monkeypatch.setenv("VLLM_API_KEY", "open sesame")
        opened(models["mistral"], root + "/v1").close()


def test_a_url_that_is_not_that_of_the_interface(models: dict[str, Path], engine: Engine) -> None:
    with serving(engine) as root:
        assert refusal(models["mistral"], root) == (
            f"capture.url: the server at {root}: does not answer as vLLM does; is the URL the one that ends in /v1? (Not "
            "Found)"
        )


@each("answer", [b"<html>welcome</html>", {"choices": []}, {"data": "none"}, ["?"]])
def test_a_server_of_another_kind(models: dict[str, Path], answer: Any) -> None:
    class Other:
        def get(self, path: str) -> tuple[int, Any]:
            return 200, answer

    with serving(Other()) as root:
        assert refusal(models["mistral"], root + "/v1") == (
            f"capture.url: the server at {root}/v1: does not answer as vLLM does; is the URL the one that ends in /v1?"
        )


def test_a_server_that_does_not_know_prompt_logprobs(models: dict[str, Path], engine: Engine) -> None:
    engine.complete = lambda *_: (200, {"choices": [{"text": "x"}]})  # type: ignore[method-assign]
    with serving(engine) as root:
        assert refusal(models["mistral"], root + "/v1") == (
            f"capture.url: the server at {root}/v1: asked for prompt_logprobs of 2 tokens, it gave none; is it vLLM?"
        )
