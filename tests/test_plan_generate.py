"""`fusechat plan` of recipes whose sources answer: next to a run, before it and on what it left, and where something is wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import runs
from answering import KNOWN, WORDS, gemma, question, refused, write_prompts, write_recipe
from fusechat.commands.run import run
from fusechat.pipeline import build_steps, load_recipe
from fusechat.plan.answers import longest
from fusechat.plan.devices import SHEETS, Batch, Rates
from fusechat.plan.shapes import shape_of
from test_reward import build

SERVER = {"server": {"url": "http://localhost:9/v1", "model": "large"}}


@pytest.fixture(scope="module")
def place(taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its finished run `work`, and `plan.json` of before; the records hold answers."""
    directory = tmp_path_factory.mktemp("plan-generate")
    write_prompts(directory / "prompts.jsonl", reference=WORDS)
    path = write_recipe(directory, taught)
    (directory / "plan.json").write_text(json.dumps(planned(path)))
    assert not (directory / "work").exists()
    run(load_recipe(path), directory / "work")
    return directory


def planned(path: Path, *options: str | Path) -> dict[str, Any]:
    """On a device of the table, for a work directory beside the recipe."""
    shown = runs.here("plan", path, "--device", "h100", "--workdir", path.parent / "work", "--json", *options)
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout))


def problems(path: Path, *options: str) -> str:
    shown = runs.here("plan", path, "--device", "h100", *options)
    assert shown.returncode == 2, shown.stdout
    assert all(line.startswith(("fusechat: error: ", "see docs/")) for line in shown.stderr.splitlines()), shown.stderr
    return shown.stderr


def by_name(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{step['stage']} {step['name']}".strip(): step for step in plan["steps"]}


def manifests(place: Path) -> dict[str, dict[str, Any]]:
    steps = build_steps(load_recipe(place / "recipe.yaml"), place / "work")
    return {step.label: step.manifest() or {} for step in steps}


def written(manifest: dict[str, Any]) -> int:
    return sum(one["bytes"] for one in manifest["outputs"].values()) + len(json.dumps(manifest, indent=1))


def test_a_plan_of_before_has_the_steps_of_the_run_and_its_answers_are_those_of_the_file(
    place: Path, taught: dict[str, Path]
) -> None:
    plan = json.loads((place / "plan.json").read_text())
    steps, done = by_name(plan), manifests(place)
    assert list(steps) == list(done)
    assert plan["problems"] == []
    for name in KNOWN:
        tokenizer = AutoTokenizer.from_pretrained(taught[name])
        own = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in WORDS.values()]
        step = steps[f"generate {name}/answers"]
        assert step["conversations"] == len(WORDS) == done[f"generate {name}/answers"]["counts"]["answers"]
        assert step["response_tokens"] == pytest.approx(sum(own), rel=0.2), "a model's lengths vary more, up to 16"
        for model in ("pivot", *KNOWN):
            assert steps[f"generate {model}/scores/{name}"]["conversations"] == len(WORDS)
        assert steps[f"prepare pivot/answers-{name}"]["conversations"] == len(WORDS) / 2
    assert steps["generate chosen"]["conversations"] == steps["fuse answers"]["conversations"] == len(WORDS)
    for label, step in steps.items():
        if step["stage"] == "generate":
            assert 0.5 * written(done[label]) < step["disk"] < 2 * written(done[label]), label
            assert min(step["memory"], step["seconds"]) > 0, label
    told = "\n".join(plan["notes"])
    assert "answers are expected to be those of the data file; tokens of an answer: mistral " in told
    assert "no two answers to a prompt are alike, and that those of each source are chosen equally often" in told


def test_what_a_run_left_counts_as_it_is(place: Path) -> None:
    steps, done = by_name(planned(place / "recipe.yaml")), manifests(place)
    for label, step in steps.items():
        known = done[label]["counts"]
        if label.endswith("/answers"):
            assert step["response_tokens"] == known["tokens"] + known["answers"], "one ends each"
            assert step["disk"] == pytest.approx(written(done[label]), rel=0.1)
        elif "/scores/" in label:
            assert step["conversations"] == known["candidates"]
        elif step["stage"] == "prepare" and step["name"] != "overlap":
            assert (step["conversations"], step["tokens"]) == (known["conversations"], known["tokens"]), label
    assert steps["generate chosen"]["conversations"] == len(WORDS)
    assert steps["generate chosen"]["disk"] == pytest.approx(written(done["generate chosen"]), rel=0.2)
    assert steps["fuse answers"]["details"]["steps"] == done["fuse answers"]["counts"]["steps"]


