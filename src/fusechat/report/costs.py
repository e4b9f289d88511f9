"""Time, memory and disk of a run, as its steps' manifests record them."""

from collections.abc import Iterable
from dataclasses import dataclass

from fusechat.run.steps import Step


@dataclass(frozen=True)
class Cost:
    """Of one step, or of a stage: times and disk summed, the highest peak. None where nothing is recorded."""

    name: str
    seconds: float
    memory: int | None
    gpu: int | None
    disk: int


@dataclass(frozen=True)
class StageCost:
    total: Cost
    steps: tuple[Cost, ...]


def stage_costs(steps: Iterable[Step]) -> list[StageCost]:
    """A row for each stage, in the order met, with its steps."""
    by_stage: dict[str, list[Cost]] = {}
    for step in steps:
        manifest = step.manifest()
        if manifest is None:
            continue
        timings = manifest["timings"]
        disk = sum(output["bytes"] for output in manifest["outputs"].values())
        peaks = timings.get("peak_memory_bytes"), timings.get("peak_gpu_bytes")
        cost = Cost(step.name or step.stage, timings["seconds"], *peaks, disk)
        by_stage.setdefault(step.stage, []).append(cost)
    return [StageCost(together(stage, costs), tuple(costs)) for stage, costs in by_stage.items()]


def together(name: str, costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(
        name,
        sum(cost.seconds for cost in costs),
        max((cost.memory for cost in costs if cost.memory is not None), default=None),
        max((cost.gpu for cost in costs if cost.gpu is not None), default=None),
        sum(cost.disk for cost in costs),
    )
