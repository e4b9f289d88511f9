"""`fusechat eval harness` with task files of our own: values computed again by plain loops, mistakes told in a line."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from fusechat.commands.cli import app
from fusechat.errors import FuseChatError
from fusechat.evaluate.harness import measurements
from runs import here

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)
COUNT, LONGEST = 10, 8
KINDS = {"one": "llama", "two": "mistral"}
RENDERED: dict[str, Callable[[str], str]] = {
    "one": lambda text: (
        f"<|im_start|>system\n{tiny.DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "two": lambda text: f"<s>[INST] {text} [/INST]",
}
QUESTIONS = [f"What is {number} + {number + 1}?" for number in range(COUNT)]
CHOICES = [[f"{2 * number + 1}", "It is Paris.", f"{number} eggs"] for number in range(COUNT)]
GOLD = [number % 3 for number in range(COUNT)]


@dataclass(frozen=True)
class Run:
    records: dict[tuple[str, str, str], dict[str, Any]]
    samples: dict[str, dict[str, list[dict[str, Any]]]]  # model → task → in order


def say(loaded: dict[str, Any], tokenizers: dict[str, Any], name: str, question: str) -> str:
    """The likeliest answer, one token after the other."""
    model, tokenizer = loaded[KINDS[name]], tokenizers[KINDS[name]]
    ids = tokenizer(RENDERED[name](question), add_special_tokens=False)["input_ids"]
    said: list[int] = []
    while len(said) < LONGEST and tokenizer.eos_token_id not in said:
        with torch.inference_mode():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return str(tokenizer.decode(said, skip_special_tokens=True))


def log_likelihood(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    """Of all that follows the context, without the white space at its end: that belongs to the choice's tokens."""
    ids = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))


def task(directory: Path, name: str, file: Path, **more: Any) -> None:
    of_all = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
    }
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(of_all | more), encoding="utf-8")


def metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, loaded: dict[str, Any], tokenizers: dict[str, Any]) -> Path:
    """`sums` is multiple choice; of `say` every other answer is what model `one` says. `gone` has no data, `odd` no sense."""
    root = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": question, "choices": choices, "answer": gold}
        for question, choices, gold in zip(QUESTIONS, CHOICES, GOLD, strict=True)
    ]
    (root / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    answers = [
        say(loaded, tokenizers, "one", text) if number % 2 else "no such words" for number, text in enumerate(QUESTIONS)
    ]
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (root / "say.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    directory = root / "tasks"
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics("acc", "acc_norm")}
    task(directory, "sums", root / "sums.jsonl", **choice)
    generation = {"until": ["\n\n"], "max_gen_toks": LONGEST, "do_sample": False}
    words = {"output_type": "generate_until", "generation_kwargs": generation, "metric_list": metrics("exact_match")}
    task(directory, "say", root / "say.jsonl", **words)
    task(directory, "gone", root / "gone.jsonl", **words)
    task(directory, "odd", root / "say.jsonl", **words | {"output_type": "guess"})
    return directory


def command(tasks: Path, names: str, out: Path, *models: str) -> list[str]:
    options = ["--tasks", names, "--include", str(tasks), "--dtype", "float32", "--device", "cpu"]
    return ["eval", "harness", *models, *options, "--out", str(out / "results.json")]


@pytest.fixture(scope="module")
def ran(tasks: Path, models: dict[str, Path]) -> Run:
    out = tasks.parent / "out"
    given = [f"{name}={models[kind]}" for name, kind in KINDS.items()]
    ended = here(*command(tasks, "sums,say", out, *given))
    assert ended.returncode == 0, ended.stderr
    assert "exact match" in ended.stdout
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in KINDS:
        for line in (out / "harness" / name / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            samples.setdefault(name, {}).setdefault(one["task"], []).append(one)
    scores = json.loads((out / "results.json").read_text(encoding="utf-8"))["scores"]
    return Run({(one["model"], one["data"], one["metric"]): one for one in scores}, samples)


@pytest.mark.parametrize("name", KINDS)
def test_choices_are_those_of_a_plain_loop(
    name: str, ran: Run, loaded: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    model, tokenizer = loaded[KINDS[name]], tokenizers[KINDS[name]]
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for question, choices, gold, sample in zip(QUESTIONS, CHOICES, GOLD, ran.samples[name]["sums"], strict=True):
        expected = [log_likelihood(model, tokenizer, RENDERED[name](question), choice) for choice in choices]
        assert [value for value, _ in sample["filtered_resps"]] == [pytest.approx(one, abs=1e-3) for one in expected]
        right["acc"].append(float(expected.index(max(expected)) == gold))
        by_length = [value / len(choice) for value, choice in zip(expected, choices, strict=True)]
        right["acc_norm"].append(float(by_length.index(max(by_length)) == gold))
    for metric, found in right.items():
        record = ran.records[name, "sums", f"{metric},none"]
        assert record["value"] == pytest.approx(statistics.fmean(found))
        assert record["standard_error"] == pytest.approx(statistics.stdev(found) / math.sqrt(COUNT))
        assert (record["n"], record["missing"], record["higher_is_better"]) == (COUNT, 0, True)
        assert [sample[metric] for sample in ran.samples[name]["sums"]] == found


@pytest.mark.parametrize("name", KINDS)
def test_words_are_those_of_a_plain_loop(
    name: str, ran: Run, loaded: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    said = [say(loaded, tokenizers, name, question).partition("\n\n")[0] for question in QUESTIONS]
    samples = ran.samples[name]["say"]
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in said]
    assert [sample["doc"]["question"] for sample in samples] == QUESTIONS
    matches = [sample["exact_match"] for sample in samples]
    assert ran.records[name, "say", "exact_match,none"]["value"] == pytest.approx(statistics.fmean(matches))
    assert statistics.fmean(matches) == (0.5 if name == "one" else 0.0)


@pytest.mark.parametrize(("data", "metric"), [("sums", "acc"), ("sums", "acc_norm"), ("say", "exact_match")])
def test_differences_are_of_the_same_documents(ran: Run, data: str, metric: str) -> None:
    one, two = ([sample[metric] for sample in ran.samples[name][data]] for name in KINDS)
    differences = [ours - theirs for ours, theirs in zip(two, one, strict=True)]
    record = ran.records["two", data, f"{metric},none"]
    assert (record["compared_with"], record["difference_n"]) == ("one", COUNT)
    assert record["difference_to_pivot"] == pytest.approx(statistics.fmean(differences))
    assert record["difference_standard_error"] == pytest.approx(statistics.stdev(differences) / math.sqrt(COUNT))
    assert ran.records["one", data, f"{metric},none"]["difference_to_pivot"] is None


def test_what_cannot_be_run_is_told_in_a_line(
    tasks: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(names: str, *given: str, include: Path = tasks) -> str:
        with pytest.raises(FuseChatError) as refused:
            app(command(include, names, tmp_path, *given), standalone_mode=False)
        (told,) = refused.value.messages
        assert "\n" not in told
        assert not (tmp_path / "results.json").exists()
        return str(told)

    one = f"one={models['llama']}"
    assert line("odd", one).startswith("--tasks odd: ValueError: Got invalid output_type 'guess'")
    assert line("sums", one, "far=http://127.0.0.1:1/v1#x") == (
        "far: harness needs the model itself, not a server; name its directory"
    )
    assert "has no chat template" in line("sums", one, f"bare={models['gemma']}")
    assert not (tmp_path / "harness" / "one").exists()  # it was not measured in vain
    assert line(",", one) == "--tasks: names no task"
    assert line("sums", one, include=tmp_path / "none") == f"--include {tmp_path / 'none'}: no such directory"
    broken = tmp_path / "broken"
    broken.mkdir()
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "no tasks" / "of its own"))  # slow to list
    (broken / "sums.yaml").write_text("task: sums\ndataset_path: [json\ntest_split: test\n", encoding="utf-8")
    assert line("sums", one, include=broken).startswith(f"{broken / 'sums.yaml'}:3: not YAML: ")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("sums,nothing", "--tasks nothing: no such task in the harness or {tasks}"),
        ("gone", "--tasks gone: FileNotFoundError: Unable to find '{data}'"),
    ],
)
def test_exit_status(names: str, line: str, tasks: Path, models: dict[str, Path], tmp_path: Path) -> None:
    ended = here(*command(tasks, names, tmp_path, f"one={models['llama']}"))
    assert ended.returncode == 2
    told = line.format(tasks=tasks, data=tasks.parent / "gone.jsonl")
    assert ended.stderr.splitlines()[-1] == f"fusechat: error: {told}"
    assert "Traceback" not in ended.stderr


