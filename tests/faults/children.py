"""`fusechat run` in forked children, one for each rank, as `torchrun` would start them; they can be killed, or kill themselves.

The parent has imported everything and computed nothing, which makes a run cost a second or two instead of the ten and more that
the imports take.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.commands.cli import main
from fusechat.recipe.schema import STAGES

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link")
LIMIT = 180.0  # seconds after which a run hangs
ERROR = "fusechat: error: "


@dataclass(frozen=True)
class At:
    """The `number`-th file operation of `rank` in `stage`, or the first in a later one: there a process kills itself."""

    stage: str
    number: int
    rank: int = 0


@dataclass
class Run:
    """A run under way. `operations`: of each rank, on files below each stage's directory, so far; `began`: when each stage had
    its first, on any rank."""

    pids: list[int]
    pipes: list[int]
    said: Path
    statuses: dict[int, int] = field(default_factory=dict)
    operations: list[dict[str, int]] = field(default_factory=list)
    began: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    hung: bool = False

    def look(self) -> bool:
        """Hears what the processes do; whether all of them have ended."""
        for rank, pipe in enumerate(self.pipes):
            for number in _read(pipe):
                self.stage = STAGES[number]
                self.operations[rank][self.stage] += 1
                self.began.setdefault(self.stage, time.monotonic())
        for pid in self.pids:
            if pid not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def wait(self, until: Callable[[], bool] = lambda: False, limit: float = LIMIT) -> bool:
        """Until all have ended, or something is so; which of the two: whether they have ended.

        As `torchrun` does, it ends the others where one process failed."""
        deadline = time.monotonic() + limit
        while not self.look():
            if until():
                return False
            if any(self.statuses.values()):
                self._end_others()
            elif time.monotonic() > deadline:
                self.hung = True
                self.kill()
            time.sleep(0.002)
        for pipe in self.pipes:
            os.close(pipe)
        self.pipes = []
        return True

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks, or to all."""
        for rank, pid in enumerate(self.pids):
            if pid not in self.statuses and (not ranks or rank in ranks):
                os.kill(pid, signal.SIGKILL)

    def _end_others(self) -> None:
        time.sleep(0.1)  # how often torchrun looks
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids:
                if not self.look() and pid not in self.statuses:
                    os.kill(pid, number)
            deadline = time.monotonic() + 10
            while not self.look() and time.monotonic() < deadline:
                time.sleep(0.01)

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.statuses.values()

    @property
    def done(self) -> bool:
        return not any(self.statuses.values())

    def errors(self) -> list[str]:
        """The lines that tell the user what is wrong, where that is how it ended: with status 2, and no traceback."""
        text = self.said.read_text(errors="replace")
        if 2 not in self.statuses.values() or "Traceback" in text:
            return []
        return [line.removeprefix(ERROR) for line in text.splitlines() if line.startswith(ERROR)]

    def end(self) -> str:
        """How it ended, in words."""
        text = self.said.read_text(errors="replace").strip()
        how = "hung" if self.hung else f"ended with {sorted(self.statuses.values())}"
        return f"{how}: {' | '.join(text.splitlines()[-4:])}"


def start(
    arguments: list[str | Path],
    workdir: Path,
    said: Path,
    *,
    ranks: int = 1,
    at: At | None = None,
    before: Callable[[], Any] | None = None,
) -> Run:
    """Begins a command; `before` is called in each child first; what they say on stderr goes to the file `said`."""
    said.unlink(missing_ok=True)
    port = _free_port() if ranks > 1 else 0
    run = Run([], [], said, operations=[dict.fromkeys(STAGES, 0) for _ in range(ranks)])
    for rank in range(ranks):
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        pid = os.fork()
        if not pid:
            os.close(ours)
            _child([str(argument) for argument in arguments], workdir, said, theirs, (rank, ranks, port), at, before)
        os.close(theirs)
        run.pids.append(pid)
        run.pipes.append(ours)
    return run


def _child(
    arguments: list[str],
    workdir: Path,
    said: Path,
    pipe: int,
    place: tuple[int, int, int],
    at: At | None,
    before: Callable[[], Any] | None,
) -> None:
    """Becomes the command, and never returns."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 2)
        rank, ranks, port = place
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        if before is not None:
            before()
        _watch(workdir, pipe, at if at is not None and at.rank == rank else None)
        sys.argv = ["fusechat", *arguments]
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _watch(workdir: Path, pipe: int, at: At | None) -> None:
    """Tells the parent the stage of every file operation below the work directory; kills this process at the chosen one."""
    root, seen = f"{workdir}/", dict.fromkeys(STAGES, 0)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS and not (event == "open" and (arguments[2] or 0) & _WRITES):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(root):
            return
        stage = os.fspath(path)[len(root) :].split("/")[0]
        if stage not in seen:
            return
        seen[stage] += 1
        os.write(pipe, bytes([STAGES.index(stage)]))
        if at is None:
            return
        if (stage == at.stage and seen[stage] == at.number) or STAGES.index(stage) > STAGES.index(at.stage):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def later(chance: random.Random, seconds: float) -> Callable[[], bool]:
    """Whether a random time of up to so many seconds has passed, from now on."""
    end = time.monotonic() + chance.uniform(0, seconds)
    return lambda: time.monotonic() >= end
