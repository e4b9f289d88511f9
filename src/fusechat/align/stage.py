"""align/<source>/: `vocabulary_map.arrow` (W as source, pivot, weight), `aligned.arrow` (distributions in the pivot's vocabulary,
a row for every response token of the pivot), `figures.json` (coverage)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.config import PIVOT, Recipe
from fusechat.core.chatters import Chatter
from fusechat.core.distributions import SparseDistribution, open_distributions, write_distributions, write_store
from fusechat.core.files import write_json
from fusechat.core.progress import log, track
from fusechat.core.steps import Step

TARGETS, FIGURES = "aligned.arrow", "figures.json"


def step(
    recipe: Recipe, workdir: Path, source: str, *, pivot_prepared: Step, source_prepared: Step, source_captured: Step
) -> Step:
    """Aligns one source's captured distributions to the pivot's tokens."""
    settings = recipe.align.model_dump()
    upstream = {"pivot": pivot_prepared, "source": source_prepared, "capture": source_captured}

    def work(directory: Path) -> dict[str, Any]:
        return _align(directory, upstream, recipe.chatter(PIVOT), recipe.chatter(source), settings)

    return Step("align", source, workdir / "align" / source, settings, work, upstream)


def _align(
    directory: Path, upstream: dict[str, Step], pivot: Chatter, source: Chatter, settings: dict[str, Any]
) -> dict[str, Any]:
    from fusechat.align.aligner import Aligner, Side
    from fusechat.core.prepared import PreparedSet
    from fusechat.core.spans import token_bytes

    distributions = open_distributions(upstream["capture"].directory)
    pivot_data, source_data = (PreparedSet(upstream[side].directory) for side in ("pivot", "source"))
    pivot_side, source_side = (
        Side(token_bytes(chatter.tokenizer()), chatter.template().end_of_turn) for chatter in (pivot, source)
    )
    aligner = Aligner(pivot_side, source_side, top_1=settings["top_1"], unaligned=settings["unaligned"])
    common = [identity for identity in pivot_data.ids if identity in source_data.row_of and identity in distributions]

    for identity in track(common, f"count {source.name}", unit="conversations"):
        aligner.count(*_pair(identity, pivot_data, source_data), distributions[identity])
    aligner.finish_counting()
    aligner.save_map(directory / "vocabulary_map.arrow")
    k = settings["top_k"] or distributions.k

    def records() -> Iterator[tuple[str, SparseDistribution]]:
        for identity in track(pivot_data.ids, f"transfer {source.name}", unit="conversations"):
            if identity in source_data.row_of and identity in distributions:
                rows = aligner.align(*_pair(identity, pivot_data, source_data), distributions[identity], k=k)
            else:
                rows = aligner.unaligned(pivot_data[pivot_data.row_of[identity]], k=k)
            yield identity, rows

    write_distributions(directory / TARGETS, records())
    write_store(directory, k=k, files=TARGETS)
    figures = aligner.summary()
    write_json(directory / FIGURES, figures)
    if not common:
        log.warning("align %s: no conversation is usable for both the pivot and this source", source.name)
    return figures


def _pair(identity: str, pivot: Any, source: Any) -> tuple[Any, Any]:
    return pivot[pivot.row_of[identity]], source[source.row_of[identity]]
