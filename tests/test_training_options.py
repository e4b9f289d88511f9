"""What `fuse.training` and `fuse.lora` switch on, each in a real run of a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import runs
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.errors import RecipeError, TrainingError
from fusechat.evaluate.bits_per_byte import compare, score_responses
from fusechat.fuse.dataset import FusionData
from fusechat.fuse.epochs import steps_per_epoch
from fusechat.fuse.trainer import FusionTrainer
from fusechat.fuse.training import make_trainer, total_steps, training_arguments
from fusechat.fuse.validation import Validation
from fusechat.pipeline import load_recipe
from training import SETTINGS, fine_tune, fusion_data, silent

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def place(copied: Path) -> Path:
    """A directory with a recipe and `work`, which is aligned."""
    runs.cut(copied / "work", "align")
    return copied


@pytest.fixture(scope="module")
def data(finished: Path) -> FusionData:
    return fusion_data(finished / "work", "mistral")


@pytest.fixture
def held_out(finished: Path) -> dict[str, PreparedSet]:
    """The pivot's held-out sets, prepared."""
    place = finished / "work" / "prepare" / "pivot"
    return {name: PreparedSet(place / f"{name}-held-out") for name in ("data", "gemma")}


def finish(place: Path, *changes: str, until: str = "fuse", only: str | None = "mistral") -> Path:
    """The recipe with `changes` runs, from what is aligned on."""
    run(load_recipe(place / "recipe.yaml", list(changes)), place / "work", until=until, only=only)
    return place / "work"


def log_of(work: Path, target: str = "mistral") -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "fuse" / target / "losses.jsonl").read_text().splitlines()]


def weights_of(work: Path, target: str = "mistral") -> dict[str, torch.Tensor]:
    return dict(load_file(work / "fuse" / target / "model" / "model.safetensors"))


def test_checkpointing_of_activations_changes_nothing_but_memory(
    models: dict[str, Path], data: FusionData, tmp_path: Path
) -> None:
    plain, a = fine_tune(models["llama"], data, tmp_path / "a")
    less, b = fine_tune(models["llama"], data, tmp_path / "b", gradient_checkpointing=True)
    assert b.is_gradient_checkpointing
    assert [entry["loss"] for entry in less] == pytest.approx([entry["loss"] for entry in plain], rel=1e-6)
    assert torch.allclose(a.lm_head.weight, b.lm_head.weight, atol=1e-6)


