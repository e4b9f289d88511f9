"""What would end a run later, and what its user should know before: a line each."""

import shutil
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fusechat.core.cache import cache_directory
from fusechat.core.chatters import Chatter
from fusechat.core.models import is_slow
from fusechat.core.references import Reference
from fusechat.plan.devices import Device
from fusechat.plan.estimate import Estimate, Model
from fusechat.plan.sampling import Counted, Texts
from fusechat.report.models import facts
from fusechat.report.numbers import percent, size

_SHOWN = 3  # lines of one kind
_MUCH_PADDING = 0.2  # of the tokens in a batch
_NEARLY_ALL = 0.95  # of a device's memory


def of_records(texts: Texts) -> tuple[list[str], list[str]]:
    """Problems and notes of the records of a data set."""
    problems, notes = [], []
    if texts.malformed and texts.data.on_error == "stop":
        problems += [*texts.malformed[:_SHOWN]]
        if len(texts.malformed) > _SHOWN:
            problems.append(
                f"{texts.data.path}: {len(texts.malformed)} records are malformed in all; mend them, or set data.on_error: skip"
            )
    elif texts.malformed:
        notes.append(f"{texts.data.path}: {len(texts.malformed)} malformed records are left out")
    if texts.repeated:
        notes.append(f"{texts.data.path}: {texts.repeated} conversations are there more than once, and are used once")
    return problems, notes


def of_conversations(
    who: str, data: str, counted: Counted, model: Model, max_length: int
) -> tuple[list[str], list[str]]:
    """Problems and notes of a data set as one model sees it."""
    shape, left_out = model.shape, sum(counted.rejected.values())
    if not len(counted.lengths):
        why = next(iter(counted.rejected), "it holds no records")
        return [f"{who}: no conversation of {data} can be used: {why}"], []
    notes = []
    if left_out:
        share = left_out / (left_out + counted.conversations)
        reasons = "; ".join(list(counted.rejected)[:_SHOWN])
        notes.append(f"{who}: {percent(share)} of the conversations of {data} are left out: {reasons}")
    longest = int(counted.lengths.max())
    if shape.positions and longest > shape.positions:
        long = float((counted.lengths > shape.positions).mean())
        notes.append(
            f"{who}: is made for {shape.positions} tokens, and {percent(long)} of the conversations of {data} have more, up to "
            f"{longest}: set data.max_length to {shape.positions}"
        )
    elif shape.positions and max_length > shape.positions:
        notes.append(f"{who}: is made for {shape.positions} tokens, less than data.max_length, {max_length}")
    return [], notes


def of_vocabulary(who: str, tokenizer: Any, model: Model) -> list[str]:
    """Whether every token has an embedding."""
    greatest = max(tokenizer.get_vocab().values(), default=-1)
    if greatest < model.shape.embedding_rows:
        return []
    return [
        f"{who}: its tokenizer has token {greatest}, and its configuration {model.shape.embedding_rows} embeddings; model and "
        "tokenizer do not belong together"
    ]


def of_licences(chatters: Mapping[str, Chatter]) -> list[str]:
    """What is stated, and which models ask for consent; the hub is asked for its models. A line for each model."""
    names: dict[Reference, list[str]] = {}
    for name, chatter in chatters.items():
        names.setdefault(chatter.reference, []).append(name)
    notes = []
    for reference, who in names.items():
        licence, gated = facts(chatters[who[0]].directory).licence, False
        if not reference.is_file and not Path(reference.parts[0]).is_dir():
            stated, gated = _hub(reference)
            licence = licence or stated
        notes.append(f"{', '.join(who)} ({reference.label}): licence {licence or 'not stated'}")
        if gated:
            notes.append(f"{reference.label}: asks for consent on the hub; log in before the run: hf auth login")
    return notes


def _hub(reference: Reference) -> tuple[str | None, bool]:
    from huggingface_hub import model_info

    name, _, revision = reference.parts[0].partition("@")
    try:
        found = model_info(name, revision=revision or None, timeout=10)
    except Exception:  # of many kinds; then nothing is known
        return None, False
    return (getattr(found.card_data, "license", None) if found.card_data else None), bool(found.gated)


def of_backend(recipe: Any, device: Device) -> list[str]:
    """vLLM asked for where it is not, or for more devices than there are."""
    found = []
    for who in ("pivot", *recipe.sources):
        capture = recipe.capture_for(who)
        if capture.backend != "vllm" or capture.url:
            continue
        if capture.tensor_parallel > device.count:
            found.append(
                f"{who}: capture.tensor_parallel {capture.tensor_parallel} needs as many devices; there are {device.count}"
            )
        if device.measured and find_spec("vllm") is None:
            found.append(f"{who}: capture.backend: vllm, which is not installed; run pip install 'fusechat[vllm]'")
    return found


def of_memory(steps: Iterable[Estimate], device: Device) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    for step in steps:
        room, name = (device.host, "machine") if step.stage in _ON_THE_HOST else (device.memory, device.name)
        if room is None or step.memory <= _NEARLY_ALL * room:
            continue
        takes = f"{step.label}: takes {size(step.memory)} on a {name} of {size(room)}"
        if step.details.get("offloads"):
            notes.append(
                f"{takes}: capture.device_map keeps some of it elsewhere, which takes far longer than is said here"
            )
        else:
            problems.append(f"{takes}: {_ADVICE[step.stage]}")
    return problems, notes


_ON_THE_HOST = ("prepare", "align", "merge", "report")  # stages that use no accelerator
_ADVICE = {
    "capture": "spread it (capture.device_map, or backend: vllm with tensor_parallel), take a quantised copy of the model, or a "
    "smaller capture.batch_tokens",
    "fuse": "set fuse.training.activation_checkpointing, fsdp under torchrun with more devices, a smaller "
    "per_device_train_batch_size, or fuse.lora",
    "evaluate": "take a smaller evaluate.batch_tokens, or measure where there is more memory",
    **dict.fromkeys(_ON_THE_HOST, "run it where there is more memory"),
}


def of_padding(steps: Iterable[Estimate], together: int) -> list[str]:
    """A line where much of what is trained on is padding."""
    most = max((step.details.get("padding", 0.0) for step in steps), default=0.0)
    if most < _MUCH_PADDING:
        return []
    return [
        f"fuse: {percent(most)} of the tokens in random batches of {together} conversations are padding; "
        "fuse.training.train_sampling_strategy: group_by_length takes as much less time"
    ]


def of_precision(types: Mapping[str, str], device: Device) -> list[str]:
    """A line where bfloat16 is the slower choice. `types`: keys of the recipe and what they say."""
    slow = [key for key, dtype in types.items() if device.measured and is_slow(dtype, torch.device(device.name))]
    if not slow:
        return []
    return [
        f"{', '.join(slow)}: {device.name} has no arithmetic for bfloat16; `auto` takes float32, several times faster here"
    ]


def of_disk(workdir: Path, needed: float, caches: float, device: Device) -> tuple[list[str], list[str]]:
    """`needed`: bytes at the fullest moment in the work directory; `caches`: of models that are to be fetched."""
    room = next(path for path in (workdir, *workdir.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(room).free
    where = f"{workdir}: takes {size(needed)} at its fullest, and {size(free)} are free there"
    problems: list[str] = []
    notes: list[str] = []
    if needed > free and device.measured:
        problems.append(f"{where}; free some, or choose another --workdir")
    elif needed > free:  # here, and the device is elsewhere
        notes.append(where)
    if caches:
        cache = cache_directory()
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.is_dir())).free
        notes.append(f"models to fetch: {size(caches)} in the cache, where {size(free)} are free")
    return problems, notes
