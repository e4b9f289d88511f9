"""The conversations of a weighted set in an epoch, and the number of steps."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any


def epoch_size(conversations: int, weight: float) -> int:
    """Conversations of a set in an epoch: `weight` times as many as it has, rounded, at least one."""
    return max(1, math.floor(conversations * weight + 0.5)) if conversations else 0


def epoch_members(ids: Sequence[str], weight: float, *, epoch: int, seed: int) -> list[int]:
    """Indices of the conversations of epoch 0, 1, …, with repetitions if `weight` is above 1.

    Epochs go round one shuffled order, each from where the last one stopped, so that no conversation repeats before all others
    had their turn. With n conversations and m in an epoch, each is seen m·E/n times in E epochs and m/n times in one, rounded
    down or up. Each round is in the order of the file.
    """
    size, n = epoch_size(len(ids), weight), len(ids)
    begin, end = epoch * size, (epoch + 1) * size
    rounds = [
        (max(begin - start, 0), min(end - start, n)) for start in range(begin - begin % max(n, 1), end, max(n, 1))
    ]
    if all(part == (0, n) for part in rounds):
        return [index for _ in rounds for index in range(n)]
    order = sorted(range(n), key=lambda index: hashlib.sha256(f"{seed} {ids[index]}".encode()).digest())
    return [index for first, last in rounds for index in sorted(order[first:last])]


def left_out(arguments: Any, conversations: int) -> int:
    """Conversations that an epoch leaves out because they fill no whole batch (`dataloader_drop_last`)."""
    size = arguments.train_batch_size * max(1, arguments.world_size)
    if arguments.train_sampling_strategy == "batch_rebalance":  # by the step
        size *= arguments.gradient_accumulation_steps
    return conversations % size if arguments.dataloader_drop_last else 0


def steps_per_epoch(arguments: Any, conversations: int) -> int:
    """Optimiser steps in an epoch of this many conversations."""
    size = arguments.train_batch_size * max(1, arguments.world_size)
    batches = math.ceil((conversations - left_out(arguments, conversations)) / size)
    return max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
