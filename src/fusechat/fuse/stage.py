"""fuse/<target>/: `model/` (a plain Hugging Face directory, float32), `losses.jsonl` (an entry each logged step)."""

import json
import shutil
from pathlib import Path
from typing import Any

from fusechat.config import PIVOT, Recipe
from fusechat.core.chatters import Chatter
from fusechat.core.distributions import open_distributions
from fusechat.core.files import atomic_directory, write_text
from fusechat.core.progress import log, progress
from fusechat.core.steps import Step

MODEL, LOSSES = "model", "losses.jsonl"


def step(recipe: Recipe, workdir: Path, source: str, upstream: dict[str, Step]) -> Step:
    """Fine-tunes a copy of the pivot against one source. `upstream`: pivot, pivot_capture, source, source_capture, align."""
    pivot = recipe.chatter(PIVOT)
    settings = {
        **recipe.fuse.model_dump(),
        "pivot": pivot.identity,
        "chat_template": pivot.chat_template,
        "seed": recipe.seed,
        "device": recipe.device,
    }

    def work(directory: Path) -> dict[str, Any]:
        return _fuse(directory, source, upstream, recipe, pivot)

    return Step("fuse", source, workdir / "fuse" / source, settings, work, upstream)


def check(recipe: Recipe) -> None:
    """Lets Transformers judge the values in `fuse.training` before any work. Raises RecipeError."""
    from fusechat.core.models import choose_device
    from fusechat.fuse.trainer import training_arguments

    device = str(choose_device(recipe.device))
    training_arguments(recipe.fuse.training, output=Path("unused"), seed=recipe.seed, device=device)


def _fuse(directory: Path, source: str, upstream: dict[str, Step], recipe: Recipe, pivot: Chatter) -> dict[str, Any]:
    from fusechat.core.models import choose_device
    from fusechat.core.prepared import PreparedSet
    from fusechat.fuse.dataset import FusionData
    from fusechat.fuse.trainer import total_steps, train, training_arguments

    data = FusionData(
        PreparedSet(upstream["pivot"].directory),
        PreparedSet(upstream["source"].directory),
        pivot_captured=open_distributions(upstream["pivot_capture"].directory),
        source_captured=open_distributions(upstream["source_capture"].directory),
        aligned=open_distributions(upstream["align"].directory),
    )
    counts = dict(sorted(data.counts.items()))
    log.info(
        "fuse %s: of %d conversations the pivot teaches %d, the source %d (ties: %d)",
        source,
        len(data),
        counts["taught_by_pivot"],
        counts["taught_by_source"],
        counts["ties"],
    )
    checkpoints = directory / "checkpoints"
    if not (directory / MODEL).is_dir():
        device = choose_device(recipe.device)
        arguments = training_arguments(recipe.fuse.training, output=checkpoints, seed=recipe.seed, device=str(device))
        model = pivot.model(dtype="float32", device=device)  # master weights; see METHOD, "Precision"
        tokenizer = pivot.tokenizer()
        settings = recipe.fuse
        with progress(f"fuse {source}", total_steps(arguments, len(data)), "steps") as advance:
            history = train(
                model,
                data,
                arguments,
                loss_settings={
                    "sft_weight": settings.sft_weight,
                    "kind": settings.loss,
                    "tail": settings.tail,
                    "temperature": settings.temperature,
                },
                pad=tokenizer.pad_token_id or 0,
                advance=advance,
            )
        write_text(directory / LOSSES, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history))
        with atomic_directory(directory / MODEL) as target:
            model.save_pretrained(target)
            pivot.save_tokenizer(target)
    shutil.rmtree(checkpoints, ignore_errors=True)
    steps = [json.loads(line) for line in (directory / LOSSES).read_text().splitlines()]
    return {"conversations": len(data), "steps": steps[-1]["step"] if steps else 0, **counts}