def samples(metric: str, *values: Any, kind: str = "none") -> list[dict[str, Any]]:
    return [{"doc_id": number, "filter": kind, metric: value} for number, value in enumerate(values)]


def found(values: dict[str, Any], of: list[dict[str, Any]], **more: Any) -> Any:
    results = {
        "results": {"t": values},
        "samples": {"t": of},
        "n-samples": {"t": {"original": 9, "effective": 3}},
        **more,
    }
    (only,) = measurements(results)
    return only


def test_numbers_are_the_harnesss_own() -> None:
    values = {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.25, "name": "t", "sample_len": 3}
    one = found(values, samples("acc", 1.0, 0.0, 1.0, 1.0), higher_is_better={"t": {"acc": True}})
    assert (one.data, one.metric, one.value, one.standard_error, one.n) == ("t", "acc,none", 0.75, 0.25, 3)
    assert (one.higher_is_better, one.missing, one.why) == (True, 0, None)
    assert one.items == {"0": (1.0, 1.0), "1": (0.0, 1.0), "2": (1.0, 1.0), "3": (1.0, 1.0)}
    assert (one.estimate.value, one.estimate.standard_error, one.estimate.n) == (0.75, 0.25, 3)


def test_a_metric_that_is_no_mean_over_documents_has_no_items() -> None:
    """Of a perplexity the samples hold log-likelihoods: more of these is better, less of that."""
    likelihoods = (-1.0, -3.0)
    values = {"perplexity,none": math.exp(2.0), "perplexity_stderr,none": 1.0}
    one = found(values, samples("perplexity", *likelihoods), higher_is_better={"t": {"perplexity": False}})
    assert (one.items, one.higher_is_better) == ({}, False)
    assert one.value == pytest.approx(math.exp(2.0))


def test_numbers_that_are_none() -> None:
    one = found({"f1,none": 0.5, "f1_stderr,none": "N/A"}, samples("f1", (1, 0.3), (0, 0.2), (1, 0.9)))
    assert (one.value, one.standard_error, one.items, one.higher_is_better) == (0.5, None, {}, None)
    one = found({"acc,none": math.nan, "acc_stderr,none": math.nan}, samples("acc", 1.0))
    assert (one.why, one.estimate.value, one.estimate.standard_error) == (
        "the harness found no finite value",
        None,
        None,
    )
    one = found({"acc,none": 1, "acc_stderr,none": math.nan}, samples("acc", 1.0))
    assert (one.estimate.value, one.estimate.standard_error) == (1.0, None)
    assert found({"acc,none": 1.0, "word,none": "many"}, []).items == {}


def test_samples_that_are_truth_values_and_of_one_filter() -> None:
    values = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5}
    mixed = samples("exact_match", True, False, kind="strict") + samples("exact_match", True, True, kind="loose")
    assert found(values, mixed).items == {"0": (1.0, 1.0), "1": (0.0, 1.0)}
    assert found(values, samples("exact_match", 1.0, math.nan, kind="strict")).items == {}


def test_groups_have_no_samples_of_their_own() -> None:
    group = {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "part": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    counted = {"part": {"original": 9, "effective": 2}, "other": {"original": 9, "effective": 3}}
    parts = {"all": ["part", "more"], "more": ["other"], "part": []}
    results = {"results": group, "samples": {"part": samples("acc", 1.0, 0.0)}, "n-samples": counted}
    whole, part = measurements(results | {"group_subtasks": parts})
    assert (whole.data, whole.items, whole.value, whole.n) == ("all", {}, 0.5, 5)
    assert (part.data, len(part.items), part.n) == ("part", 2, 2)
