"""Size and speed of captures, with the two models of the quickstart: `make bench-training`.

On conversations given as a JSONL file (default: `../shared/data/gsm8k_train.jsonl` where it is at hand, else `gold.yaml`).
Speed is that of all that a capture does with a loaded model, up to the file on the disk, compared with the bare forward pass: the
model called on the same batches with the same `logits_to_keep`, and its logits left alone. Runs take turns, so that what else
the machine does falls on both; the ratio is the median of the turns'.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fusechat.capture.local import Local
from fusechat.data.distributions import write_shard
from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.models.chat_model import ChatModel
from fusechat.models.forward import collate, length_batches
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.recipe.sections import Capture
from fusechat.run.steps import Step

ROOT = Path(__file__).parents[1]
RECIPE, DATA = ROOT / "examples" / "gold.yaml", ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
SIZES = {10: 72, 50: 320}  # k, and how many bytes a position may take
CONVERSATIONS, TIMED, TURNS = 128, 32, 5


def main(files: list[Path]) -> None:
    print_line("figure", "measured", "compared with", "ratio", "aim")
    with tempfile.TemporaryDirectory() as room:
        file = write_recipe(files or [DATA], Path(room))
        for name in (PIVOT, next(iter(load_recipe(file).sources))):
            recipe = load_recipe(file)
            chat_model = recipe.chat_model(name)
            label = f"{name}, {chat_model.vocabulary_size()} tokens"
            step_of(recipe, "prepare", name, Path(room)).run()
            data = list(PreparedSet(step_of(recipe, "prepare", name, Path(room)).directory))
            padding(label, data, recipe.capture.batch_tokens)
            speed(label, chat_model, recipe.capture_for(name), data, Path(room))
            for k in SIZES:
                on_disk(label, load_recipe(file, [f"capture.top_k={k}"]), name, Path(room), k=k)


def write_recipe(files: list[Path], room: Path) -> Path:
    """The recipe with its first source, on the first conversations of the files."""
    there = [file for file in files if file.is_file()] or [ROOT / "examples" / "data" / "arithmetic.train.jsonl"]
    lines = [line for file in there for line in file.read_text(encoding="utf-8").splitlines()]
    (room / "train.jsonl").write_text("\n".join(lines[:CONVERSATIONS]) + "\n", encoding="utf-8")
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    source, spec = next(iter(recipe["sources"].items()))
    del spec["data"]
    changed = {"sources": {source: spec}, "data": {"train": "train.jsonl"}, "evaluate": {"bits_per_byte": False}}
    (room / "recipe.yaml").write_text(yaml.safe_dump(recipe | changed), encoding="utf-8")
    return room / "recipe.yaml"


def step_of(recipe: Recipe, stage: str, name: str, room: Path) -> Step:
    steps = build_steps(recipe, room / "work")
    return next(step for step in steps if step.stage == stage and step.name.split("/")[0] == name)


def padding(label: str, everything: list[Prepared], batch_tokens: int) -> None:
    lengths = np.array([len(one.input_ids) for one in everything])
    batches = list(length_batches(lengths, batch_tokens))
    computed = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    print_line(
        f"{label}: padding in batches of {batch_tokens}",
        f"{1 - lengths.sum() / computed:.1%}",
        f"{len(batches)} batches, {lengths.sum()} tokens",
        "",
        "",
    )


def bare_forward(model: Any, several: list[Prepared], batch_tokens: int) -> Callable[[], object]:
    """The model on the same batches, its logits at the same positions, and nothing else."""
    lengths = np.array([len(one.input_ids) for one in several])
    batches = [collate([several[index] for index in batch]) for batch in length_batches(lengths, batch_tokens)]
    kept = [torch.unique(batch.rows[:, 1] - 1) for batch in batches]

    @torch.inference_mode()
    def forward() -> None:
        for batch, positions in zip(batches, kept, strict=True):
            model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                logits_to_keep=positions,
                use_cache=False,
            )

    return forward


def speed(label: str, chat_model: ChatModel, settings: Capture, data: list[Prepared], room: Path) -> None:
    some = data[:: max(1, len(data) // TIMED)][:TIMED]
    tokens = sum(len(one.input_ids) for one in some)
    model = chat_model.model(dtype=settings.dtype, device=torch.device("cpu"))
    bare = bare_forward(model, some, settings.batch_tokens)

    def capture(k: int) -> None:
        found = Local(model, k=k, batch_tokens=settings.batch_tokens, name=chat_model.name).capture(some, nothing)
        records = [(one.id, rows) for one, rows in zip(some, found, strict=True) if rows is not None]
        write_shard(room, 0, records, vocabulary=chat_model.vocabulary_size()).unlink()

    works: list[Callable[[], object]] = [bare, *(partial(capture, k) for k in SIZES)]
    for work in works:  # compiles, and warms the memory
        work()
    times = np.array([[timed(work) for work in works] for _ in range(TURNS)])
    for column, k in enumerate(SIZES, start=1):
        forward, ours = tokens / np.median(times, axis=0)[[0, column]]
        ratios = times[:, 0] / times[:, column]
        print_line(
            f"{label}: capture, k = {k}",
            f"{ours:,.0f}/s",
            f"bare forward pass {forward:,.0f} tokens/s",
            f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
            "0.9",
        )


def on_disk(label: str, recipe: Recipe, name: str, room: Path, *, k: int) -> None:
    """Bytes of a finished capture for each position: all that lies in its directory."""
    step = step_of(recipe, "capture", name, room)
    step.run()
    counts = (step.manifest() or {})["counts"]
    size = sum(file.stat().st_size for file in step.directory.iterdir())
    print_line(
        f"{label}: bytes a position on the disk, k = {k}",
        f"{size / counts['positions']:.1f}",
        f"{counts['positions']} positions in {counts['conversations']} conversations",
        "",
        f"{SIZES[k]}",
    )


def nothing(amount: int = 1) -> None:
    """A progress bar that nobody sees."""


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def print_line(*cells: str) -> None:
    widths = (58, 12, 42, 22, 4)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    main([Path(file) for file in sys.argv[1:]])
