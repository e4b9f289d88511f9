"""Runs the pipeline in forked children that kill themselves (SIGKILL) at a chosen file operation, and finishes the work after.

    python tests/killer.py RECIPE REFERENCE SCRATCH POINTS_PER_STAGE

REFERENCE is a work directory that one undisturbed run finishes here. Then, for every stage and for points spread over the
file operations of that stage: a copy of the reference without this and later stages is run, killed, run again, compared.
Last, one work directory is killed after random times until it is done. Prints a JSON report. It forks from a process that has
imported everything but computed nothing, which makes a kill cost a second instead of the ten that the imports take.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.trainer  # noqa: F401  (slow: imported before the forks)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import fusechat.fuse.trainer  # noqa: F401
from fusechat.config import STAGES
from fusechat.pipeline import run
from fusechat.recipe_file import load_recipe
from runs import digests

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


def child(recipe: Path, workdir: Path, *, stage: str | None = None, at: int = 0, until: str | None = None) -> int:
    """Forks a run; it dies at the `at`-th file operation in `stage` (or at the first of a later stage). Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        seen = watch(workdir, stage, at)
        run(load_recipe(recipe), workdir, until=until)
        (workdir.parent / f"{workdir.name}.events.json").write_text(json.dumps(seen))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    os._exit(status)


def watch(workdir: Path, stage: str | None, at: int) -> dict[str, int]:
    """Counts the file operations below each stage's directory; kills this process at the chosen one."""
    counts = dict.fromkeys(STAGES, 0)
    root = str(workdir)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS and not (event == "open" and (arguments[2] or 0) & _WRITES):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(root + "/"):
            return
        here = os.fspath(path)[len(root) + 1 :].split("/")[0]
        if here not in counts:
            return
        counts[here] += 1
        if stage is not None and ((here == stage and counts[here] == at) or STAGES.index(here) > STAGES.index(stage)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counts


def finish(pid: int) -> str:
    """`killed`, or `done`; anything else is a failure of the run."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return "done"
    raise SystemExit(f"a run failed with status {status}")


def kill_in_every_stage(recipe: Path, reference: Path, scratch: Path, points: int) -> dict[str, Any]:
    events = json.loads((reference.parent / f"{reference.name}.events.json").read_text())
    expected = digests(reference)
    report: dict[str, Any] = {}
    for index, stage in enumerate(STAGES):
        kills, differing = 0, []
        for at in sorted({1 + round(step * (events[stage] - 1) / max(1, points - 1)) for step in range(points)}):
            workdir = scratch / f"{stage}-{at}"
            shutil.copytree(reference, workdir)
            for later in STAGES[index:]:
                shutil.rmtree(workdir / later, ignore_errors=True)
            kills += finish(child(recipe, workdir, stage=stage, at=at)) == "killed"
            assert finish(child(recipe, workdir)) == "done"
            found = digests(workdir)
            differing += [
                f"{at}: {name}" for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            ]
            shutil.rmtree(workdir)
        report[stage] = {"operations": events[stage], "kills": kills, "differing": sorted(differing)}
    return report


def kill_at_random_times(recipe: Path, reference: Path, workdir: Path, seed: int) -> dict[str, Any]:
    """One work directory, killed again and again after random times, each time a little later, until a run gets through."""
    chance, kills = random.Random(seed), 0
    while True:
        pid = child(recipe, workdir)
        time.sleep(chance.uniform(0.05, 0.5 + 0.15 * kills))
        os.kill(pid, signal.SIGKILL)
        if finish(pid) == "done":
            break
        kills += 1
        if kills == 25:
            assert finish(child(recipe, workdir)) == "done"
            break
    expected, found = digests(reference), digests(workdir)
    return {
        "kills": kills,
        "differing": sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)),
    }


def main() -> None:
    recipe, reference, scratch = (Path(argument).resolve() for argument in sys.argv[1:4])
    scratch.mkdir(parents=True, exist_ok=True)
    assert torch.get_num_threads() >= 1  # the same in every child
    assert finish(child(recipe, reference)) == "done"
    report = kill_in_every_stage(recipe, reference, scratch, int(sys.argv[4]))
    report["random times"] = kill_at_random_times(recipe, reference, scratch / "random", seed=0)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
