"""Answers in batches of similar length, compared with one at a time and with the order of the file: `make bench-answers`.

The quickstart's pivot answers the questions of a JSONL file of conversations (default: `../shared/data/oasst_threads.jsonl`
where it is at hand, else `examples/gold.yaml`), greedily. Ways take turns, so that what else the machine does falls on all.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fusechat.data.conversations import Conversation, DataSet, read_conversations
from fusechat.models import generator as generate
from fusechat.models.answers import Answer, Prompt
from fusechat.models.generator import Generator
from fusechat.pipeline import load_recipe
from fusechat.recipe.schema import PIVOT

ROOT = Path(__file__).parents[1]
RECIPE, DATA = ROOT / "examples" / "gold.yaml", ROOT.parent / "shared" / "data" / "oasst_threads.jsonl"
QUESTIONS, LONGEST, TURNS, BATCH = 16, 48, 2, 4096
sorted_batches = generate.length_batches


def main(files: list[Path]) -> None:
    recipe = load_recipe(RECIPE)
    path = next(
        (file for file in [*files, DATA] if file.is_file()), ROOT / "examples" / "data" / "knowledge.train.jsonl"
    )
    prompts = list(questions(path))
    print(f"{len(prompts)} questions of {path.name}, at most {LONGEST} tokens each, {torch.get_num_threads()} threads")
    ways = {
        "by length": (BATCH, sorted_batches),
        "in the file's order": (BATCH, in_order),
        "one at a time": (1, in_order),
    }
    for dtype in ("bfloat16", "float32"):
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + TURNS):  # the first warms up
            for name, (size, batches) in ways.items():
                generator = Generator(recipe.chat_model(PIVOT), dtype=dtype, device="cpu", batch_tokens=size, seed=0)
                generate.length_batches = batches
                seconds, tokens = answer(generator, prompts)
                if turn:
                    taken[name].append(tokens / seconds)
        for name, speeds in taken.items():
            ratio = median(fast / slow for fast, slow in zip(speeds, taken["one at a time"], strict=True))
            print(f"| {dtype} | {name} | {median(speeds):.0f} tokens/s | {ratio:.2f} times one at a time |", flush=True)


def questions(path: Path) -> Iterator[Prompt]:
    every = [one for one in read_conversations(DataSet("asked", str(path))) if isinstance(one, Conversation)]
    for one in every[:QUESTIONS]:
        asked = next(message for message in one.messages if message.role == "user")
        yield Prompt(one.id, (("user", asked.content),), 0.0, LONGEST)


def answer(generator: Generator, prompts: list[Prompt]) -> tuple[float, int]:
    tokens = 0

    def done(index: int, found: object) -> None:
        nonlocal tokens
        if isinstance(found, Answer):
            tokens += found.tokens or 0

    began = time.perf_counter()
    generator.answer(prompts, done, [False] * len(prompts))
    return time.perf_counter() - began, tokens


def in_order(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """As `length_batches`, without its sort."""
    batch: list[int] = []
    for index in range(len(lengths)):
        if batch and (len(batch) + 1) * max(int(lengths[one]) for one in [*batch, index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