def test_bfloat16_is_of_the_forward_pass_and_the_weights_stay_float32(
    models: dict[str, Path], data: FusionData, tmp_path: Path
) -> None:
    plain, _ = fine_tune(models["llama"], data, tmp_path / "a")
    half, model = fine_tune(models["llama"], data, tmp_path / "b", bf16=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for left, right in zip(plain, half, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=2e-2)
        assert right["loss"] != left["loss"]


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_other_architectures_learn_too(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """As pivots: a padded vocabulary; tied embeddings and a sliding window. Their own distributions teach."""
    source = {"llama": str(models["llama"])}
    recipe = runs.write_recipe(tmp_path, models, pivot=str(models["mistral"]), sources=source)
    if kind == "gemma":
        import tiny

        pivot = {"model": str(models["gemma"]), "chat_template": tiny.TEMPLATE}
        recipe = runs.write_recipe(tmp_path, models, pivot=pivot, sources=source)
    run(load_recipe(recipe), tmp_path / "work")
    log = log_of(tmp_path / "work", "llama")
    assert log[-1]["sft_loss"] < log[0]["sft_loss"] - 0.3


def test_lora_is_merged_back_into_a_plain_model(models: dict[str, Path], place: Path) -> None:
    """Only what the adapters reach is another, by a matrix of their rank; names, shapes and files are the pivot's."""
    work = finish(place, f"fuse.lora={json.dumps(LORA)}")
    pivot, target = load_file(models["llama"] / "model.safetensors"), weights_of(work)
    assert {name: tensor.shape for name, tensor in target.items()} == {n: t.shape for n, t in pivot.items()}
    assert not list((work / "fuse" / "mistral" / "model").glob("adapter*"))
    changed = {name for name, tensor in target.items() if not torch.equal(tensor, pivot[name])}
    assert changed == {name for name in pivot if "q_proj.weight" in name or "v_proj.weight" in name}
    for name in changed:
        singular = torch.linalg.svdvals(target[name].double() - pivot[name].double())
        assert singular[LORA["r"]] < 1e-5 * singular[0], "the update is of the adapters' rank"
    log = log_of(work)
    assert log[-1]["sft_loss"] < log[0]["sft_loss"]


def test_lora_under_activation_checkpointing_learns_the_same(place: Path) -> None:
    settings = (f"fuse.lora={json.dumps(LORA)}", "fuse.training.max_steps=3")
    plain = weights_of(finish(place, *settings))
    shutil.rmtree(place / "work" / "fuse")
    less = weights_of(finish(place, *settings, "fuse.training.gradient_checkpointing=true"))
    for name, tensor in plain.items():
        torch.testing.assert_close(less[name], tensor, atol=1e-6, rtol=1e-5)


def test_lora_that_does_not_fit_is_refused_in_a_line(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"^fuse\.lora: .*nothing_like_it"):
        finish(place, 'fuse.lora={"target_modules": ["nothing_like_it"]}')
    with pytest.raises(RecipeError, match=r"^fuse\.lora: .*`r` should be a positive integer"):
        finish(place, 'fuse.lora={"r": 0}')


def test_validation_loss_is_that_of_the_evaluation(
    models: dict[str, Path], data: FusionData, held_out: dict[str, PreparedSet], tmp_path: Path
) -> None:
    """Bits per byte during training against the suite that measures finished models; the loss against a naive mean."""
    prepared = held_out["data"]
    log, model = fine_tune(
        models["llama"],
        data,
        tmp_path,
        held_out={"data": Validation(prepared)},
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=3,
    )
    (found,) = [entry for entry in log if "eval_loss" in entry]
    assert found["step"] == 3
    scores = score_responses(model.eval(), prepared, batch_tokens=100, advance=lambda count: None)
    assert found["eval_bits_per_byte"] == pytest.approx(compare({"one": scores})["one"].value, rel=1e-5)
    losses = []
    for conversation in prepared:
        with torch.inference_mode():
            logits = model(torch.tensor(conversation.input_ids[None].astype("int64"))).logits[0].double()
        logprobs = logits.log_softmax(-1)
        losses += [-float(logprobs[at - 1, conversation.input_ids[at]]) for at in conversation.position.tolist()]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_validation_is_of_every_set_and_all_of_it(
    models: dict[str, Path], data: FusionData, held_out: dict[str, PreparedSet], tmp_path: Path
) -> None:
    """Whatever training does with its last batch, and with workers that are kept."""
    found = []
    for number, changes in enumerate(
        (
            {},
            {"dataloader_drop_last": True},
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
            {"dataloader_drop_last": True, "train_sampling_strategy": "group_by_length"},
        )
    ):
        log, _ = fine_tune(
            models["llama"],
            data,
            tmp_path / str(number),
            held_out={name: Validation(prepared) for name, prepared in held_out.items()},
            per_device_eval_batch_size=3,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
            learning_rate=0.0,
            **changes,
        )
        found.append({key: value for key, value in log[-1].items() if key.startswith("eval_")})
    assert len(found[0]) == 6
    assert all(other == pytest.approx(found[0], rel=1e-6) for other in found[1:])


def test_an_epoch_without_a_whole_batch_teaches_nothing_and_is_refused(
    models: dict[str, Path], data: FusionData, tmp_path: Path, heard: list[str]
) -> None:
    changes = {"dataloader_drop_last": True, "max_steps": 2}
    with pytest.raises(TrainingError, match=r"^fuse\.training\.dataloader_drop_last: the 10 conversations"):
        fine_tune(models["llama"], data, tmp_path, per_device_train_batch_size=16, **changes)
    fine_tune(models["llama"], data, tmp_path, per_device_train_batch_size=4, **changes)
    assert heard == ["fuse: dataloader_drop_last leaves 2 of 10 conversations out of every epoch"]


@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_an_epoch_are_the_trainers(
    models: dict[str, Path], data: FusionData, tmp_path: Path, strategy: str, drop_last: bool
) -> None:
    """With four batches of two a step, ten conversations are two steps, of which one may be left out wholly or in part."""
    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "max_steps": -1,
    }
    log, _ = fine_tune(
        models["llama"],
        data,
        tmp_path,
        train_sampling_strategy=strategy,
        dataloader_drop_last=drop_last,
        **changes,
    )
    arguments = training_arguments(
        {**changes, "train_sampling_strategy": strategy, "dataloader_drop_last": drop_last},
        output=tmp_path,
        seed=0,
        device="cpu",
    )
    assert len(log) == total_steps(arguments, len(data)) == 3 * steps_per_epoch(arguments, len(data))


@pytest.mark.parametrize(("named", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0)])
def test_a_single_process_trains_on_the_gpu_that_is_named(
    models: dict[str, Path],
    data: FusionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    index: int,
) -> None:
    """As far as can be seen without one: where the model is moved to, where batches go, and PyTorch's present GPU."""
    present: list[Any] = []
    moved: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", present.append)
    monkeypatch.setattr(FusionTrainer, "_move_model_to_device", lambda self, model, device: moved.append(device))
    arguments = training_arguments({}, output=tmp_path, seed=0, device=named)
    trainer = make_trainer(
        AutoModelForCausalLM.from_pretrained(models["llama"]),
        data,
        arguments,
        sft_weight=(1.0, 1.0),
        loss_settings=SETTINGS,
        pad=0,
        advance=silent,
    )
    wanted = torch.device("cuda", index)
    assert (trainer.args.device, trainer.args.n_gpu, trainer.args.train_batch_size) == (wanted, 1, 8)
    assert trainer.accelerator.device == wanted
    assert present[-1] == wanted
    assert moved == [wanted]


