"""What several processes do together, started by `torchrun` from `test_processes.py`; the first writes what came of it.

    python -m torch.distributed.run --nproc-per-node 2 tests/together.py WORK MODEL OUT

WORK is an aligned work directory of `runs.write_recipe`, MODEL the pivot's directory.
"""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, TrainerCallback

from fusechat.data.prepared import PreparedSet
from fusechat.errors import TrainingError
from fusechat.fuse.dataset import FusionData, collate_fusion
from fusechat.fuse.loss import fusion_loss_parts
from fusechat.fuse.training import train
from fusechat.fuse.validation import Validation
from fusechat.models.forward import Batch, response_logits
from fusechat.run import ranks
from fusechat.run.files import write_json
from fusechat.run.progress import log
from training import SETTINGS, fusion_data, silent, trainer_of, weighted

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


class Gradients(TrainerCallback):
    """Keeps the gradients of every step, as they are before the optimiser uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradients(
    model: Any, data: FusionData, out: Path, **training: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The log, and the gradients by `step/parameter`, of two steps that change nothing."""
    trainer = trainer_of(model, data, out, max_steps=2, max_grad_norm=0.0, learning_rate=0.0, **training)
    kept = Gradients()
    trainer.add_callback(kept)
    entries = train(trainer, silent)
    return entries, {f"{step}/{name}": g for step, found in enumerate(kept.steps) for name, g in found.items()}


def sharded_gradients(model: Any, data: FusionData) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of the first eight conversations under `fully_shard`, a share of them on each rank."""
    share = 8 // ranks.world()
    items = [data[ranks.rank() * share + index] for index in range(share)]
    mesh = init_device_mesh("cpu", (ranks.world(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = collate_fusion(items, pad=0)
    rows = sum(ranks.gather(len(inputs["labels"])))
    logits = response_logits(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"]))
    targets = (inputs["labels"], inputs["target_ids"], inputs["target_logprobs"])
    total = fusion_loss_parts(logits, *targets, num_items=rows, sft_weight=0.5, **SETTINGS).total
    (total * ranks.world()).backward()  # what averages the gradients divides by it
    found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return sum(ranks.gather(total.item())), found


def resumed(fresh: Callable[[], Any], data: FusionData, out: Path, strategy: str) -> list[list[dict[str, float]]]:
    """The logs of two epochs of three steps: without a stop, and from the first step of the second epoch on."""
    how = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    logs = []
    for name in ("whole", "again"):
        trainer = trainer_of(fresh(), data, out / strategy / name, train_sampling_strategy=strategy, **how)
        logs.append(train(trainer, silent))
        if name == "whole" and ranks.is_first():
            shutil.copytree(out / strategy / "whole" / "checkpoint-4", out / strategy / "again" / "checkpoint-4")
        ranks.gather(None)
    return logs


def main() -> None:
    work, directory, out = (Path(argument) for argument in sys.argv[1:4])
    ranks.gather(None)
    torch.set_num_threads(1)
    log.setLevel(logging.WARNING)
    data = fusion_data(work, "mistral")
    held_out = {"data": Validation(PreparedSet(work / "prepare" / "pivot" / "data-held-out"))}
    found: dict[str, Any] = {}

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def told(do: Callable[[], Any]) -> tuple[str, bool]:
        try:
            do()
        except TrainingError as error:
            return str(error), error.reported
        return "", False

    found["log"], by_step = gradients(fresh(), data, out / "ddp", per_device_train_batch_size=4)
    found["weighted log"], _ = gradients(fresh(), weighted(data, 0.5), out / "weighted", per_device_train_batch_size=2)
    few = {"per_device_train_batch_size": 2, "max_steps": 6, "dataloader_drop_last": True}
    measured = {"eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 3}
    found["dropped"] = train(trainer_of(fresh(), data, out / "dropped", held_out=held_out, **few, **measured), silent)
    own = {"average_tokens_across_devices": False, "train_sampling_strategy": "sequential"}
    found["own tokens"], own_gradients = gradients(fresh(), data, out / "own", per_device_train_batch_size=4, **own)
    found["resumed"] = {strategy: resumed(fresh, data, out, strategy) for strategy in STRATEGIES}
    found["sharded loss"], sharded = sharded_gradients(fresh(), data)
    broken = fresh()
    if ranks.rank() == 1:  # the batches of one process only give a loss that is not finite
        with torch.no_grad():
            broken.model.norm.weight.fill_(torch.nan)
    trainer = trainer_of(broken, data, out / "broken", per_device_train_batch_size=2, ddp_broadcast_buffers=False)
    trainer.accelerator.prepare_model = lambda model, **kwargs: model  # DDP would make both the same
    trainer.accelerator.prepare = lambda *parts: parts if len(parts) > 1 else parts[0]
    found["not finite"] = ranks.gather(told(lambda: train(trainer, silent)))
    evaluated = trainer_of(
        fresh(), data, out / "evaluated", held_out=held_out, eval_strategy="steps", eval_steps=2, max_steps=2
    )
    found["evaluated"] = train(evaluated, silent)[-1]
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    trainer_of(fresh(), data, out / "fsdp", fsdp="full_shard")
    found["fsdp"] = records
    if ranks.is_first():
        save_file(by_step, out / "ddp.safetensors")
        save_file(own_gradients, out / "own.safetensors")
        save_file({name: g.contiguous() for name, g in sharded.items()}, out / "sharded.safetensors")
        write_json(out / "found.json", found)
    ranks.shut_down()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
