"""What stops a run that asks a judge, what does not, and what stays of it; the key is told to nobody but the server."""

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cases import each
from fusechat.errors import FuseChatError, ModelError, RecipeError
from fusechat.models import client as module
from fusechat.models.answers import Missing
from fusechat.models.client import Reply
from judging import Canned, canned, client, journal_keys, misbehaving, question

KEY = "sk-open-sesame-0123456789"
QUESTIONS = [question(number) for number in range(14)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


@pytest.fixture
def nobody() -> Iterator[str]:
    """A URL on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def ask(url: str, requests: Any, journal: Path, **options: Any) -> list[Reply | Missing]:
    return client(url, **options).ask(requests, journal, description="judging")


def refusal(url: str, journal: Path, requests: Any = QUESTIONS, **options: Any) -> str:
    with pytest.raises(FuseChatError) as caught:
        ask(url, requests, journal, **options)
    assert isinstance(caught.value, ModelError)
    return str(caught.value)


def test_nobody_is_there(tmp_path: Path, nobody: str) -> None:
    line = f"--judge-url: the server at {nobody}: no connection (Connection refused); is it running?"
    assert refusal(nobody, tmp_path / "j") == line
    assert refusal(nobody, tmp_path / "j", what=f"fused, served at {nobody}").startswith(
        f"fused, served at {nobody}: no"
    )


def test_a_name_that_nobody_has(tmp_path: Path) -> None:
    line = refusal("http://nobody.invalid/v1", tmp_path / "j")
    assert line.startswith("--judge-url: the server at http://nobody.invalid/v1: no connection (")


def test_a_server_that_goes_away_stops_the_run_and_what_was_answered_stays(tmp_path: Path) -> None:
    many = [question(number) for number in range(40)]
    with canned() as upstream, misbehaving(upstream, [*[None] * 12, *["cut"] * 1000]) as (url, proxy):
        line = refusal(url, tmp_path / "j", many, concurrency=3, retries=2)
        assert line == (
            f"--judge-url: the server at {url}: a broken connection (Server disconnected without sending a response.), 5 "
            "requests in a row; is it running? What was answered is kept; run again to continue"
        )
        assert len(journal_keys(tmp_path / "j")) == 12
        assert proxy.got <= 12 + (5 + 2) * 3
        proxy.script([])
        assert all(isinstance(result, Reply) for result in ask(url, many, tmp_path / "j"))
        assert proxy.passed == 40


def test_failures_that_an_answer_is_between_do_not_stop_the_run(tmp_path: Path) -> None:
    script = itertools.chain.from_iterable(["cut", "cut", "cut", "cut", None] for _ in range(4))
    with canned() as upstream, misbehaving(upstream, script) as (url, _):
        found = ask(url, [question(number) for number in range(20)], tmp_path / "j", concurrency=1, retries=0)
    assert sum(isinstance(result, Missing) for result in found) == 16


@each("status, error, said", [
    (401, {"message": f"Incorrect API key provided: {KEY}"},
     "refuses the key; FUSECHAT_JUDGE_KEY or OPENAI_API_KEY in the environment has to hold it"),
    (404, {"message": "The model `judge` does not exist."},
     "has no model judge, or the URL is not the one that ends in /v1 (status 404: The model `judge` does not exist.)"),
    (429, {"message": "You exceeded your current quota.", "code": "insufficient_quota"},
     "status 429: You exceeded your current quota."),
    (402, {"message": "Insufficient Balance"}, "status 402: Insufficient Balance"),
])  # fmt: skip
def test_what_is_hopeless_for_all_stops_at_once(tmp_path: Path, status: int, error: dict[str, str], said: str) -> None:
    class Ends(Canned):
        def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
            return super().answer(body) if len(self.asked) <= 3 else (status, {"error": error})

    with canned(server := Ends()) as url:
        assert refusal(url, tmp_path / "j", key=KEY, concurrency=1) == f"--judge-url: the server at {url}: {said}"
        refused = 5 if status == 404 else 1  # after others were answered, a few may be refused for themselves
        assert len(server.asked) == 3 + refused
        assert len(journal_keys(tmp_path / "j")) == 3


def test_a_models_key_has_another_name(tmp_path: Path) -> None:
    with canned() as upstream, misbehaving(upstream, ["403"]) as (url, _):
        line = refusal(url, tmp_path / "j", what="fused", key_names=(module.MODEL_KEY,))
    said = "refuses the key; FUSECHAT_MODEL_KEY in the environment has to hold it (status 403: told to say 403)"
    assert line == f"fused: the server at {url}: {said}"


def test_requests_that_are_refused_are_missing_each(tmp_path: Path) -> None:
    class Short(Canned):
        def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
            said = f"too\n long: {'word ' * 100}"
            return (400, {"message": said}) if len(self.asked) <= 3 else super().answer(body)

    with canned(Short()) as url:
        found = ask(url, QUESTIONS[:5], tmp_path / "j", concurrency=1)
    assert [isinstance(result, Missing) for result in found] == [True] * 3 + [False] * 2
    assert isinstance(found[0], Missing)
    assert found[0].reason.startswith("status 400: too long: word word")
    assert len(found[0].reason) < 220


def test_the_key_is_sent_and_never_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSECHAT_JUDGE_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(module.log, "propagate", True)

    class Echo(Canned):
        said = (400, 500, 503, 429, 401)

        def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
            number = len(self.asked) - 2
            message = f"{'x' * 180} Authorization: Bearer {KEY}"
            return (self.said[number], {"error": {"message": message}}) if number >= 0 else super().answer(body)

    told: list[str] = []
    with canned(Echo()) as upstream, misbehaving(upstream) as (url, proxy):
        judge = client(url, key=module.judge_key(), concurrency=1, retries=0)
        with pytest.raises(ModelError) as caught:
            judge.ask(QUESTIONS, tmp_path / "j", description="judging")
        told += [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
        told += [repr(judge), str(judge.estimate(QUESTIONS, tmp_path / "j"))]
        for status in ("400", "500"):
            found = client(upstream, key=KEY, retries=0).ask(QUESTIONS[:3], tmp_path / status, description="judging")
            told.append(repr(found))
    assert proxy.authorizations == {f"Bearer {KEY}"}
    told += [record.getMessage() + repr(record.args) for record in caplog.records]
    told += [file.read_text() for file in tmp_path.iterdir()] + list(capfd.readouterr())
    assert all("sesame" not in text and "sk-open" not in text for text in told)
    assert len(caplog.records) > 10
    for bad in ("sk-sesame\r\nX: y", "sk-sesame-é", "sk-sesame\x7f"):
        with pytest.raises(RecipeError) as refused:
            client("http://127.0.0.1:1/v1", key=bad)
        assert "sesame" not in str(refused.value)


def test_without_a_key_that_of_another_server_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with canned() as upstream, misbehaving(upstream) as (url, proxy):
        ask(url, QUESTIONS[:1], tmp_path / "j")
    assert proxy.authorizations == {"Bearer none"}


ASKING = """
import signal
import sys
from pathlib import Path
from fusechat.models.client import Client, Request
requests = [Request((("user", f"Question {number}"),), 0.0, 8) for number in range(40)]
client = Client(url=sys.argv[1], model="judge", key=None, what="--judge-url", concurrency=4)
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's background job it is ignored, and so of its children
client.ask(requests, Path(sys.argv[2]), description="judging")
"""


@each("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_asks_nothing_twice(tmp_path: Path, how: signal.Signals) -> None:
    journal = tmp_path / "j"
    with canned(server := Canned(pauses_after=16)) as upstream, misbehaving(upstream) as (url, proxy):
        command = [sys.executable, "-c", ASKING, url, str(journal)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(journal_keys(journal) if journal.exists() else ()) < 10:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, how)
        began = time.monotonic()
        said = process.communicate(timeout=20)[1]
        assert process.returncode != 0
        assert time.monotonic() - began < 5
        if how == signal.SIGINT:
            assert said.rstrip().endswith("KeyboardInterrupt")
            assert "never" not in said  # … awaited, … retrieved
        server.go_on.set()
        proxy.settle()
        kept = journal_keys(journal)
        assert 10 <= len(kept) == len(set(kept)) < 40
        assert len(kept) <= proxy.passed <= len(kept) + 4
        before = proxy.passed
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert proxy.passed - before == 40 - len(kept)
        keys = journal_keys(journal)
        assert keys[: len(kept)] == kept
        assert len(keys) == len(set(keys)) == 40
