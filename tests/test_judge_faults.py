"""A judge that fails in every way, in front of a real server: everything is answered in the end, and once."""

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from cases import each
from fusechat.errors import FuseChatError, ModelError
from fusechat.models import client as module
from fusechat.models.answers import Missing
from fusechat.models.client import Reply
from judging import PASSING, canned, client, journal_keys, misbehaving, question, real_server

QUESTIONS = [question(number, max_tokens=4, top_logprobs=5) for number in range(14)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with real_server() as url:
        yield url


def ask(url: str, requests: Any, journal: Path, **options: Any) -> list[Reply | Missing]:
    return client(url, **options).ask(requests, journal, description="judging")


def refusal(url: str, journal: Path, requests: Any = QUESTIONS, **options: Any) -> str:
    with pytest.raises(FuseChatError) as caught:
        ask(url, requests, journal, **options)
    assert isinstance(caught.value, ModelError)
    return str(caught.value)


def test_a_real_server_answers_with_log_probabilities(served: str, tmp_path: Path) -> None:
    found = ask(served, QUESTIONS[:4], tmp_path / "j", concurrency=2)
    for reply in found:
        assert isinstance(reply, Reply)
        assert reply.finish == "length"
        assert reply.completion_tokens == 4
        assert reply.prompt_tokens is not None
        assert reply.logprobs is not None
        assert len(reply.logprobs) == 4
        assert "".join(entry["token"] for entry in reply.logprobs) == reply.text
        for entry in reply.logprobs:
            likely = [each["logprob"] for each in entry["top_logprobs"]]
            assert len(likely) == 5
            assert likely == sorted(likely, reverse=True)
            assert entry["logprob"] == likely[0]  # the temperature is 0
            assert sum(map(math.exp, likely)) <= 1.0 + 1e-6
    assert ask(served, QUESTIONS[:4], tmp_path / "j") == found


def test_every_fault_in_one_run(served: str, tmp_path: Path) -> None:
    """Each passing fault twice, a request that is refused, an answer without a score; then the two that stop everything."""
    journal = tmp_path / "j"
    faults = [*PASSING, None, "400", None, "no score", *(fault for fault in PASSING if fault != "drip")]
    with misbehaving(served, faults) as (url, proxy):
        judge = client(url, concurrency=4, timeout=6.0, retries=20)  # one request may get most of them
        found = judge.ask(QUESTIONS, journal, description="judging")
        missing = [result for result in found if isinstance(result, Missing)]
        assert missing == [Missing("status 400: told to say 400")]
        texts = [reply.text for reply in found if isinstance(reply, Reply)]
        assert texts.count("I would rather not say.") == 1
        assert len(journal_keys(journal)) == len(set(journal_keys(journal))) == 13
        assert proxy.passed >= 13  # more, where this computer is so busy that an answer comes too late
        assert proxy.got - proxy.passed >= len(faults) - 3  # of the script two are passed on, and one without its score
        for status, said in (("401", "refuses the key"), ("403", "refuses the key"), ("404", "has no model judge")):
            proxy.script([status])
            assert said in refusal(url, journal)
        assert len(journal_keys(journal)) == 13
        before = proxy.got
        again = judge.ask(QUESTIONS, journal, description="judging")
        assert proxy.got == before + 1  # what was refused, and nothing else
        assert sum(reply != first for reply, first in zip(again, found, strict=True)) == 1
        assert judge.ask(QUESTIONS, journal, description="judging") == again
        assert proxy.got == before + 1
    assert sorted(journal_keys(journal)) == sorted(request.key("judge") for request in QUESTIONS)


@each("fault", PASSING)
def test_a_fault_that_stays_is_missing_and_the_others_go_on(tmp_path: Path, fault: str) -> None:
    def faults() -> Iterator[str | None]:
        yield None
        yield from [fault] * 3

    with canned() as upstream, misbehaving(upstream, faults()) as (url, proxy):
        proxy.retry_after = "0"
        found = ask(
            url, QUESTIONS[:5], tmp_path / "j", concurrency=1, retries=2, timeout=1.0 if fault == "drip" else 30.0
        )
        assert [isinstance(result, Missing) for result in found] == [False, True, False, False, False]
        said = {
            "cut": "a broken connection (Server disconnected without sending a response.)",
            "half": "a broken connection (peer closed connection without sending complete message body",
            "429": "status 429: told to say 429",
            "500": "status 500: told to say 500",
            "503": "status 503: told to say 503",
            "nonsense": "no chat completion came (",
            "shape": "no chat completion came (no choices in",
            "drip": "no answer within 1 s",
        }[fault]
        assert isinstance(found[1], Missing)
        assert found[1].reason.startswith(said)
        assert found[1].reason.endswith(", asked 3 times")
        assert proxy.got == 4 + 3
        assert all(isinstance(result, Reply) for result in ask(url, QUESTIONS[:5], tmp_path / "j"))
        assert proxy.got == 4 + 3 + 1


@each("form", [str, lambda seconds: format_datetime(datetime.now(UTC) + timedelta(seconds=seconds + 1))])
def test_what_a_server_asks_to_wait_is_waited(tmp_path: Path, form: Any) -> None:
    with canned() as upstream, misbehaving(upstream, ["429", "429"]) as (url, proxy):
        proxy.retry_after = form(1)
        began = time.monotonic()
        assert isinstance(ask(url, QUESTIONS[:1], tmp_path / "j")[0], Reply)
        assert 0.9 < time.monotonic() - began < 8
    assert proxy.got == 3


def test_long_waits_are_said_once_and_have_an_end(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with canned() as upstream, misbehaving(upstream, ["429"] * 9) as (url, proxy):
        for asked in ("86400", "61", "59", "-5", "nonsense", "inf"):
            proxy.retry_after = asked
            proxy.script(["429"])
            if asked == "86400":
                judge = client(url)
            assert isinstance(judge.ask([question(len(waits))], tmp_path / "j", description="judging")[0], Reply)
    assert [round(wait) for wait in waits] == [600, 61, 59, 0, 0, 0]
    assert heard == [
        f"--judge-url: the server at {url}: asks to wait 86400 s (status 429: told to say 429); waiting 600 s"
    ]
