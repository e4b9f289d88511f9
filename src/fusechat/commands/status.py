"""`fusechat status`: what is done, running, stale or damaged in a work directory, and why."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusechat.commands.run import check_workdir
from fusechat.data.rejected import LeftOut, left_out
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.pinned import pin, recipe_file


def show_status(workdir: Path, recipe: Path | None, changes: list[str] | None, *, as_json: bool) -> None:
    """Prints the state of each step. `recipe`: a changed recipe before it runs; None for the one that ran."""
    own = recipe_file(workdir)
    loaded = pin(load_recipe(recipe or own, changes), workdir)
    check_workdir(loaded, workdir)
    rows: list[tuple[str, str, str, LeftOut | None]] = []
    for step in build_steps(loaded, workdir):
        state, why = step.state()
        lost = left_out(step) if state in ("done", "freed") else None
        rows.append((step.label, "running", "", None) if step.running else (step.label, state, why, lost))
    if as_json:
        found = [
            {"step": label, "state": now, "why": reason} | ({"left_out": lost.reasons} if lost else {})
            for label, now, reason, lost in rows
        ]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    table = Table("step", "state", "why")
    for label, now, reason, lost in rows:
        table.add_row(label, now, reason or (lost.sentence if lost else ""))
    Console().print(table)
