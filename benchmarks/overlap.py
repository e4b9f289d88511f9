"""How long the search for evaluation texts in the training data takes, and how much memory, at the size of the paper's training.

    python benchmarks/overlap.py [--training 95000] [--evaluation 4000]

Made-up conversations of one and two turns, some 400 words each, with words as frequent as in a language (Zipf). Of the evaluation
conversations a hundredth was put into the training data as it is, and another one with every fortieth word changed.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from fusechat.data.conversations import DataSet
from fusechat.prepare.overlap import find_overlap

WORDS = 50_000


def conversation(random: np.random.Generator) -> list[str]:
    """The texts of one or two turns."""
    lengths = random.integers(10, 80, size=2).tolist(), random.integers(50, 500, size=2).tolist()
    turns = int(random.integers(1, 3))
    return [text(random, lengths[role][turn]) for turn in range(turns) for role in (0, 1)]


def text(random: np.random.Generator, length: int) -> str:
    return " ".join(f"w{number % WORDS}" for number in random.zipf(1.2, size=length).tolist())


def changed(texts: list[str]) -> list[str]:
    """With every fortieth word another."""
    return [" ".join(f"{word}x" if at % 40 == 39 else word for at, word in enumerate(one.split(" "))) for one in texts]


def write(path: Path, several: list[list[str]]) -> DataSet:
    with path.open("w") as file:
        for texts in several:
            roles = ("user", "assistant") * len(texts)
            messages = [{"role": role, "content": one} for role, one in zip(roles, texts, strict=False)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return DataSet(path.stem, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=int, default=95_000)
    parser.add_argument("--evaluation", type=int, default=4_000)
    sizes = parser.parse_args()
    random = np.random.default_rng(0)
    evaluation = [conversation(random) for _ in range(sizes.evaluation)]
    some = evaluation[: sizes.evaluation // 100]
    planted = some + [changed(texts) for texts in evaluation[len(some) : 2 * len(some)]]
    training = [*(conversation(random) for _ in range(sizes.training - len(planted))), *planted]
    with tempfile.TemporaryDirectory() as room:
        files = [write(Path(room, "training.jsonl"), training), write(Path(room, "evaluation.jsonl"), evaluation)]
        del training, evaluation, planted
        size = sum(Path(one.path).stat().st_size for one in files)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        found = find_overlap(files[:1], files[1:])
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{sizes.training:,} training and {sizes.evaluation:,} evaluation conversations, {size / 1e6:,.0f} MB of JSONL"
    )
    print(f"{seconds:.1f} s on one core; peak {peak / 1e6:.2f} GB, of which before {before / 1e6:.2f} GB")
    print(*found.sentences(), sep="\n")


if __name__ == "__main__":
    main()
