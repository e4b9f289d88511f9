"""A plan as tables and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from fusechat.plan.estimate import Estimate
from fusechat.run.units import amount, duration, operations, size

_ALWAYS = ("step", "tokens", "disk", "while at it", "memory", "time")  # what a narrow terminal shows too
_WIDE = 128  # characters that all of them take
COLUMNS = ("step", "conversations", "tokens", "of responses", "disk", "while at it", "memory", "operations", "time")


def totals(steps: list[Estimate]) -> dict[str, float]:
    """Bytes that stay, bytes at the fullest moment, operations and seconds of all steps one after the other."""
    stays, fullest = 0.0, 0.0
    for step in steps:
        stays += step.disk
        fullest = max(fullest, stays + step.room)
    return {
        "disk": stays,
        "fullest": fullest,
        "memory": max(step.memory for step in steps),
        "flops": sum(step.flops for step in steps),
        "seconds": sum(step.seconds for step in steps),
    }


def rows(steps: list[Estimate], *, by_stage: bool = False) -> Iterator[tuple[str, ...]]:
    """Cells for `COLUMNS`, a row for each step or for each stage, and one for all."""
    shown = _joined(steps) if by_stage else steps
    for step in shown:
        yield (
            step.label + (f" (on {step.devices})" if step.devices > 1 else ""),
            *(amount(count) if count else "" for count in (step.conversations, step.tokens, step.response_tokens)),
            size(step.disk),
            f"+ {size(step.room)}" if step.room else "",
            size(step.memory) if step.memory else "",
            operations(step.flops) if step.flops else "",
            duration(step.seconds) if step.memory else "",  # of what a server does neither is known
        )
    every = totals(steps)
    fullest = f"≤ {size(every['fullest'])}" if every["fullest"] > every["disk"] else ""
    last = size(every["memory"]), operations(every["flops"]), duration(every["seconds"])
    yield ("all", "", "", "", size(every["disk"]), fullest, *last)


def _joined(steps: list[Estimate]) -> list[Estimate]:
    """The steps of each stage as one."""
    found: list[Estimate] = []
    for stage in dict.fromkeys(step.stage for step in steps):
        own = [step for step in steps if step.stage == stage]
        added = ("conversations", "tokens", "response_tokens", "disk", "flops", "seconds")
        most = ("room", "memory", "devices")
        sums = {key: sum(getattr(step, key) for step in own) for key in added}
        found.append(Estimate(stage, "", **sums, **{key: max(getattr(step, key) for step in own) for key in most}))
    return found


def as_json(plan: Any) -> dict[str, Any]:
    """The whole plan; bytes, seconds and counts as whole numbers."""
    device = plan.device
    steps = [_whole(dataclasses.asdict(step)) for step in plan.steps]
    return {
        "recipe": plan.name,
        "device": {"name": device.name, "count": device.count, "memory": device.memory, "measured": device.measured},
        "steps": steps,
        "totals": _whole(totals(plan.steps)),
        "problems": plan.problems,
        "notes": plan.notes,
    }


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 3) if key == "seconds" else round(value) if isinstance(value, float) else value
        for key, value in found.items()
    }


def show(plan: Any, *, by_stage: bool = False) -> None:
    """The plan on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    device = plan.device
    how = f"measured in {duration(device.rates.spent)}" if device.measured else "by its data sheet, not measured"
    count = f"{device.count} × " if device.count > 1 else ""
    title = f"{plan.name} on {count}{device.name} ({how})"
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    lines = list(rows(plan.steps, by_stage=by_stage))
    shown = [place for place, column in enumerate(COLUMNS) if console.width >= _WIDE or column in _ALWAYS]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    widest = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    left = console.width - sum(widest[place] + 2 for place in shown[1:])  # for the first, which alone is cut off
    for place in shown:
        if place:
            table.add_column(COLUMNS[place], justify="right", min_width=widest[place])
        else:
            table.add_column(COLUMNS[place], no_wrap=True, max_width=max(left - 2, 12))
    for line in lines:
        if line is lines[-1]:
            table.add_section()
        table.add_row(*(line[place] for place in shown))
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
