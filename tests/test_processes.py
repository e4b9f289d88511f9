"""Two processes train as one: the same loss, the same gradients, the same fused model; kills and errors too."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forks
import runs
import tiny
from fusechat.commands.run import run
from fusechat.errors import TrainingError
from fusechat.fuse.dataset import PAD_INDEX, FusionData, collate_fusion
from fusechat.fuse.sampler import FilledSampler
from fusechat.fuse.trainer import COMPLETE, mark_complete
from fusechat.models.forward import Batch, response_logits
from fusechat.pipeline import load_recipe
from fusechat.run.integrity import read_sealed
from together import STRATEGIES, gradients
from training import fine_tune, fusion_data, silent, trainer_of, weighted

TOGETHER = Path(__file__).with_name("together.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RECIPE = ("--set", "fuse.training.gradient_accumulation_steps=1")  # two processes make up for it


@pytest.fixture(scope="module")
def place(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a recipe, whose pivot is a GGUF file, and `one`, what a single process made of it."""
    directory = tmp_path_factory.mktemp("processes")
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    pivot = tiny.write_gguf(directory / "llama.gguf", model, AutoTokenizer.from_pretrained(models["llama"]))
    recipe = runs.write_recipe(directory, {**models, "llama": pivot})
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("FUSECHAT_CACHE", str(directory / "cache"))
        run(load_recipe(recipe), directory / "one")
        yield directory


def weights(work: Path, model: str) -> dict[str, torch.Tensor]:
    return dict(load_file(work / model / "model" / "model.safetensors"))


def without_epoch(entry: dict[str, float]) -> dict[str, float]:
    """What fills up the last batches counts in the share of the epoch, and in nothing else."""
    return {key: value for key, value in entry.items() if key != "epoch"}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=atol, rtol=1e-4, msg=name)