def test_the_best_checkpoint_becomes_the_target(place: Path) -> None:
    """A learning rate that ruins the model: without the best checkpoint the end would be worse than the beginning."""
    training = ("learning_rate=0.3", "eval_strategy=steps", "eval_steps=2", "load_best_model_at_end=true")
    settings = tuple(f"fuse.training.{setting}" for setting in training)
    work = finish(place, *settings, until="evaluate", only=None)
    measured = [entry for entry in log_of(work) if "eval_loss" in entry]
    assert len(measured) == 3
    best = min(measured, key=lambda entry: entry["eval_loss"])
    assert best["eval_loss"] < measured[-1]["eval_loss"] or best is measured[-1]
    (score,) = [
        record["value"]
        for record in json.loads((work / "evaluate" / "results.json").read_text())["scores"]
        if (record["role"], record["model"], record["data"]) == ("target", "mistral", "data-held-out")
    ]
    # The suite measures what every model has; here that is all of it.
    assert score == pytest.approx(best["eval_bits_per_byte"], rel=1e-3)


def test_several_held_out_sets_are_measured_apart_and_together(place: Path) -> None:
    settings = ("targets={sft: []}", "fuse.training.eval_strategy=epoch", "fuse.training.num_train_epochs=1")
    work = finish(place, *settings, only="sft")
    (found,) = [entry for entry in log_of(work, "sft") if "eval_loss" in entry]
    parts = [found[f"eval_{name}_bits_per_byte"] for name in ("data-held-out", "gemma-held-out")]
    assert min(parts) < found["eval_bits_per_byte"] < max(parts)
    assert not any("fusion" in key and value for entry in log_of(work, "sft") for key, value in entry.items())


def test_plain_fine_tuning_is_compared_with_nobody_and_says_so(place: Path) -> None:
    work = finish(place, "targets={sft: []}", "fuse.against=student", "fuse.level=response", only="sft")
    assert not any(key.startswith("taught/") for entry in log_of(work, "sft") for key in entry)
    counts = json.loads((work / "fuse" / "sft" / "manifest.json").read_text())["counts"]
    assert {name: chosen["none"] for name, chosen in counts["chosen"].items()} == {"data": 10, "gemma": 8}


