"""Converts several GGUF files at once, each in its own process, because most of a conversion is single-threaded parsing.
Downloads run in parallel; as many conversions, which hold a float32 model each, run as memory has room for."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import IO

from fusechat.errors import FuseChatError
from fusechat.models.gguf import converted, find_cached
from fusechat.models.memory import free_bytes
from fusechat.models.reference import Reference
from fusechat.run.progress import Advance, in_bytes, log, progress

_CODE = f"from {__name__} import main; main()"
_REFUSED = 2  # exit status of a process that printed its error in one line
_SHOWN = 2000  # characters shown of other output


@dataclass(eq=False)
class _Conversion:
    """A process that prints how many bytes of memory it needs, and then waits for a line."""

    reference: Reference
    process: "subprocess.Popen[str]"
    said: IO[str]
    needed: int = 0

    def watch(self, news: "News") -> None:
        """Puts an item into `news` when the process has printed its needs, and when it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().isdecimal() and not self.needed:
                self.needed = int(line)
                news.put((self, False))
        self.process.wait()
        news.put((self, True))

    def go(self) -> None:
        """Lets the process convert."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except OSError:  # it has ended, which is reported elsewhere
            pass

    def tell(self) -> None:
        """Logs the output of a failed process. The model is converted again on use, which raises lasting errors."""
        status = self.process.returncode
        self.said.seek(0)
        text = self.said.read().rpartition("\r")[2].strip()
        self.said.close()
        if status not in (0, _REFUSED):
            how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
            log.warning("converting %s %s, and is tried again by itself: %s", self.reference.label, how, text[-_SHOWN:])
        elif status:
            log.warning("converting %s failed: %s", self.reference.label, text[-_SHOWN:])


News = SimpleQueue[tuple[_Conversion, bool]]  # (process, whether it has ended)


def convert_together(references: Sequence[Reference]) -> None:
    """Converts the models that are not converted yet, if there are several. Logs waiting for memory, and failures."""
    waiting = [
        reference for reference in dict.fromkeys(references) if reference.is_file and find_cached(reference) is None
    ]
    if len(waiting) < 2:
        return
    news: News = SimpleQueue()
    every = [_begin(reference) for reference in waiting]
    for one in every:
        Thread(target=one.watch, args=(news,), daemon=True).start()
    with progress(f"fetch and convert {len(waiting)} models", len(waiting), "models") as advance:
        _let_go(every, news, advance)


def _let_go(every: Sequence[_Conversion], news: News, advance: Advance) -> None:
    """Starts each conversion when memory has room for it; one always runs."""
    asking: list[_Conversion] = []
    running: list[_Conversion] = []
    left, room = len(every), free_bytes()
    while left:
        one, ended = news.get()
        if ended:
            left -= 1
            asking, running = ([other for other in some if other is not one] for some in (asking, running))
            one.tell()
            advance()
        else:
            asking.append(one)
        if not running:
            room = free_bytes()
        for other in list(asking):
            taken = sum(each.needed for each in running)
            if not running or taken + other.needed <= room:
                asking.remove(other)
                running.append(other)
                other.go()
            elif other is one:
                line = "%s waits for memory: converting it takes %s, others take %s, and %s were free"
                log.info(line, other.reference.label, in_bytes(other.needed), in_bytes(taken), in_bytes(room))


def _begin(reference: Reference) -> _Conversion:
    said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until it is told
    command = [sys.executable, "-c", _CODE, json.dumps([reference.parts, reference.sha256])]
    pipe = subprocess.PIPE
    return _Conversion(reference, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True), said)


def main() -> None:
    """The child process: fetches the model in `argv`, prints how much memory it needs, waits for a line, converts."""
    parts, sha256 = json.loads(sys.argv[1])
    answer = sys.stdout

    def ask(needed: int) -> None:
        print(needed, file=answer, flush=True)
        if not sys.stdin.readline():  # the parent is gone
            sys.exit(1)

    try:
        with redirect_stdout(sys.stderr):  # output of libraries is not an answer
            converted(Reference(tuple(parts), sha256), before=ask)
    except FuseChatError as error:
        print(error, file=sys.stderr)
        sys.exit(_REFUSED)