def machine(number: int, port: int, cache: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """The launcher as it is started on each of two machines."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number), *meet, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "FUSECHAT_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """The whole recipe again, by two processes, as on two machines that share nothing but the work directory and the models."""
    port, command = free_port(), ("-m", "fusechat", "run", place / "recipe.yaml", "--workdir", place / "two", *RECIPE)
    caches = [place / f"cache of machine {number}" for number in (0, 1)]
    started = [machine(number, port, cache, *command) for number, cache in enumerate(caches)]
    told = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert sum(stdout.count("fused model:") for stdout, _ in told) == 1, "the first process alone tells the result"
    for cache in caches:
        (converted,) = (cache / "converted").glob("*-v1")
        assert (converted / "model.safetensors").is_file()
    return place / "two"


@pytest.mark.parametrize("model", ["fuse/mistral", "fuse/gemma", "merge"])
def test_two_processes_give_the_model_of_one(place: Path, two: Path, model: str) -> None:
    assert_close(weights(place / "one", model), weights(two, model), atol=1e-5)


def test_two_processes_capture_the_same_store(place: Path, two: Path) -> None:
    def stores(work: Path) -> dict[str, bytes]:
        return {str(file.relative_to(work)): file.read_bytes() for file in sorted(work.glob("capture/**/shard-*"))}

    assert stores(two) == stores(place / "one")
    assert len(stores(two)) == 3 + 2 + 3 + 2


def test_the_log_is_of_all_processes(place: Path, two: Path) -> None:
    def log(work: Path) -> list[dict[str, float]]:
        entries = [json.loads(line) for line in (work / "fuse/mistral/losses.jsonl").read_text().splitlines()]
        return [without_epoch(entry) for entry in entries]

    one, both = log(place / "one"), log(two)
    assert len(one) == len(both) == 6
    for left, right in zip(one, both, strict=True):
        assert right == pytest.approx(left, rel=1e-4)


@pytest.fixture(scope="module")
def together(place: Path, models: dict[str, Path]) -> Path:
    out = place / "together"
    out.mkdir()
    forks.together(2, place / "one", models["llama"], out, script=TOGETHER)
    return out


@pytest.fixture(scope="module")
def data(place: Path) -> FusionData:
    return fusion_data(place / "one", "mistral")


def fresh(models: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)


def test_one_of_eight_two_of_four_and_four_accumulated_of_two_have_the_same_gradients(
    models: dict[str, Path], data: FusionData, together: Path, tmp_path: Path
) -> None:
    """Ten conversations: the second step has two, of which one of the two processes gets none."""
    log, whole = gradients(fresh(models), data, tmp_path / "a", per_device_train_batch_size=8)
    parts_log, parts = gradients(
        fresh(models), data, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    both_log = json.loads((together / "found.json").read_text())["log"]
    assert {name.split("/")[0] for name in whole} == {"0", "1"}
    assert max(float(tensor.abs().max()) for tensor in whole.values()) > 1e-2
    for other in (parts, load_file(together / "ddp.safetensors")):
        assert_close(whole, other, atol=1e-6)
    for other_log in (parts_log, both_log):
        for left, right in zip(log, other_log, strict=True):
            assert without_epoch(right) == pytest.approx(without_epoch(left), rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_go_on_in_the_order_of_the_epoch_they_are_in(together: Path, strategy: str) -> None:
    whole, again = json.loads((together / "found.json").read_text())["resumed"][strategy]
    assert [entry["step"] for entry in again] == [1, 2, 3, 4, 5, 6]
    assert again == whole


def test_with_weights_too(models: dict[str, Path], data: FusionData, together: Path, tmp_path: Path) -> None:
    """Five of ten conversations an epoch: the second step has one, the other process none."""
    log, _ = gradients(fresh(models), weighted(data, 0.5), tmp_path, per_device_train_batch_size=4)
    both = json.loads((together / "found.json").read_text())["weighted log"]
    assert [entry["epoch"] for entry in both] == [0.5, 1.0]
    for left, right in zip(log, both, strict=True):
        assert right == pytest.approx(left, rel=1e-5)


def test_without_the_last_batch_both_are_in_the_epoch_that_one_process_is_in(
    models: dict[str, Path], together: Path, place: Path, data: FusionData, tmp_path: Path
) -> None:
    """Ten conversations in batches of four: two steps an epoch, and two are left out. All five held-out ones count."""
    from fusechat.data.prepared import PreparedSet
    from fusechat.fuse.validation import Validation

    held_out = {"data": Validation(PreparedSet(place / "one" / "prepare" / "pivot" / "data-held-out"))}
    few = {"per_device_train_batch_size": 4, "max_steps": 6, "dataloader_drop_last": True}
    measured = {"held_out": held_out, "eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 3}
    log, _ = fine_tune(models["llama"], data, tmp_path, **few, **measured)
    both = json.loads((together / "found.json").read_text())["dropped"]
    assert [entry["epoch"] for entry in both] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert "eval_loss" in both[-1]
    for left, right in zip(log, both, strict=True):
        assert right == pytest.approx(left, rel=1e-3)


def test_divided_by_its_own_tokens_the_loss_is_the_mean_over_processes(
    models: dict[str, Path], data: FusionData, together: Path
) -> None:
    """Against each process's own batch. In the second step one of the two has no conversation at all, and does not count."""
    from fusechat.fuse.loss import fusion_loss_parts
    from training import SETTINGS

    log = json.loads((together / "found.json").read_text())["own tokens"]
    gradients = load_file(together / "own.safetensors")
    for step, batches in enumerate(((range(4), range(4, 8)), (range(8, 10),))):
        model = fresh(models)
        terms = []
        for batch in batches:
            inputs = collate_fusion([data[index] for index in batch], pad=0)
            logits = response_logits(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"]))
            targets = (inputs["labels"], inputs["target_ids"], inputs["target_logprobs"])
            parts = fusion_loss_parts(logits, *targets, sft_weight=0.5, **SETTINGS)
            (parts.total / len(batches)).backward()
            terms.append([term.item() for term in (parts.total, parts.sft, parts.fusion)])
        expected = dict(zip(("loss", "sft_loss", "fusion_loss"), torch.tensor(terms).mean(0).tolist(), strict=True))
        assert {key: log[step][key] for key in expected} == pytest.approx(expected, rel=1e-4)
        own = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_close(own, {name: gradients[f"{step}/{name}"] for name in own}, atol=1e-6)


def test_fully_sharded_the_loss_and_the_gradients_are_the_same(
    models: dict[str, Path], data: FusionData, together: Path
) -> None:
    from fusechat.fuse.loss import fusion_loss
    from training import SETTINGS

    model = fresh(models)
    inputs = collate_fusion([data[index] for index in range(8)], pad=0)
    logits = response_logits(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"]))
    loss = fusion_loss(
        logits, inputs["labels"], inputs["target_ids"], inputs["target_logprobs"], sft_weight=0.5, **SETTINGS
    )
    loss.backward()
    found = json.loads((together / "found.json").read_text())
    assert found["sharded loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(expected, load_file(together / "sharded.safetensors"), atol=1e-6)


def test_a_loss_that_is_not_finite_on_one_process_stops_all_and_is_told_once(together: Path, data: FusionData) -> None:
    (first, first_told), (second, second_told) = json.loads((together / "found.json").read_text())["not finite"]
    assert first == second
    assert first.startswith("the loss is not finite at step 1, conversations ")
    assert first.count(", ") == 2, "the two conversations of the process that it happened to"
    assert (first_told, second_told) == (False, True)


def test_held_out_conversations_are_each_counted_once(
    models: dict[str, Path], together: Path, place: Path, data: FusionData, tmp_path: Path
) -> None:
    """Seven conversations over two processes in batches of eight."""
    from fusechat.data.prepared import PreparedSet
    from fusechat.fuse.validation import Validation

    held_out = {"data": Validation(PreparedSet(place / "one" / "prepare" / "pivot" / "data-held-out"))}
    changes = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "per_device_train_batch_size": 16}
    log, _ = fine_tune(models["llama"], data, tmp_path, held_out=held_out, **changes)
    found = json.loads((together / "found.json").read_text())["evaluated"]
    for key in ("eval_loss", "eval_bits_per_byte"):
        assert found[key] == pytest.approx(log[-1][key], rel=1e-4)


def test_fsdp_that_is_not_to_be_had_is_said(together: Path) -> None:
    (said,) = json.loads((together / "found.json").read_text())["fsdp"]
    assert said == "fuse: FSDP is unavailable on this device: every process holds the whole model"


def test_killed_processes_go_on_from_their_checkpoint(place: Path, two: Path) -> None:
    """SIGKILL to all of them once a checkpoint is complete; then both again, on one machine: the weights of two that were not
    killed, on two."""
    work = runs.cut(Path(shutil.copytree(two, place / "killed")), "align")
    command = ("run", place / "recipe.yaml", "--workdir", work, *RECIPE)
    killed = forks.ranks(2, *command)
    checkpoints = work / "fuse" / "mistral" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob(f"*/{COMPLETE}")) and time.monotonic() < deadline:
        assert [one.poll() for one in killed] == [None, None], "they ended by themselves"
        time.sleep(0.005)
    for one in killed:
        one.kill()
    assert [one.wait() for one in killed] == [-signal.SIGKILL] * 2
    assert list(checkpoints.glob(f"*/{COMPLETE}"))
    assert not (work / "fuse" / "mistral" / "manifest.json").exists()
    forks.together(2, *command)
    for model in ("fuse/mistral", "fuse/gemma", "merge"):
        for name, tensor in weights(two, model).items():
            assert torch.equal(weights(work, model)[name], tensor), name
    assert sorted(file.name for file in (work / "fuse/mistral/model").iterdir()) == sorted(
        file.name for file in (place / "one/fuse/mistral/model").iterdir()
    )


def refused(*arguments: str | Path) -> list[str]:
    """What is said by two processes that both end with status 2."""
    ended = [one.ended() for one in forks.ranks(2, "run", *arguments)]
    assert [one.returncode for one in ended] == [2, 2]
    return [line for one in ended for line in one.stderr.splitlines() if "fusechat: error: " in line]


def test_a_mistake_is_told_by_one_process(place: Path) -> None:
    [told] = refused(place / "recipe.yaml", "--workdir", place / "no", "--set", "fuse.loss=mse")
    assert ": fuse.loss: Input should be" in told
    assert told.endswith("not 'mse'")
    assert not (place / "no").exists()


def test_vllm_in_this_process_is_refused_before_any_work_and_told_once(place: Path) -> None:
    inside = ("--set", "sources.mistral.capture={backend: vllm}")
    told = refused(place / "recipe.yaml", "--workdir", place / "inside", *inside)
    [line] = [line for line in told if "starts the processes for its GPUs itself" in line]
    assert "fusechat: error: mistral: capture.backend: vllm" in line
    assert not list((place / "inside").rglob("manifest.json"))


def test_another_number_of_processes_does_not_go_on_where_the_steps_would_mean_something_else(
    models: dict[str, Path], data: FusionData, tmp_path: Path
) -> None:
    from fusechat.fuse.training import train

    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    fine_tune(models["llama"], data, tmp_path, **changes)
    checkpoint = tmp_path / "checkpoint-2"
    complete = read_sealed(checkpoint / COMPLETE)
    assert {key: complete[key] for key in ("processes", "conversations_a_step")} == {
        "processes": 1,
        "conversations_a_step": 2,
    }
    mark_complete(checkpoint, {"processes": 3, "conversations_a_step": 6})
    with pytest.raises(TrainingError, match="was written by 3 processes, 6 conversations a step; 1 would make it 2"):
        train(trainer_of(fresh(models), data, tmp_path, **changes | {"max_steps": 4}), silent)
    mark_complete(checkpoint, {"processes": 2, "conversations_a_step": 2})
    assert len(train(trainer_of(fresh(models), data, tmp_path, **changes | {"max_steps": 4}), silent)) == 4


def test_batches_are_filled_up_in_the_order_of_one_process(data: FusionData) -> None:
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import RandomSampler, SequentialSampler

    epoch = 0
    filled = FilledSampler(RandomSampler(data), 4, seed=7, epoch=lambda: epoch)
    alone = SeedableRandomSampler(data, data_seed=7)
    for epoch in (0, 3):
        alone.set_epoch(epoch)
        assert list(filled) == [*alone, PAD_INDEX, PAD_INDEX]
    assert len(filled) == 12
    alone.set_epoch(epoch)
    cut = FilledSampler(RandomSampler(data), 4, seed=7, epoch=lambda: epoch, drop_last=True)
    assert list(cut) == list(alone)[:8]
    assert len(cut) == 8
    assert list(FilledSampler(SequentialSampler(data), 5, seed=None, epoch=lambda: epoch)) == list(range(10))
