"""capture/<model>/<data set>/: `shard-00000.arrow` and on, a file for every `shard_conversations` prepared conversations.

A shard is written whole or not at all, and depends on its own conversations only, so that a killed run goes on with the
shards that are missing and gets the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.config import Recipe
from fusechat.core.chatters import Chatter
from fusechat.core.distributions import SparseDistribution, open_distributions, write_distributions, write_store
from fusechat.core.progress import Advance, progress
from fusechat.core.steps import Step
from fusechat.errors import DataError


def step(recipe: Recipe, workdir: Path, chatter: Chatter, prepared: Step, *, at_least: int = 1) -> Step:
    """Runs one model over one prepared data set. Keeps `at_least` so many tokens, whatever the recipe says."""
    capture = recipe.capture_for(chatter.name)
    capture = capture.model_copy(update={"top_k": max(capture.top_k, at_least)})
    settings = {"model": chatter.identity, "device": recipe.device, **capture.model_dump()}
    name = prepared.name

    def work(directory: Path) -> dict[str, Any]:
        return _capture(directory, prepared.directory, chatter, settings)

    return Step("capture", name, workdir / "capture" / name, settings, work, {"prepare": prepared})


def _capture(directory: Path, source: Path, chatter: Chatter, settings: dict[str, Any]) -> dict[str, Any]:
    from fusechat.core.models import choose_device
    from fusechat.core.prepared import PreparedSet

    data = PreparedSet(source)
    size = settings["shard_conversations"]
    shards = {
        directory / f"shard-{number:05d}.arrow": range(begin, min(begin + size, len(data)))
        for number, begin in enumerate(range(0, len(data), size))
    }
    missing = {path: rows for path, rows in shards.items() if not path.exists()}
    if missing:
        model = chatter.model(dtype=settings["dtype"], device=choose_device(settings["device"]))
        k = min(settings["top_k"], model.get_output_embeddings().weight.shape[0])
        write_store(directory, k=k, files="shard-*.arrow")
        with progress(f"capture {chatter.name}", len(data), "conversations") as advance:
            advance(len(data) - sum(len(rows) for rows in missing.values()))
            for path, rows in missing.items():
                write_distributions(path, _shard(model, data, rows, k, settings["batch_tokens"], advance))
    written = open_distributions(directory)
    if not written.index:
        raise DataError(f"{chatter.name} ({chatter.reference}): every conversation gave values that are not finite")
    return {
        "conversations": len(written.index),
        "rejected_not_finite": [identity for identity in data.ids if identity not in written],
        "positions": sum(len(data[data.row_of[identity]]) for identity in written.index),
        "shards": len(shards),
    }


def _shard(
    model: Any, data: Any, rows: range, k: int, batch_tokens: int, advance: Advance
) -> Iterator[tuple[str, SparseDistribution]]:
    """The records of one shard, in the order of the data, computed in batches of like length."""
    from fusechat.capture.top_k import capture_batch
    from fusechat.core.forward import length_batches

    found: dict[int, SparseDistribution] = {}
    for batch in length_batches(data.lengths()[rows.start : rows.stop], batch_tokens):
        members = [rows[index] for index in batch]
        for row, result in zip(members, capture_batch(model, [data[row] for row in members], k=k), strict=True):
            if result is not None:
                found[row] = result
        advance(len(batch))
    yield from ((data.ids[row], found[row]) for row in sorted(found))
