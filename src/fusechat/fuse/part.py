"""What a training writes, and a part of its steps, done in a step of the run by itself."""

from dataclasses import dataclass
from pathlib import Path

MODEL, LOSSES, CHECKPOINTS = "model", "losses.jsonl", "checkpoints"


@dataclass(frozen=True)
class Part:
    """One of `parts` parts of `steps` each, with one optimizer and one schedule over all: part `number`, from 1 on. `begin`: the
    checkpoint that the part before ended with, None for the first."""

    number: int
    parts: int
    steps: int
    begin: Path | None = None

    @property
    def span(self) -> tuple[int, int]:
        """After which step of the whole training it begins, and with which it ends."""
        return (self.number - 1) * self.steps, self.number * self.steps

    @property
    def checkpoint(self) -> str | None:
        """The name of the checkpoint that it ends with; the last one ends with none."""
        return f"checkpoint-{self.span[1]}" if self.number < self.parts else None
