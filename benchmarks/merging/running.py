"""A command's time and memory, and what the same bytes cost to read and write once."""

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BUFFER = 16 << 20
EVERY = 0.02  # seconds between two looks at a process's memory


@dataclass(frozen=True)
class Run:
    """Wall time in seconds and peak of anonymous memory in bytes, files mapped into memory not counted."""

    seconds: float
    memory: int


def run(command: list[str], environment: dict[str, str], printed: Path) -> Run:
    """Runs `command` to its end, its standard output to `printed`. Raises SystemExit with its last messages where it failed."""
    os.sync()  # what an earlier command wrote is not written during this one
    messages = printed.with_suffix(".messages")
    with printed.open("wb") as out, messages.open("wb") as err:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | environment) as process:
            peak, over = [0], threading.Event()

            def look() -> None:
                while not over.wait(EVERY):
                    peak.append(sum(map(anonymous, family(process.pid))))

            watcher = threading.Thread(target=look, daemon=True)
            watcher.start()
            status = process.wait()
            seconds = time.perf_counter() - began
            over.set()
            watcher.join()
    if status:
        tail = "\n".join(messages.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with status {status}:\n{tail}")
    return Run(seconds, max(peak))


def family(process: int) -> list[int]:
    """A process, its children and theirs, as far as they still run."""
    found = [process]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:  # it ended
                continue
    return found


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has resident; of one that ended, none."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def read_once(files: list[Path]) -> float:
    """Seconds to read all bytes of `files` into one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stored:
            while stored.readinto(buffer):
                pass
    return time.perf_counter() - began


def write_once(file: Path, size: int) -> float:
    """Seconds to write `size` bytes to `file` and to have them on the disk."""
    buffer = memoryview(os.urandom(BUFFER))
    os.sync()
    began = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        while size > 0:
            size -= out.write(buffer[: min(size, BUFFER)])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds
