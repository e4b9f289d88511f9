"""What would end a run later, and what its user should know before: a line each."""

import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fusechat.data.conversations import Message
from fusechat.data.rejected import advice
from fusechat.fuse import stage as fuse
from fusechat.models.chat_model import ChatModel
from fusechat.models.facts import facts
from fusechat.models.load import is_slow, missing_package, read_configuration, without_embedding
from fusechat.models.reference import Reference
from fusechat.models.verify import cannot_start
from fusechat.plan.devices import Device
from fusechat.plan.estimate import Estimate, Model
from fusechat.plan.sampling import Counted, Texts
from fusechat.run.cache import cache_directory
from fusechat.run.extras import is_installed, not_installed
from fusechat.run.units import percent, size

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
    who: str, texts: Texts, counted: Counted, model: Model, settings: Any
) -> tuple[list[str], list[str]]:
    """Problems and notes of a data set as one model sees it; of answers that are expected, notes alone. `settings`: the recipe's
    `data`."""
    if texts.data.chosen and not texts.conversations:  # of a model of which no answer is chosen
        return [], []
    data, max_length = texts.data.name, settings.max_length
    shape, left_out = model.shape, sum(counted.rejected.values())
    if not len(counted.lengths):
        why = next(iter(counted.rejected), "it holds no records")
        return [f"{who}: no conversation of {data} can be used: {why}"], []
    problems: list[str] = []
    notes: list[str] = []
    if left_out:
        share = left_out / (left_out + counted.conversations)
        reasons = "; ".join(list(counted.rejected)[:_SHOWN])
        line, say = (
            f"{who}: {percent(share)} of the conversations of {data} are left out: {reasons}",
            advice(counted.rejected),
        )
        if share > settings.max_rejected:
            more = f"{f'{say}; ' if say else ''}a larger data.max_rejected continues without them"
            too_many = f"{line}: more than data.max_rejected allows ({settings.max_rejected:g}); {more}"
            (notes if texts.data.chosen else problems).append(too_many)
        else:
            notes.append(f"{line}; {say}" if say else line)
    longest = int(counted.lengths.max())
    if shape.positions and longest > shape.positions:
        long = float((counted.lengths > shape.positions).mean())
        notes.append(
            f"{who}: is made for {shape.positions} tokens, and {percent(long)} of the conversations of {data} have more, up to "
            f"{longest}: set data.max_length to {shape.positions}"
        )
    elif shape.positions and max_length > shape.positions:
        notes.append(f"{who}: is made for {shape.positions} tokens, less than data.max_length, {max_length}")
    return problems, notes


def of_vocabulary(who: str, data: str, tokenizer: Any, counted: Counted, rows: int) -> list[str]:
    """Whether every token of a data set has one of the `rows` embeddings. Tokens that do not occur need none."""
    wrong = without_embedding([counted.greatest], rows, tokenizer)
    return [f"{who}: {data} has {wrong}"] if wrong else []


def of_template(who: str, template: Any, rows: int) -> list[str]:
    """Whether what a chat template writes of itself, end of turn and all, has one of the `rows` embeddings."""
    text = template.render([Message("user", "Hello."), Message("assistant", "Hello!")]).text
    tokens = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    wrong = without_embedding(tokens, rows, template.tokenizer)
    return [f"{who}: its chat template writes {wrong}"] if wrong else []


def of_licences(chat_models: Mapping[str, ChatModel]) -> list[str]:
    """What is stated, and which models ask for consent; the hub is asked for its models. A line for each model."""
    names: dict[Reference, list[str]] = {}
    for name, chat_model in chat_models.items():
        names.setdefault(chat_model.reference, []).append(name)
    notes = []
    for reference, who in names.items():
        licence, gated = facts(chat_models[who[0]].directory).licence, False
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


def of_backend(recipe: Any, names: Iterable[str], *, devices: int | None, here: bool) -> list[str]:
    """vLLM asked for where it is not, for more than the `devices` that there are (None: on a CPU any), or for one that it does not
    choose. `here`: on this machine."""
    found = []
    for who in names:
        capture = recipe.capture_for(who)
        if capture.backend != "vllm":
            continue
        if capture.url:
            if here and not is_installed("openai"):
                found.append(not_installed(f"{who}: capture.url: the client of the server", "server"))
            continue
        if devices is not None and capture.tensor_parallel > devices:
            found.append(
                f"{who}: capture.tensor_parallel {capture.tensor_parallel} needs as many devices; there are {devices}"
            )
        if here and not is_installed("vllm"):
            found.append(not_installed(f"{who}: capture.backend: vllm", "vllm"))
        if here and devices is not None and recipe.device not in (None, "cuda", "cuda:0"):
            found.append(
                f"{who}: capture.backend: vllm takes the GPUs from the first on, whatever device: {recipe.device} says; choose "
                "them by CUDA_VISIBLE_DEVICES, without device"
            )
    return found


