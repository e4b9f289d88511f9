"""What fusion costs compared with plain fine-tuning, and dense targets compared with both: `make bench-training`.

A step is forward, loss, backward and optimiser on the same model and batch; fusion is to cost at most a tenth more time and memory.
The loss alone is timed in all its variants at the end. Steps of the ways compared go by turns in one process, a ratio is the median
of the turns' ratios; memory is anonymous memory at the peak of a second step, in a process for each. Takes about five minutes.
"""

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fusechat.fuse.divergences import DIVERGENCES
from fusechat.fuse.loss import fusion_loss_parts
from training.memory import peak
from training.models import make_example
from training.steps import DENSE, FUSION, PLAIN, SFT_WEIGHT, Case, Training

CASES = [
    Case("llama", autocast=True),
    Case("llama", autocast=False),
    Case("gemma", autocast=True),
    Case("gemma", autocast=False),
    Case("gemma", autocast=True, joined=True),
]
AIM = "<= 1.10"
GIGABYTE = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Fusion compared with plain fine-tuning.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each way that count [%(default)s]")
    parser.add_argument("--loss-alone", action="store_true", help="not the steps, only the loss")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; Python {platform.python_version()}; torch {torch.__version__}\n", flush=True)
    if not options.loss_alone:
        print_line("figure", "measured", "compared with", "ratio", "aim")
        for case in CASES:
            times(case, options.rounds)
            memory(case)
        print()
    loss_alone()


def times(case: Case, rounds: int) -> None:
    """Seconds of a step. Dense targets have one turn in two, being there for orientation."""
    training = Training(case)
    seconds: dict[str, list[float]] = {FUSION: [], PLAIN: [], DENSE: []}
    for way in seconds:
        training.step(way)  # Adam's state, and kernels of their own shapes
    for turn in range(rounds):
        ways = [FUSION, PLAIN] if turn % 2 else [PLAIN, FUSION, DENSE]
        for way in ways:
            seconds[way].append(timed(lambda way=way: training.step(way)))  # type: ignore[misc]
    parameters = sum(each.numel() for each in training.model.parameters())
    about = f"{parameters / 1e6:.0f}M, vocabulary {training.model.config.vocab_size:,}"
    rows = len(training.example.labels)
    print(f"{case}: {about}, {training.example.batch.attention_mask.sum()} tokens, {rows} of them response")
    for way, aim in ((FUSION, AIM), (DENSE, "")):
        plain = seconds[PLAIN] if way == FUSION else seconds[PLAIN][::2]
        ratio = statistics.median(one / other for one, other in zip(seconds[way], plain, strict=True))
        ours, beside = statistics.median(seconds[way]), statistics.median(plain)
        print_line(f"  step, {way}", f"{ours:.2f} s", f"plain {beside:.2f} s", f"{ratio:.2f}", aim)


def memory(case: Case) -> None:
    peaks = {way: peak(case, way) / GIGABYTE for way in (FUSION, PLAIN, DENSE)}
    for way, aim in ((FUSION, AIM), (DENSE, "")):
        ratio = peaks[way] / peaks[PLAIN]
        print_line(f"  peak, {way}", f"{peaks[way]:.2f} GB", f"plain {peaks[PLAIN]:.2f} GB", f"{ratio:.2f}", aim)


def loss_alone() -> None:
    """Every variant of the loss, forward and backward, as a share of the time of cross-entropy on the labels in float32."""
    settings = [*itertools.product((torch.bfloat16, torch.float32), (32_000, 262_144))]
    print("Loss and its gradient alone, compared with plain cross-entropy")
    print_line("", *(str(dtype).removeprefix("torch.") for dtype, _ in settings))
    print_line("vocabulary", *(f"{vocabulary:,}" for _, vocabulary in settings))
    shares = [share_of(vocabulary, dtype) for dtype, vocabulary in settings]
    for kind, tail, temperature in itertools.product(DIVERGENCES, ("renormalise", "bucket"), (1.0, 2.0)):
        found = [share(kind=kind, tail=tail, temperature=temperature) for share in shares]
        print_line(f"  {kind}, {tail}, T = {temperature:g}", *(f"{share:.2f}" for share in found))


def share_of(vocabulary: int, dtype: torch.dtype) -> Callable[..., float]:
    example = make_example(vocabulary, joined=True)
    n = len(example.labels) if vocabulary < 100_000 else len(example.labels) // 4
    targets = [tensor[:n] for tensor in example.targets]
    logits = torch.randn(n, vocabulary).to(dtype).requires_grad_()

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), targets[0])

    def share(**how: Any) -> float:
        def fused() -> torch.Tensor:
            return fusion_loss_parts(logits, *targets, sft_weight=SFT_WEIGHT, **how).total

        both = [(gradient_time(fused, logits), gradient_time(plain, logits)) for _ in range(5)][1:]
        ours, beside = (min(column) for column in zip(*both, strict=True))
        return ours / beside

    return share


def gradient_time(loss: Callable[[], torch.Tensor], logits: torch.Tensor) -> float:
    logits.grad = None
    return timed(lambda: loss().backward())


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def print_line(*cells: str) -> None:
    widths = (42, 10, 16, 8, 8)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    main()
