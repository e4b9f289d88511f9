"""capture/<model>/<data set>/: a store of distributions (`data/distributions.py`), a shard for `shard_conversations`
conversations.

A shard is written as a whole, and depends only on its own conversations. So a killed run resumes with the missing shards and
gets the same bytes, and several processes can share the shards.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fusechat.data.distributions import SHARDS, begun_format, is_sound, shards_of, write_shard, write_store
from fusechat.data.prepared import PreparedSet
from fusechat.data.tables import Table
from fusechat.errors import DataError
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import Recipe
from fusechat.run import ranks
from fusechat.run.files import scratch
from fusechat.run.manifests import which_device
from fusechat.run.progress import log, progress
from fusechat.run.steps import Step

FORMAT = 2  # of the step; older captures, without tails, stay valid, see `data/distributions.py`


def step(recipe: Recipe, workdir: Path, chat_model: ChatModel, prepared: Step, *, at_least: int = 1) -> Step:
    """The step that runs one model over one prepared data set. Keeps `at_least` this many tokens, whatever the recipe says."""
    capture = recipe.capture_for(chat_model.name)
    capture = capture.model_copy(update={"top_k": max(capture.top_k, at_least)})
    where = capture.model_dump(include={"device_map", "url", "tensor_parallel"})  # does not change results
    settings = {"model": chat_model.identity, "device": recipe.device, **capture.model_dump(exclude=set(where))}
    name = prepared.name

    def work(directory: Path) -> dict[str, Any]:
        return _capture(directory, PreparedSet(prepared.directory), chat_model, {**settings, **where})

    def join(counts: list[dict[str, Any]]) -> dict[str, Any]:
        return ranks.from_first(lambda: _join(counts, chat_model))

    return Step(
        "capture",
        name,
        workdir / "capture" / name,
        settings,
        work,
        {"prepare": prepared},
        format=FORMAT,
        counted=_counted,
        whole_files=True,
        join=join,
        bulk="shard-*.arrow",
    )


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the batch size, which memory may reduce."""
    return {**{key: value for key, value in settings.items() if key != "batch_tokens"}, **which_device(settings)}


def _capture(directory: Path, data: PreparedSet, chat_model: ChatModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes this process's shards, every n-th, if missing or damaged. Returns the counts of all of them."""
    size = settings["shard_conversations"]
    every = [range(begin, min(begin + size, len(data))) for begin in range(0, len(data) or 1, size)]
    is_spread = settings["backend"] == "transformers" and settings["device_map"] is not None
    shards = {number: every[number] for number in ranks.share(len(every), one_a_machine=is_spread)}
    if is_spread and ranks.world() > 1 and ranks.is_first():
        log.info("capture %s: capture.device_map is set: one process on each machine runs the model", chat_model.name)
    vocabulary = chat_model.vocabulary_size()
    k = min(settings["top_k"], vocabulary)
    store_format = ranks.from_first(lambda: begun_format(directory))
    stored: dict[str, Any] = {"vocabulary": vocabulary, "store_format": store_format}
    if ranks.is_first():
        write_store(directory, k=k, files=SHARDS, store_format=store_format)
    paths = {number: path for number in shards if (path := _sound_shard(directory, number)) is not None}
    missing = {number: rows for number, rows in shards.items() if number not in paths}
    if missing and not len(data):  # nothing to run the model on
        paths = {number: write_shard(directory, number, [], **stored) for number in missing}
    elif missing:
        with (
            scratch(directory) as room,
            closing(_open(chat_model, settings, k, data, room)) as backend,
            progress(f"capture {chat_model.name}", sum(map(len, shards.values())), "conversations") as advance,
        ):
            advance(sum(len(shards[number]) for number in paths))
            for number, rows in missing.items():
                found = backend.capture([data[row] for row in rows], advance)
                records = [(data.ids[row], each) for row, each in zip(rows, found, strict=True) if each is not None]
                paths[number] = write_shard(directory, number, records, **stored)
    return _counts([Table([path]) for path in paths.values()], data, [row for rows in shards.values() for row in rows])


def _sound_shard(directory: Path, number: int) -> Path | None:
    """The shard of an earlier run, if intact. Removes damaged files, with a warning."""
    sound = None
    for path in shards_of(directory, number):
        if sound is None and is_sound(path):
            sound = path
        else:
            log.warning("%s: is damaged (its checksum differs): capturing it again", path)
            path.unlink()
    return sound


def _open(chat_model: ChatModel, settings: dict[str, Any], k: int, data: PreparedSet, room: Path) -> Any:
    """The backend that runs the model; see `Local`. It may write to `room`. vLLM is imported only if needed."""
    if settings["backend"] == "vllm":
        from fusechat.models.vllm import open_vllm

        return open_vllm(
            chat_model,
            dtype=settings["dtype"],
            k=k,
            max_length=int(data.lengths().max()),
            tensor_parallel=settings["tensor_parallel"],
            url=settings["url"],
        )
    from fusechat.capture.local import Local
    from fusechat.models.load import choose_device

    model = chat_model.model(
        dtype=settings["dtype"],
        device=choose_device(settings["device"]),
        device_map=settings["device_map"],
        offload=room,
    )
    return Local(model, k=k, batch_tokens=settings["batch_tokens"], name=f"{chat_model.name} ({chat_model.reference})")


def _counts(shards: list[Table], data: PreparedSet, rows: list[int]) -> dict[str, Any]:
    """Counts of the shards of these rows of the data; rejected conversations as (row, id)."""
    written = {identity for shard in shards for identity in shard.column("id")}
    return {
        "conversations": len(written),
        "rejected_not_finite": [(row, data.ids[row]) for row in rows if data.ids[row] not in written],
        "positions": sum(int(shard.list_lengths("nll").sum()) for shard in shards),
        "shards": len(shards),
    }


def _join(counts: list[dict[str, Any]], chat_model: ChatModel) -> dict[str, Any]:
    """The sums of all processes' counts, and the ids of rejected conversations in data order."""
    rejected = sorted(pair for each in counts for pair in each["rejected_not_finite"])
    total = {key: sum(each[key] for each in counts) for key in ("conversations", "positions", "shards")}
    if not total["conversations"] and rejected:
        raise DataError(
            f"{chat_model.name} ({chat_model.reference}): every conversation gave values that are not finite"
        )
    return {**total, "rejected_not_finite": [identity for _, identity in rejected]}
