"""Peak memory of one step of training, in a process of its own: `python memory.py CASE WAY`."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from training.steps import Case, Training

PROCESS = Path("/proc/self")


def peak(case: Case, way: str) -> int:
    """Bytes of anonymous memory at the peak of the second step, when Adam's state is there. In a new process."""
    command = [sys.executable, __file__, json.dumps(asdict(case)), way]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(case: Case, way: str) -> int:
    training = Training(case)
    training.step(way)
    (PROCESS / "clear_refs").write_text("5")  # the peak is counted from here
    training.step(way)
    return resident("VmHWM") - resident("RssFile") - resident("RssShmem")


def resident(figure: str) -> int:
    found = re.search(rf"{figure}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None, figure
    return int(found[1]) << 10


if __name__ == "__main__":
    print(measure(Case(**json.loads(sys.argv[1])), sys.argv[2]))
