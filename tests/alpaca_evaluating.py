"""AlpacaEval data of our own words, a judge that follows a script, and the published annotations where they are at hand."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusechat.evaluate.alpaca import data
from fusechat.evaluate.alpaca.annotate import Pair
from fusechat.evaluate.answers import Ask
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.client import Estimate, Reply, Request
from fusechat.run.files import digest_json

SHARED = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
PUBLISHED = SHARED / "FuseChat-Llama-3.2-1B-Instruct.annotations.json"  # of a licence that does not let them be here
GAMED = SHARED / "df_gamed.csv"
JUDGE, OFFICIAL = "judge-1", data._OFFICIAL
_OUTPUTS = re.compile(
    r'"model_identifier": "m",\s+"output": """(.*)"""\s+},\s+{\s+"model_identifier": "M",\s+"output": """(.*)"""\s+}\s+}\s+## Task',
    re.DOTALL,
)


def needs_the_library() -> None:
    """At the head of a module. The library may be there and need our help to be imported, so that importorskip would not do."""
    if find_spec("alpaca_eval") is None:
        pytest.skip("alpaca-eval is not installed", allow_module_level=True)


LENGTH, DIFFICULTY, SKILL = 0.8, 0.5, -0.9  # by which the judge of what is made up decides
COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model")


@cache
def _drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of the baseline's and of the model's answers, and how hard the instructions are."""
    chance = np.random.default_rng(0)
    return chance.integers(20, 400, 805), chance.integers(120, 600, 805), chance.normal(size=805)


def odds(by_length: np.ndarray | float, skill: float = SKILL) -> np.ndarray:
    """The shares of wins where the model's answers are longer by so many standard deviations; 0: at equal length."""
    return 1 / (1 + np.exp(-(skill + LENGTH * np.tanh(by_length) + DIFFICULTY * _drawn()[2])))


def made_up() -> list[dict[str, Any]]:
    """Annotations of 805 instructions, which `official` makes AlpacaEval's."""
    ours, theirs = _drawn()[:2]
    delta = (ours - theirs).astype(float)
    wins = odds(-delta / delta.std(ddof=1))
    return [
        {
            "dataset": "made up",
            "instruction": f"Say something of number {n}.",
            "output_1": f"{n} is ".ljust(ours[n], "x"),
            "generator_1": "gpt4_1106_preview",
            "output_2": f"{n} has ".ljust(theirs[n], "y"),
            "generator_2": "model",
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": 1 + float(wins[n]),
        }
        for n in range(805)
    ]


@contextmanager
def official(directory: Path) -> Iterator[Path]:
    """A directory with annotations in the form of the published ones, and difficulties; while it lasts, the instructions there are
    taken for AlpacaEval's."""
    write(directory / f"model{data.ANNOTATIONS}", made_up())
    rows = [",".join(COLUMNS)]
    for model, by_length in (("verbose", -1.0), ("concise", 1.0)):
        wins, hard = odds(-by_length, skill=0.0), _drawn()[2]
        rows += [f"{wins[n]},{n},{by_length},{hard[n]},False,{model}" for n in range(805)]
    (directory / data.GAMED).write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_OFFICIAL", digest_json([one["instruction"].split() for one in made_up()]))
        yield directory


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