def test_half_a_run_and_answers_of_another_one(place: Path, tmp_path: Path, taught: dict[str, Path]) -> None:
    """Four of six prompts were answered when it ended; with other prompts, or settings, these answers say nothing."""
    for name in ("prompts.jsonl", "held-out.jsonl", "recipe.yaml"):
        shutil.copy(place / name, tmp_path / name)
    path = tmp_path / "recipe.yaml"
    run(load_recipe(path), tmp_path / "work", only="mistral")
    answers = tmp_path / "work/generate/models/mistral/answers"
    told = planned(path)["notes"]
    assert any("answers that are on disk stand for all; tokens of an answer: mistral" in note for note in told)
    assert any("those of the data file; tokens of an answer: gemma" in note for note in told)
    manifest = json.loads((answers / "manifest.json").read_text())
    started = {key: manifest[key] for key in ("fingerprint", "inputs", "built_from", "versions")}
    (answers / "started.json").write_text(json.dumps(started))
    (answers / "manifest.json").unlink()
    (answers / "answers-00001.json").unlink()
    plan = planned(path)
    assert any("mistral" in note and "(4 of 6)" in note for note in plan["notes"])
    assert by_name(plan)["generate mistral/answers"]["conversations"] == 6
    other = planned(path, "--set", "generate.max_new_tokens=12")["notes"]
    assert not any("on disk" in note for note in other)


def test_without_answers_in_the_file_half_of_the_most_is_assumed(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught, generate={"max_new_tokens": 20, "samples": 3, "temperature": 0.5})
    plan = planned(path)
    step = by_name(plan)["generate gemma/answers"]
    assert step["conversations"] == 18
    assert step["response_tokens"] == pytest.approx(18 * (10 + 1), rel=0.1)
    assert any("holds no answers; half of generate.max_new_tokens is assumed" in note for note in plan["notes"])
    more = by_name(planned(path, "--conversations", "600"))
    assert more["generate gemma/answers"]["conversations"] == 1800
    assert more["generate pivot/scores/gemma"]["conversations"] == 1800
    assert more["generate chosen"]["conversations"] == more["fuse answers"]["conversations"] == 600
    kept = by_name(planned(path, "--set", "generate.keep=0.5"))
    assert kept["fuse answers"]["conversations"] == 3
    each = {"targets": "each", "choose": {"source": "gemma"}, "sources": ["gemma"], "max_new_tokens": 16}
    every = by_name(planned(write_recipe(tmp_path, taught, generate=each)))
    for name in ("fuse mistral", "fuse gemma", "prepare pivot/answers"):
        assert every[name]["conversations"] == 6
    assert [label for label in every if "/scores/" in label] == ["generate gemma/scores/gemma"]


def test_servers_judges_and_verifiers_take_what_time_they_take(taught: dict[str, Path], tmp_path: Path) -> None:
    judge = {"choose": {"judge": {"url": "http://localhost:9/v1", "model": "wise"}}, "max_new_tokens": 16}
    path = write_recipe(tmp_path, taught, sources={"gemma": gemma(taught), "big": SERVER}, generate=judge)
    plan = planned(path)
    step = by_name(plan)["generate big/answers"]
    assert (step["details"]["calls"], step["seconds"], step["memory"]) == (6, 0, 0)
    assert step["tokens"] > step["response_tokens"] > 0
    told = "\n".join(plan["notes"])
    assert "generate big/answers: 6 calls of large at http://localhost:9/v1, about " in told
    assert "judge wise at http://localhost:9/v1: 12 calls; about " in told
    assert "generate big/scores" not in by_name(plan)
    table = runs.here("plan", path, "--device", "h100").stdout
    (row,) = [line for line in table.splitlines() if "generate big/answers" in line and "note" not in line]
    assert not re.search(r"\d (bytes|s|min)\b", row)
    write_prompts(tmp_path / "prompts.jsonl", reference=WORDS)
    verified = planned(write_recipe(tmp_path, taught, generate={"choose": {"verifier": "exact"}}))
    assert any("12 answers are verified, which may take 10 s each" in note for note in verified["notes"])


