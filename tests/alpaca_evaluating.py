"""AlpacaEval data of our own words, a judge that follows a script, and the published annotations where they are at hand."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusechat.evaluate.alpaca.annotate import Pair
from fusechat.evaluate.answers import Ask
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import Estimate, Reply, Request

SHARED = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
PUBLISHED = SHARED / "FuseChat-Llama-3.2-1B-Instruct.annotations.json"
GAMED = SHARED / "df_gamed.csv"
JUDGE = "judge-1"
_OUTPUTS = re.compile(
    r'"model_identifier": "m",\s+"output": """(.*)"""\s+},\s+{\s+"model_identifier": "M",\s+"output": """(.*)"""\s+}\s+}\s+## Task',
    re.DOTALL,
)


def needs_the_library() -> None:
    """At the head of a module. The library may be there and need our help to be imported, so that importorskip would not do."""
    if find_spec("alpaca_eval") is None:
        pytest.skip("alpaca-eval is not installed", allow_module_level=True)


def published() -> list[dict[str, Any]]:
    if not PUBLISHED.exists():
        pytest.skip("the published annotations of AlpacaEval are not at hand")
    return list(json.loads(PUBLISHED.read_text(encoding="utf-8")))


def baseline_records(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"instruction": f"What is {n} + 1?", "output": f"It is {n + 1}.", "generator": "base", "dataset": "sums"}
        for n in range(count)
    ]


def annotation_records(count: int = 12, model: str = "ours") -> list[dict[str, Any]]:
    return [
        {
            "dataset": one["dataset"],
            "instruction": one["instruction"],
            "output_1": one["output"],
            "generator_1": one["generator"],
            "output_2": f"Number {n}",
            "generator_2": model,
            "annotator": "somebody",
            "preference": 1 + n / count,
        }
        for n, one in enumerate(baseline_records(count))
    ]


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def shown(request: Request) -> tuple[str, str]:
    """The outputs called m and M, as the judge reads them."""
    found = _OUTPUTS.search(request.messages[-1][1])
    assert found, request
    return found[1], found[2]


def reply(**logprobs: float) -> Reply:
    """The judge's token and its alternatives, the likeliest first."""
    top = sorted(
        ({"token": token, "logprob": value} for token, value in logprobs.items()), key=lambda one: -one["logprob"]
    )
    return Reply(top[0]["token"], "length", 700, 1, [{**top[0], "top_logprobs": top}])


def preferring(request: Request, probability: Callable[[str, str], float]) -> Reply:
    """`probability` that the second of two outputs, in either order, is the better one: p(a, b) = 1 - p(b, a)."""
    later = probability(*shown(request))
    return reply(m=_log(1 - later), M=_log(later), The=-15.0)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -9999.0


class Judge:
    """A client whose server answers by a script. What was asked is in `asked`."""

    address = "http://judge.test/v1"
    model = JUDGE

    def __init__(self, script: Callable[[Request], Reply | Missing]) -> None:
        self.script = script
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], journal: Path, *, description: str) -> list[Reply | Missing]:
        assert journal.name == "judgements.jsonl"
        self.asked.extend(requests)
        return [self.script(request) for request in requests]

    def estimate(self, requests: Sequence[Request], journal: Path) -> Estimate:
        return Estimate(JUDGE, len({one.key(JUDGE) for one in requests}), 0, 0, sum(one.max_tokens for one in requests))


def by_table(pairs: dict[tuple[str, str], float]) -> Callable[[Request], Reply]:
    """(baseline, output) → preference."""

    def probability(first: str, second: str) -> float:
        return pairs[first, second] - 1 if (first, second) in pairs else 2 - pairs[second, first]

    return lambda request: preferring(request, probability)


def answering(answers: dict[str, Sequence[str | None]]) -> Any:
    """Label → an answer to each prompt; None for no answer."""

    @contextmanager
    def context(subject: Any) -> Iterator[Ask]:
        def ask(prompts: Sequence[Prompt]) -> list[Answer | Missing]:
            given = answers[subject.label][: len(prompts)]
            assert [prompt.key for prompt in prompts] == [str(index) for index in range(len(given))]
            return [Missing("the server is gone") if text is None else Answer(text, 3, True) for text in given]

        yield ask

    return context


def subject(label: str) -> Any:
    return SimpleNamespace(label=label, folder=label.replace("/", "_"), role="")


def pair(number: int = 0) -> Pair:
    return Pair(f"Question {number}?", f"baseline {number}", f"answer {number}")
