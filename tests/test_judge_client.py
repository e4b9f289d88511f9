"""Asking a server of chat completions: what is sent, what is kept, what is asked once."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import each
from fusechat.errors import FuseChatError, ModelError, RecipeError, WorkdirError
from fusechat.models import client as module
from fusechat.models.answers import Missing
from fusechat.models.client import Reply, Request, judge_key, model_key
from fusechat.models.journal import Journal
from judging import Canned, canned, client, completion, journal_keys, misbehaving, question


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


def ask(url: str, requests: list[Request], journal: Path, **options: Any) -> list[Reply | Missing]:
    return client(url, **options).ask(requests, journal, description="judging")


def only(result: list[Reply | Missing]) -> Reply:
    (reply,) = result
    assert isinstance(reply, Reply), reply
    return reply


def answering(answer: Any, status: int = 200) -> Canned:
    server = Canned()
    server.answer = lambda body: (status, answer)  # type: ignore[method-assign]
    return server


def test_replies_come_in_the_order_of_the_requests_and_equal_ones_are_asked_once(tmp_path: Path) -> None:
    server, journal = Canned(delay=0.01), tmp_path / "deep" / "j.jsonl"
    requests = [question(number % 7) for number in range(20)]
    with canned(server) as url:
        found = ask(url, requests, journal)
        assert found == [
            Reply(f"Answer to What is {number % 7} + {number % 7}?: [[7]]", "stop", 11, 3) for number in range(20)
        ]
        assert len(server.asked) == 7
        assert ask(url + "/", requests, journal) == found  # of the same server, written otherwise
        assert len(server.asked) == 7
        assert ask(url, [*requests, question(99)], journal)[:20] == found
        assert len(server.asked) == 8
    assert len(journal_keys(journal)) == len(set(journal_keys(journal))) == 8
    assert ask(url, requests, journal) == found  # nobody is there, and nobody is needed
    assert client(url).ask([], tmp_path / "none.jsonl", description="judging") == []


def test_what_is_sent(tmp_path: Path) -> None:
    server = Canned()
    requests = [question(1), question(1, top_logprobs=5, seed=3, temperature=0.7, max_tokens=9)]
    with canned(server) as url:
        ask(url, requests, tmp_path / "j", concurrency=1)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1 + 1?"}]
    plain = {"model": "judge", "messages": messages, "temperature": 0.0, "max_tokens": 8}
    more = {"temperature": 0.7, "max_tokens": 9, "logprobs": True, "top_logprobs": 5, "seed": 3}
    assert server.asked == [plain, plain | more]


def test_a_request_is_known_by_what_is_asked_of_which_model() -> None:
    base = Request((("user", "a"),), 0.0, 8)
    others = [
        Request((("user", "b"),), 0.0, 8),
        Request((("system", "a"),), 0.0, 8),
        Request((("user", "a"), ("user", "a")), 0.0, 8),
        Request((("user", "a"),), 0.5, 8),
        Request((("user", "a"),), 0.0, 9),
        Request((("user", "a"),), 0.0, 8, top_logprobs=0),
        Request((("user", "a"),), 0.0, 8, seed=0),
    ]
    keys = [request.key("m") for request in (base, *others)] + [base.key("n")]
    assert len(set(keys)) == 9
    assert Request((("user", "a"),), 0, 8).key("m") == base.key("m")
    # journals of earlier versions stay of use
    assert base.key("m") == "db4d7ce06717fb8ea944bf4d7f67a6bc570e1640bc98a49c12e8a787d957aef5"


def test_log_probabilities(tmp_path: Path) -> None:
    def token(text: str, logprob: Any, **more: Any) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, **more}

    content = [
        token("A", -0.5, bytes=[65], id=3, top_logprobs=[token("A", -0.5, bytes=[65]), token("B", None)]),
        token("\ud83d", -math.inf, top_logprobs=[]),
        token("C", 0),
    ]
    server = answering(completion("A", logprobs={"content": content, "refusal": None}))
    with canned(server) as url:
        asked = question(1, top_logprobs=2)
        reply = only(ask(url, [asked], tmp_path / "j"))
        assert only(ask(url, [asked], tmp_path / "j")) == reply
        assert only(ask(url, [question(1)], tmp_path / "j")).logprobs is None  # not asked for
    assert reply.logprobs == [
        token("A", -0.5, top_logprobs=[token("A", -0.5), token("B", -9999.0)]),
        token("\ud83d", -9999.0, top_logprobs=[]),
        token("C", 0.0, top_logprobs=[]),
    ]


@each("answer, reply", [
    (completion(None), Reply("", "stop", 11, 3)),
    (completion("", finish="length"), Reply("", "length", 11, 3)),
    ({"choices": [{"message": {"content": "x"}}]}, Reply("x", None, None, None)),
    ({"choices": [{"message": {}, "finish_reason": "stop"}], "usage": None}, Reply("", "stop", None, None)),
    (completion("a \ud83d\ude42 b \ud83d c"), Reply("a 🙂 b \ufffd c", "stop", 11, 3)),
])  # fmt: skip
def test_answers_with_little_in_them(tmp_path: Path, answer: Any, reply: Reply) -> None:
    with canned(answering(answer)) as url:
        found = ask(url, [question(1)], tmp_path / "j")
        assert found == [reply]
        assert ask(url, [question(1)], tmp_path / "j") == found


@each("answer, why", [
    (b"<html>\n\n welcome", "Expecting value"),
    (b"[" * 100_000, ""),
    (b"\xff\xfe\xfd", ""),
    ([], "no choices in []"),
    ("text", ""),
    ({"choices": []}, ""),
    ({"error": {"message": "the upstream is overloaded"}}, "the upstream is overloaded"),
    ({"choices": [{"text": "x"}]}, ""),
    ({"choices": [{"message": "x"}]}, ""),
    ({"choices": [{"message": {"content": [{"type": "text"}]}}]}, "content"),
    (completion("x", logprobs={"content": [{"token": "x", "logprob": "likely"}]}), "likely"),
    (completion("x", logprobs={"content": [{"token": "x", "logprob": math.nan}]}), "NaN"),
    (completion("x", logprobs={"content": "?"}), ""),
])  # fmt: skip
def test_what_is_no_completion_is_asked_again_and_then_missing(tmp_path: Path, answer: Any, why: str) -> None:
    server = answering(answer)
    with canned(server) as url:
        (found,) = ask(url, [question(1, top_logprobs=1)], tmp_path / "j", retries=2)
    assert isinstance(found, Missing)
    assert found.reason.startswith("no chat completion came (")
    assert found.reason.endswith("), asked 3 times")
    assert why in found.reason
    assert len(found.reason) < 260
    assert "\n" not in found.reason
    assert len(server.asked) == 3
    assert journal_keys(tmp_path / "j") == []


def test_an_estimate_says_what_is_asked_and_asks_nothing(tmp_path: Path) -> None:
    server, journal = Canned(), tmp_path / "j"
    requests = [question(number, max_tokens=1000) for number in range(12)] * 2
    with canned(server) as url:
        judge = client(url, model="m")
        before = judge.estimate(requests, journal)
        assert not journal.exists()
        assert (before.calls, before.answered, before.completion_tokens) == (12, 0, 12_000)
        read = sum(len(text) for request in requests[:12] for _, text in request.messages)
        assert before.prompt_tokens == math.ceil(read / 4)
        assert str(before) == (
            f"judge m at {url}: 12 calls; about {before.prompt_tokens} tokens to read, at most 12,000 to write"
        )
        judge.ask(requests[:5], journal, description="judging")
        after = judge.estimate(requests, journal)
        assert (after.calls, after.answered, after.completion_tokens) == (12, 5, 7000)
        assert "12 calls, 5 of them answered before; about" in str(after)
        one = str(judge.estimate([Request((("user", "größer" * 1000),), 0.0, 8)], journal))
        assert one.endswith(": 1 call; about 2,000 tokens to read, at most 8 to write")
    assert len(server.asked) == 5


def test_a_journal_of_something_else(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.add(question(1).key("judge"), {"tokens": 3})
    with pytest.raises(WorkdirError) as caught:
        ask("http://127.0.0.1:1/v1", [question(1)], tmp_path / "j")
    assert str(caught.value) == (f"{tmp_path / 'j'}: is the journal of something else; it holds no replies of a server")


@each("url, line", [
    ("judge.example/v1", "should be a URL that starts with http:// or https://"),
    ("ftp://judge.example/v1", "should be a URL that starts with http:// or https://"),
    ("", "should be a URL that starts with http:// or https://"),
    ("http://", "this is no URL of a server"),
    ("http://a b/v1", "this is no URL of a server"),
    ("http://a:port/v1", "this is no URL of a server"),
    ("http://[::1/v1", "this is no URL of a server"),
    ("http://a/v1\n", "this is no URL of a server"),
    *(
        (url, "should be a URL without user, password, ? and #; keys come from the environment: "
        "FUSECHAT_JUDGE_KEY or OPENAI_API_KEY")
        for url in ("https://me:sesame@a/v1", "https://sesame@a/v1", "https://a/v1?key=sesame", "https://a/v1#sesame")
    ),
])  # fmt: skip
def test_a_url_that_is_refused(url: str, line: str) -> None:
    for what in ("--judge-url", f"fused, served at {url}"):
        with pytest.raises(RecipeError) as caught:
            client(url, what=what)
        assert str(caught.value).endswith(f": {line}")
        assert "sesame" not in str(caught.value)


def test_the_address_is_shown_as_it_was_given() -> None:
    assert client("https://judge.example/v1/").address == "https://judge.example/v1"


def test_without_a_client_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RecipeError) as caught:
        client("http://127.0.0.1:1/v1")
    assert str(caught.value) == (
        "--judge-url: the client of the server is not installed (pip install 'fusechat[judge]')"
    )


@each("status", ["403", "404"])
def test_one_request_that_is_refused_after_others_were_answered_is_missing(tmp_path: Path, status: str) -> None:
    """A gateway refuses what it does not like to read with these."""
    with canned() as upstream, misbehaving(upstream, [None, None, status]) as (url, _):
        found = client(url, concurrency=1).ask([question(n) for n in range(4)], tmp_path / "j", description="x")
    assert [type(one).__name__ for one in found] == ["Reply", "Reply", "Missing", "Reply"]
    with canned() as upstream, misbehaving(upstream, [status]) as (url, _), pytest.raises(ModelError):
        client(url, concurrency=1).ask([question(9)], tmp_path / "j", description="x")


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSECHAT_JUDGE_KEY", "OPENAI_API_KEY", "FUSECHAT_MODEL_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert judge_key() is None
    assert model_key() is None
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    assert judge_key() == "general"
    assert model_key() is None
    monkeypatch.setenv("FUSECHAT_JUDGE_KEY", "judge's")
    monkeypatch.setenv("FUSECHAT_MODEL_KEY", "model's")
    assert judge_key() == "judge's"
    assert model_key() == "model's"
    monkeypatch.setenv("FUSECHAT_JUDGE_KEY", "")
    assert judge_key() is None, "set to nothing it says that there is none"


def unsupported(name: str, style: str) -> tuple[int, Any]:
    words = {
        "max_tokens": "Use 'max_completion_tokens' instead.",
        "temperature": "Only the default (1) is.",
        "seed": "",
    }
    if style == "openai":
        message = f"Unsupported parameter: '{name}' is not supported with this model. {words[name]}"
        return 400, {"error": {"message": message, "param": name, "code": "unsupported_parameter"}}
    if style == "detail":
        return 422, {
            "detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}]
        }
    return 400, {"error": f"this model does not support {name}"}


@each("style", ["openai", "detail", "plain"])
def test_parameters_that_a_server_does_not_know(tmp_path: Path, heard: list[str], style: str) -> None:
    heard.clear()

    class Newer(Canned):
        def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
            wrong = [name for name in ("max_tokens", "temperature", "seed") if name in body]
            return unsupported(wrong[0], style) if wrong else super().answer(body)

    server = Newer(delay=0.02)
    with canned(server) as url:
        judge = client(url, concurrency=4, retries=0)
        found = judge.ask([question(number, seed=1) for number in range(12)], tmp_path / "j", description="judging")
        assert all(isinstance(reply, Reply) for reply in found)
        assert len(server.asked) <= 12 + 3 * 4
        assert set(server.asked[-1]) == {"model", "messages", "max_completion_tokens"}
        assert server.asked[-1]["max_completion_tokens"] == 8
        before = len(server.asked)
        judge.ask([question(50, seed=1)], tmp_path / "j", description="judging")
        assert len(server.asked) == before + 1
    assert ["temperature is left out" in line or "seed is left out" in line for line in heard] == [True, True]


def test_other_refusals_change_nothing(tmp_path: Path) -> None:
    said = "'max_tokens' is too large: 8. This model supports at most 4 completion tokens."
    server = answering({"error": {"message": said, "param": "max_tokens", "code": "invalid_value"}}, status=400)
    with canned(server) as url:
        assert ask(url, [question(1)], tmp_path / "j") == [Missing(f"status 400: {said}")]
    assert len(server.asked) == 1


def test_a_server_that_has_no_log_probabilities_is_not_asked_without(tmp_path: Path) -> None:
    server = answering({"error": {"message": "logprobs is not supported with this model"}}, status=400)
    with canned(server) as url:
        (found,) = ask(url, [question(1, top_logprobs=5)], tmp_path / "j")
    assert found == Missing("status 400: logprobs is not supported with this model")


def test_no_error_is_left_for_a_user_without_a_line(tmp_path: Path) -> None:
    with pytest.raises(FuseChatError):
        ask("http://127.0.0.1:1/v1", [question(1)], tmp_path / "j")
