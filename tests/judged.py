"""`fusechat eval` of judged suites from the command line: tiny models, a small real one behind a server as model and as judge, and
proxies that count what they are asked."""

import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alpaca_evaluating
import mt_benching
from judging import GRADES, Misbehaving, Remembered, canned, journal_keys, misbehaving, real_server
from reporting import students_t
from runs import here

KEY = "sk-open-sesame-0123456789"
LIMITS = {"mt-bench": 8, "alpaca-eval": 6}
JUDGEMENTS = 2 * LIMITS["mt-bench"]  # of one model
RUNS = {"FUSECHAT_JUDGE_KEY": KEY, "FUSECHAT_MODEL_KEY": "", "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
Ended = subprocess.CompletedProcess[str]


@dataclass
class Place:
    """`judge`: a proxy before the real server, whose answers are remembered; `model`: another one before the same server, which
    serves one of the `subjects`."""

    root: Path
    url: str
    judge: Misbehaving
    model: Misbehaving
    memory: Remembered
    subjects: dict[str, str]

    def command(self, suite: str, out: Path, *more: str, models: str = "one two") -> list[str]:
        options = ["--judge-url", self.url, "--judge-model", "judge", "--limit", str(LIMITS[suite])]
        options += ["--data", str(self.root / suite), "--dtype", "float32", "--device", "cpu"]
        options += ["--max-new-tokens", "4"]  # a judgement takes as long as what the judge has to read
        subjects = [f"{name}={self.subjects[name]}" for name in models.split()]
        return ["eval", suite, *subjects, *options, "--out", str(out / "results.json"), *more]

    def run(self, suite: str, out: Path, *more: str, models: str = "one two") -> Ended:
        return here(*self.command(suite, out, *more, models=models), **RUNS)


@contextmanager
def place(root: Path, models: dict[str, Path]) -> Iterator[Place]:
    mt_benching.write(root / "mt-bench")
    (root / "alpaca-eval").mkdir()
    baseline = root / "alpaca-eval" / "alpaca_eval_gpt4_baseline.json"
    alpaca_evaluating.write(baseline, alpaca_evaluating.baseline_records())
    with (
        real_server(GRADES) as real,
        canned(memory := Remembered(upstream=real)) as remembered,
        misbehaving(remembered) as (url, judge),
        misbehaving(remembered) as (served, model),
    ):
        subjects = {"one": str(models["llama"]), "two": str(models["mistral"]), "served": f"{served}#any"}
        yield Place(root, url, judge, model, memory, subjects)


@dataclass(frozen=True)
class Scored:
    """The first run of a suite: where its files are, what it printed, and how many different things it asked the judge."""

    suite: str
    models: str
    out: Path
    ended: Ended
    calls: int


def scored(place: Place, suite: str, models: str) -> Scored:
    out = place.root / f"{suite} first"
    ended = place.run(suite, out, models=models)
    assert ended.returncode == 0, ended.stderr
    return Scored(suite, models, out, ended, len(journal_keys(out / suite / "judgements.jsonl")))


def answered(first: Scored, name: str) -> Path:
    """Another directory with the models' answers, and no judgement."""
    out = first.out.parent / name
    for file in first.out.glob(f"{first.suite}/*/answers.jsonl"):
        (out / file.relative_to(first.out)).parent.mkdir(parents=True)
        shutil.copy(file, out / file.relative_to(first.out))
    return out


def records(out: Path, suite: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, data, metric) → record, as results.json has them."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["schema"] == 2
    ours = [one for one in found["scores"] if one["suite"] == suite]
    return {(one["model"], one["data"], one["metric"]): one for one in ours}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def mean(clusters: list[list[float]]) -> tuple[float, float]:
    """Of all values, and its standard error where clusters were drawn: Cochran's (6.13)."""
    everything = [value for one in clusters for value in one]
    found, n = statistics.fmean(everything), len(clusters)
    squares = sum((sum(one) - found * len(one)) ** 2 for one in clusters)
    return found, math.sqrt(n / (n - 1) * squares) / len(everything)


def shows(ended: Ended, model: str, value: float, error: float, items: int) -> bool:
    """The table names the model and has the value with half of its 95% interval."""
    return f" {model} " in ended.stdout and f" {value:.2f} ± {students_t(items) * error:.2f} " in ended.stdout


def refused(ended: Ended, line: str) -> None:
    """A user's mistake: status 2, and one line of stderr after what was told before."""
    assert ended.returncode == 2, ended
    assert ended.stderr.splitlines()[-1] == f"fusechat: error: {line}"
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def tells_no_key(out: Path, ended: Ended) -> bool:
    texts = [file.read_text(encoding="utf-8") for file in out.rglob("*") if file.is_file()]
    return all("sesame" not in text for text in [*texts, ended.stdout, ended.stderr])