def test_validation_without_held_out_conversations_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    data = {"train": "train.jsonl"}
    sources = {"mistral": str(models["mistral"])}
    recipe = runs.write_recipe(tmp_path, models, data=data, sources=sources)
    with pytest.raises(
        RecipeError, match=r"eval_strategy: target mistral has no held-out conversations: set data\.validation"
    ):
        run(load_recipe(recipe, ["fuse.training.eval_strategy=epoch"]), tmp_path / "work")


def test_tensorboard_has_the_two_terms_and_validation(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("fuse.training.report_to=tensorboard", "fuse.training.eval_strategy=epoch")
    work = finish(place, *settings)
    events = EventAccumulator(str(work / "logs" / "mistral"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/sft_loss", "train/fusion_loss", "train/loss", "eval/loss", "eval/bits_per_byte"} <= tags
    logged = [(entry["step"], entry["sft_loss"]) for entry in log_of(work) if "sft_loss" in entry]
    assert {event.step: event.value for event in events.Scalars("train/sft_loss")} == pytest.approx(dict(logged))


def test_weights_and_biases_has_a_run_a_target(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    work = finish(place, "fuse.training.report_to=wandb", only=None)
    for target in runs.SOURCES:
        (written,) = (work / "logs" / target).glob("wandb/offline-run-*/run-*.wandb")
        content = written.read_bytes()
        assert b"fusion_loss" in content
        assert f"tiny-{target}".encode() in content


def test_what_is_not_installed_is_said_before_any_work(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^fuse\.training\.report_to: .*comet"):
        run(load_recipe(finished / "recipe.yaml", ["fuse.training.report_to=comet_ml"]), tmp_path / "work")
    assert not (tmp_path / "work" / "prepare").exists()


@pytest.mark.parametrize(
    "training",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"optim": "adafactor"},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 4},
        {"neftune_noise_alpha": 5.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"logging_steps": 2, "logging_first_step": True},
    ],
    ids=lambda training: next(iter(training)),
)
def test_arguments_of_the_trainer_work(
    models: dict[str, Path], data: FusionData, tmp_path: Path, training: dict[str, Any]
) -> None:
    log, _ = fine_tune(models["llama"], data, tmp_path, **{"max_steps": 4} | training)
    assert log[-1]["step"] == 4
    assert log[-1]["loss"] < log[0]["loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(0.5 * entry["sft_loss"] + 0.5 * entry["fusion_loss"], rel=1e-4)


def test_every_loss_teaches(models: dict[str, Path], finished: Path, tmp_path: Path) -> None:
    """Without gold tokens, and on the same batch, so that the fusion term alone brings itself down."""
    data = fusion_data(finished / "work", "mistral", function="source")
    settings = {"sft_weight": (0.0, 0.0), "max_steps": 5, "per_device_train_batch_size": 10, "learning_rate": 3e-3}
    for number, loss in enumerate(
        (
            {"kind": "kl", "temperature": 2.0},
            {"kind": "reverse_kl", "temperature": 1.0},
            {"kind": "jsd", "temperature": 2.0},
            {"tail": "bucket", "temperature": 1.0},
        )
    ):
        log, _ = fine_tune(models["llama"], data, tmp_path / f"{number}", loss=loss, **settings)
        assert log[-1]["fusion_loss"] < log[0]["fusion_loss"], loss


@pytest.mark.parametrize("level", ["conversation", "response", "position"])
def test_against_the_student_the_source_falls_silent_where_it_is_passed(
    models: dict[str, Path], finished: Path, tmp_path: Path, level: str
) -> None:
    """The tiny source has learnt nothing: the student soon passes it. Who taught is counted at every step."""
    data = fusion_data(finished / "work", "mistral", against="student", level=level)
    log, _ = fine_tune(models["llama"], data, tmp_path, max_steps=12, per_device_train_batch_size=10)
    taught = [(entry["taught/data/mistral"], entry["taught/data/student"]) for entry in log]
    groups = {"conversation": 10, "response": 15}.get(level) or sum(len(data[i]["conversation"]) for i in range(10))
    assert {source + student for source, student in taught} == {groups}
    assert taught[0][0] > 0
    assert taught[-1][0] < taught[0][0]
    if level != "position":
        assert taught[-1] == (0, groups)
        assert log[-1]["fusion_loss"] == 0
