"""Runs that are killed, again and again, at a file operation or at a random time, until a last one goes through."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from faults.children import At, Run, later
from faults.place import LAUNCHES, LOST, Fault, Place
from fusechat.recipe.schema import STAGES

WEIGHTS = (2, 1, 2, 1, 4, 4, 2, 1, 1)  # of the stages: a killed fine-tuning has most to continue from


def series(place: Place, launch: str, number: int, stages: Sequence[str]) -> None:
    """One work directory, killed once for each of these stages in their order; then a run to the end, and the comparison.

    A kill at a random time may come to a later stage than was meant, or too late."""
    chance = place.chance("kills", launch, number)
    workdir = place.scratch / f"kills-{LAUNCHES[launch]}-{number}"
    faults = []
    for stage in stages:
        at_operation = not number or chance.random() < 0.5  # all of the first series, which are sure to come in time
        run, where = (_at_operation if at_operation else _at_time)(place, workdir, launch, stage, chance)
        if run.killed:
            faults.append(Fault("SIGKILL", launch, run.stage or STAGES[0], f"series {number}, {where}"))
        elif not run.done or run.hung:
            place.note(Fault("SIGKILL", launch, stage, f"series {number}, {where}"), LOST, run.end())
    if not faults:
        return
    last = faults.pop()
    outcome = place.judge(last, workdir, launch)
    for fault in faults:
        place.note(fault, outcome, last.why, last.others)
    if outcome != LOST:
        shutil.rmtree(workdir)


def drawn(chance: random.Random, count: int) -> list[str]:
    """Stages in their order, some more than once."""
    return sorted(chance.choices(STAGES, WEIGHTS, k=count), key=STAGES.index)


def _at_operation(place: Place, workdir: Path, launch: str, stage: str, chance: random.Random) -> tuple[Run, str]:
    """The process kills itself just before a file operation."""
    operations = place.references[launch].operations
    rank = chance.choice([rank for rank, counts in enumerate(operations) if counts[stage]])
    at = At(stage, chance.randint(1, operations[rank][stage]), rank)
    return place.run(workdir, launch, at=at), f"rank {rank} at its file operation {at.number} in {stage}"


def _at_time(place: Place, workdir: Path, launch: str, stage: str, chance: random.Random) -> tuple[Run, str]:
    """The processes are killed, one of them or all, some time after the stage began, wherever they are."""
    run = place.begin(workdir, launch)
    victims = chance.choice([(), *((rank,) for rank in range(LAUNCHES[launch]))])
    if not run.wait(lambda: any(STAGES.index(begun) >= STAGES.index(stage) for begun in run.began)):
        run.wait(later(chance, place.references[launch].seconds[stage]))
    run.kill(*victims)
    run.wait()
    who = f"rank {victims[0]}" if victims and LAUNCHES[launch] > 1 else "all"
    return run, f"{who} at a random time in {stage}"


def torchrun(place: Place, kills: int) -> None:
    """The same through the `torchrun` command itself, whose agent ends the other process where one was killed."""
    launch, chance = "two processes", place.chance("torchrun")
    workdir, faults = place.scratch / "torchrun", []
    for stage in sorted(chance.choices(STAGES[1:], k=kills), key=STAGES.index):
        agent = _start(place, workdir)
        while agent.poll() is None and not any(
            (workdir / later_on).is_dir() for later_on in STAGES[STAGES.index(stage) :]
        ):
            time.sleep(0.01)
        wait = later(chance, place.references[launch].seconds[stage])
        while agent.poll() is None and not wait():
            time.sleep(0.002)
        victim = chance.choice(("all", "0", "1"))
        _kill(agent, victim)
        status = agent.wait(timeout=120)
        if status:
            who = victim if victim == "all" else f"process {victim}"
            faults.append(Fault("SIGKILL", "torchrun", stage, f"{who} at a random time in {stage}; torchrun: {status}"))
    last = _start(place, workdir)
    status = last.wait(timeout=300)
    models, others = place.differing(workdir, launch) if not status else ([f"status {status}"], [])
    for fault in faults:
        place.note(fault, LOST if models else "same weights", ", ".join(models), others)


def _start(place: Place, workdir: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusechat"]
    command += ["run", str(place.recipe), "--workdir", str(workdir)]
    return subprocess.Popen(
        [*command, "--set", "fuse.training.gradient_accumulation_steps=1"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill(agent: "subprocess.Popen[bytes]", victim: str) -> None:
    """One of the processes that the agent started, or all of them and the agent."""
    if agent.poll() is not None:
        return
    if victim == "all":
        os.killpg(agent.pid, signal.SIGKILL)
        return
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    if len(workers) > int(victim):
        os.kill(int(workers[int(victim)]), signal.SIGKILL)