def of_package(recipe: Any, who: str, directory: Path) -> list[str]:
    """A package that Transformers needs for the weights of a model directory, where it is not installed. vLLM brings its own."""
    measured = recipe.evaluate.bits_per_byte and recipe.validation_sets()
    missing = missing_package(directory) if measured or recipe.capture_for(who).backend == "transformers" else None
    return [f"{who} ({recipe.chat_model(who).reference}): {missing}"] if missing else []


def of_servers(recipe: Any, names: Iterable[str]) -> list[str]:
    """Keys that the environment lacks, of sources that servers answer for and of a judge, and a client that is not installed."""
    servers = {f"sources.{name}.server": recipe.sources[name].server for name in names}
    if recipe.generate is not None and recipe.generate.choose.judge is not None:
        servers["generate.choose.judge"] = recipe.generate.choose.judge
    found = []
    for key, server in servers.items():
        if server.key_env is not None and not os.environ.get(server.key_env):
            found.append(f"{key}.key_env: the environment has no {server.key_env}")
        if not is_installed("openai"):
            found.append(not_installed(f"{key}: the client of the server", "server"))
    return found


def of_verifiers(recipe: Any, stages: Collection[str]) -> list[str]:
    """Verifiers of these stages that cannot be started on this machine."""
    choose = recipe.generate.choose.verifier if recipe.generate else None
    keys = {"evaluate.verifier": recipe.evaluate.verifier, "generate.choose.verifier": choose}
    run = {key: one for key, one in keys.items() if one is not None and key.partition(".")[0] in stages}
    return [line for key, one in run.items() if (line := cannot_start(one, key))]


def of_reward(chat_model: ChatModel) -> list[str]:
    """A reward model that gives no reward."""
    config = read_configuration(chat_model.directory, trust_remote_code=chat_model.reference.trust_remote_code)
    if config.num_labels == 1:
        return []
    return [
        f"generate.choose.reward ({chat_model.reference}): gives {config.num_labels} numbers for a conversation, not one reward"
    ]


def of_processes(recipe: Any, names: Iterable[str], processes: int) -> list[str]:
    """What does not go with a run by so many processes: `names` that vLLM captures, a GPU that all would have."""
    if processes == 1:
        return []
    found = []
    inside = inside_vllm(recipe, names)
    if inside:
        first = "run without torchrun first, as far as --until align (fusechat run RECIPE --until align), and then this again"
        rounds = "rounds run models between their trainings, so take transformers, or run without torchrun"
        instead = rounds if recipe.rounds else f"{first}; or give capture.url"
        found.append(f"{', '.join(inside)}: capture.backend: vllm starts the processes for its GPUs itself: {instead}")
    if recipe.device is not None and torch.device(recipe.device).index is not None:
        found.append(
            f"device: {recipe.device} is one GPU, and there are {processes} processes, each of which has one of its own: leave "
            "device out, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    return found


def of_launch(recipe: Any, device: Device) -> tuple[list[str], list[str]]:
    """Which commands a run on several devices takes; or that one device is too few."""
    sharded = bool(recipe.fuse.training.get("fsdp"))
    if sharded and device.count == 1:
        return [f"{fuse.ONE_PROCESS}; one {device.name} has none to share with: leave it out"], []
    inside = inside_vllm(recipe, ("pivot", *recipe.models))
    if not inside or device.count == 1:
        return [], []
    return [], [
        f"{', '.join(inside)}: vLLM runs without torchrun: two commands do this, fusechat run RECIPE --until align, and "
        f"torchrun --nproc-per-node {device.count} -m fusechat run RECIPE"
    ]


def inside_vllm(recipe: Any, names: Iterable[str]) -> list[str]:
    """Those that vLLM captures in this process."""
    captures = {name: recipe.capture_for(name) for name in names}
    return [name for name, capture in captures.items() if capture.backend == "vllm" and not capture.url]


def of_memory(steps: Iterable[Estimate], device: Device) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    for step in steps:
        room, name = (device.host, "machine") if step.stage in _ON_THE_HOST else (device.memory, device.name)
        if room is None or step.memory <= _NEARLY_ALL * room:
            continue
        takes = f"{step.label}: takes {size(step.memory)} on a {name} of {size(room)}"
        halves = not device.rates.is_cpu and step.details.get("one_at_a_time", room) <= _NEARLY_ALL * room
        if halves:
            notes.append(f"{takes}: fewer prompts are answered at once, which takes longer than is said here")
        elif step.details.get("offloads"):
            notes.append(
                f"{takes}: capture.device_map keeps some of it elsewhere, which takes far longer than is said here"
            )
        else:
            problems.append(f"{takes}: {_ADVICE[step.stage]}")
    return problems, notes


_ON_THE_HOST = ("prepare", "align", "merge", "report")  # stages that use no accelerator
_ADVICE = {
    "generate": "spread it (capture.device_map, or backend: vllm with tensor_parallel), take a quantised copy of the model, or a "
    "smaller capture.shard_conversations, of which prompts are answered together",
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
