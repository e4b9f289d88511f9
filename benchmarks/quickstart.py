"""AlignmentStats of the quickstart, each compared with what it is compared with, measured in one run: `make bench`.

Runs the quickstart first where it is not done. Times are the least of several tries, except for the capture, which is run once.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fusechat.align.blocks import Blocks, Conversations
from fusechat.align.stage import models
from fusechat.align.stats import AlignmentStats
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.progress import setup_logging
from fusechat.run.steps import Step

ROOT = Path(__file__).parents[1]
RECIPE, WORKDIR = ROOT / "examples" / "quickstart.yaml", ROOT / "runs" / "quickstart"
GOLD, GOLD_WORKDIR = ROOT / "examples" / "gold.yaml", ROOT / "runs" / "gold"  # of the same models, with longer answers


def main() -> None:
    setup_logging()
    recipe = load_recipe(RECIPE)
    run(recipe, WORKDIR)
    steps = build_steps(recipe, WORKDIR)
    print_line("figure", "measured", "compared with", "ratio", "aim")
    help_and_python()
    second_run(steps)
    gold = load_recipe(GOLD)
    run(gold, GOLD_WORKDIR)
    alignment_and_capture(gold, [step for step in build_steps(gold, GOLD_WORKDIR) if step.stage == "capture"])


def help_and_python() -> None:
    shown = least(lambda: command("-m", "fusechat", "--help"), 5)
    bare = least(lambda: command("-c", "pass"), 5)
    print_line("fusechat --help", f"{shown:.2f} s", f"bare Python {bare:.2f} s", f"{shown / bare:.1f}", "< 0.4 s")


def second_run(steps: list[Step]) -> None:
    first = sum((step.manifest() or {})["timings"]["seconds"] for step in steps)
    before = {step.label: step.manifest() for step in steps}
    again = least(lambda: subprocess.run(["make", "-s", "quickstart"], cwd=ROOT, check=True, capture_output=True), 3)
    redone = sum(step.manifest() != before[step.label] for step in steps)
    print_line(
        f"second make quickstart ({redone} steps redone)",
        f"{again:.2f} s",
        f"first {first:.0f} s",
        f"{again / first:.4f}",
        "< 5 s",
    )


def alignment_and_capture(recipe: Recipe, captures: list[Step]) -> None:
    """Counting, map, alignment and transfer of all training conversations, compared with capturing the same, both done here."""
    with tempfile.TemporaryDirectory() as room:
        capturing = 0.0
        for number, step in enumerate(captures):
            directory = Path(room) / str(number)
            directory.mkdir()
            capturing += timed(lambda step=step, directory=directory: step.work(directory))  # type: ignore[misc]
    aligning = sum(least(aligner_for(recipe, source), 3) for source in recipe.sources)
    rows = sum(len(row) for source in recipe.sources for row in training_rows(recipe, source))
    print_line(
        f"align and transfer {rows} positions",
        f"{aligning:.3f} s",
        f"capture {capturing:.1f} s",
        f"{aligning / capturing:.4f}",
        "< 0.02",
    )


def training_rows(recipe: Recipe, source: str) -> PreparedSet:
    return PreparedSet(*(GOLD_WORKDIR / "prepare" / PIVOT / data.name for data in recipe.sets_of(source)))


def aligner_for(recipe: Recipe, source: str) -> Callable[[], None]:
    """All of the alignment but loading the tokenizers, which capture and prepare have loaded before."""
    names = [data.name for data in recipe.sets_of(source)]
    pair, back_off, about = models(recipe, source)
    done = (("prepare", PIVOT), ("prepare", source), ("capture", source))
    places = tuple([GOLD_WORKDIR / stage / model / name for name in names] for stage, model in done)

    def work() -> None:
        with Blocks(pair, Conversations(*places, **about)) as blocks:
            vocabulary_map, is_open = blocks.build_map(back_off, nothing)
            k = recipe.capture_for(source).top_k
            for _ in blocks.align(vocabulary_map, is_open, k=k, advance=nothing, figures=AlignmentStats()):
                pass

    return work


def nothing(amount: int = 1, note: str = "") -> None:
    """A progress bar that nobody sees."""


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def least(work: Callable[[], object], tries: int) -> float:
    return min(timed(work) for _ in range(tries))


def print_line(*cells: str) -> None:
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, (42, 10, 20, 8, 8), strict=True)).rstrip())


if __name__ == "__main__":
    main()