def test_a_reward_model_has_a_head_of_its_own(taught: dict[str, Path], tmp_path: Path) -> None:
    build(tmp_path / "reward")
    path = write_recipe(
        tmp_path, taught, generate={"choose": {"reward": "reward"}, "max_new_tokens": 16, "sources": ["pivot", "gemma"]}
    )
    plan = planned(path)
    step = by_name(plan)["generate rewards/pivot"]
    assert (step["conversations"], step["response_tokens"]) == (6, 0)
    assert step["flops"] < by_name(plan)["generate pivot/scores/pivot"]["flops"]
    three = build(tmp_path / "three", labels=3)
    change = ("--set", f"generate.choose.reward={three}")
    for told in (problems(path, *change), refused(path, *change)):
        assert "gives 3 numbers for a conversation, not one reward" in told


def test_what_is_wrong_is_found_before(taught: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, taught)
    exact = ("--set", "generate.choose={verifier: exact}")
    assert problems(path, *exact).count("holds no answer, which the verifier exact needs") == 3
    assert "6 prompts hold no answer, which" in problems(path, *exact)
    for verifier, why in (("no-such-command", "no such command"), ("no_such:thing", "cannot be imported (")):
        told = refused(path, "--set", f"generate.choose={{verifier: '{verifier}'}}")
        assert f"generate.choose.verifier: {verifier}: {why}" in told
    here = runs.here("plan", path, "--device", "cpu", "--set", "generate.choose={verifier: no-such-command}")
    assert "generate.choose.verifier: no-such-command: no such command" in here.stderr
    assert "samples: 4 at temperature 0 would all be the same" in problems(path, "--set", "generate.samples=4")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"messages": 3}\n')
    found = problems(path)
    assert "prompts.jsonl:2: the prompt is empty" in found
    assert "prompts.jsonl:3: " in found
    write_prompts(tmp_path / "prompts.jsonl")
    without = {"mistral": str(taught["mistral"]), "gemma": str(taught["gemma"])}
    assert "gemma" in problems(write_recipe(tmp_path, taught, sources=without))


def test_prompts_past_a_models_positions(taught: dict[str, Path], tmp_path: Path) -> None:
    short = shutil.copytree(taught["mistral"], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    sources = {"short": str(short), "gemma": gemma(taught)}
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in (question("dog"), "word " * 50))
    )
    path = write_recipe(tmp_path, taught, sources=sources)
    told = "\n".join(planned(path)["notes"])
    assert (
        "short: 50.00% of the prompts have no answer of it: its prompt leaves no room in the model's 40 tokens" in told
    )
    assert by_name(planned(path))["generate short/answers"]["conversations"] == 1
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "word " * 50}) + "\n")
    alone = write_recipe(tmp_path, taught, sources={"short": str(short)})
    assert "generate: no prompt can be answered: its prompt leaves no room in the model's 40 tokens" in problems(alone)


def test_vllm_is_spread_over_devices_and_its_server_takes_no_memory_here(
    taught: dict[str, Path], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, taught)
    inside = planned(path, "--device", "4xh100", "--set", "sources.mistral.capture={backend: vllm, tensor_parallel: 4}")
    assert by_name(inside)["generate mistral/answers"]["devices"] == 4
    served = planned(path, "--set", "sources.mistral.capture={backend: vllm, url: 'http://localhost:9/v1'}")
    steps = by_name(served)
    assert steps["generate mistral/answers"]["memory"] < steps["generate gemma/answers"]["memory"]


def test_the_longest_of_several_draws_by_hand() -> None:
    """Of lengths 1 and 3, two draws have 1, 3, 3, 3 as the greater."""
    assert longest(np.array([3, 1]), 2) == pytest.approx((1 + 3 + 3 + 3) / 4)
    assert longest(np.array([3, 1]), 1) == pytest.approx(2)
    assert longest(np.array([5]), 7) == 5


def test_steps_of_answers_read_weights_and_what_attention_kept(taught: dict[str, Path]) -> None:
    """On a device of the table: bytes over 60% of the bandwidth, if that is more than what starting its kernels takes."""
    shape, sheet = shape_of(taught["llama"]), SHEETS["a100"]
    config = json.loads((taught["llama"] / "config.json").read_text())
    kept = (
        2
        * config["num_key_value_heads"]
        * config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    )
    assert shape.cached == kept
    rows, length = 10**7, 50
    bytes_read = 4 * shape.parameters + rows * length * kept * shape.layers * 4
    operations = shape.forward_flops(rows, rows, 2 * length)
    expected = max(bytes_read / (0.6 * 2039e9), operations / (0.45 * 19.5e12))
    assert Rates(sheet).decoding(shape, 3, Batch(0, 0, length, rows), dtype="float32") == pytest.approx(3 * expected)
    assert Rates(sheet).decoding(shape, 1, Batch(0, 0, 1, 1), dtype="float32") == pytest.approx(1e-4 * shape.layers)
