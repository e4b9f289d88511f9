"""Several processes: what the first says all have, what each says all have in order, and steps that they share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusechat.run import ranks
from fusechat.run.files import read_json
from fusechat.run.steps import MANIFEST

RANKS = 3
ERROR = ("recipe.yaml:3: one thing is wrong", "recipe.yaml:9: and another")

# What every rank does; what it finds goes to a file of its own. `ranks` is imported before PyTorch, as the command line does it.
SCRIPT = """
import json, os, sys
from pathlib import Path
from fusechat.run import ranks
from fusechat.run.steps import Step
from fusechat.errors import DataError, FuseChatError

here, errors, found = Path(sys.argv[1]), sys.argv[2:], {}
rank = found["rank"] = ranks.rank()
found["world"], found["local"], found["first"] = ranks.world(), ranks.local_rank(), ranks.is_first()

found["asked"] = []
def compute():
    found["asked"].append(rank)
    return {"of": rank, "path": Path("a"), "nothing": None}
value = ranks.from_first(compute)
found["value"] = {"of": value["of"], "path": str(value["path"]), "nothing": value["nothing"]}
found["none"] = ranks.from_first(lambda: None)
found["gathered"] = ranks.gather({"rank": rank, "text": "x" * (rank * 1000)})

def refuse():
    raise DataError(*errors)
try:
    ranks.from_first(refuse)
except FuseChatError as error:
    found["error"] = [type(error).__name__, list(error.messages), str(error), error.reported]
found["after"] = ranks.from_first(lambda: "continues")

os.environ["LOCAL_RANK"] = "01"[rank == 1]  # as if the last one were on a machine of its own
found["prepared"] = []
ranks.on_every_machine(lambda: found["prepared"].append(rank))
def lacking():
    if rank == 2:
        refuse()
try:
    ranks.on_every_machine(lacking)
except FuseChatError as error:
    found["machine"] = [type(error).__name__, list(error.messages), error.reported]

def work(name):
    def do(directory):
        (directory / f"{name}-{rank}").write_text(f"by {rank}")
        return {"conversations": rank + 1}
    return do

def joined(counts):
    return {"conversations": sum(one["conversations"] for one in counts), "each": counts}

shared = Step("capture", "shared", here / "shared", {}, work("part"), join=joined)
single = Step("prepare", "single", here / "single", {}, work("whole"))
found["ran"] = [step.run() for step in (shared, single, shared, single)]

ranks.shut_down()
found["left"] = ranks._group.cache_info().currsize == 0
(here / f"rank-{rank}.json").write_text(json.dumps(found))
"""

FAILING = """
import sys
from fusechat.run import ranks

def fail():
    raise RuntimeError("a defect")
ranks.from_first(fail)
print("continued", flush=True)
"""


def launch(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"FUSECHAT_CACHE": str(script.parent / "cache"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which three processes ran `SCRIPT`."""
    directory = tmp_path_factory.mktemp("ranks")
    script = directory / "script.py"
    script.write_text(SCRIPT)
    ended = launch(script, directory, *ERROR)
    assert ended.returncode == 0, ended.stderr
    return directory


@pytest.fixture(scope="module")
def found(here: Path) -> list[dict[str, Any]]:
    return [read_json(here / f"rank-{rank}.json") for rank in range(RANKS)]


def test_each_knows_which_it_is(found: list[dict[str, Any]]) -> None:
    assert [(one["rank"], one["world"], one["local"], one["first"]) for one in found] == [
        (0, 3, 0, True),
        (1, 3, 1, False),
        (2, 3, 2, False),
    ]


def test_what_the_first_finds_all_have_and_the_others_do_not_look(found: list[dict[str, Any]]) -> None:
    assert [one["asked"] for one in found] == [[0], [], []]
    assert [one["value"] for one in found] == [{"of": 0, "path": "a", "nothing": None}] * RANKS
    assert [one["none"] for one in found] == [None] * RANKS


def test_what_each_says_all_have_in_the_order_of_ranks(found: list[dict[str, Any]]) -> None:
    expected = [{"rank": rank, "text": "x" * (rank * 1000)} for rank in range(RANKS)]
    assert [one["gathered"] for one in found] == [expected] * RANKS


def test_an_error_of_the_first_is_raised_by_all_and_told_by_it_alone(found: list[dict[str, Any]]) -> None:
    assert [one["error"][:2] for one in found] == [["DataError", list(ERROR)]] * RANKS
    assert [one["error"][3] for one in found] == [False, True, True]
    assert [one["after"] for one in found] == ["continues"] * RANKS


def test_an_error_reads_the_same_on_every_rank(found: list[dict[str, Any]]) -> None:
    assert [one["error"][2] for one in found] == ["\n".join(ERROR)] * RANKS


def test_the_first_of_each_machine_prepares_it_and_an_error_there_is_told_there(found: list[dict[str, Any]]) -> None:
    assert [one["prepared"] for one in found] == [[0], [], [2]]
    assert [one["machine"] for one in found] == [["DataError", list(ERROR), told] for told in (True, True, False)]


def test_a_step_with_join_is_worked_on_by_all_and_another_by_the_first(here: Path, found: list[dict[str, Any]]) -> None:
    assert [one["ran"] for one in found] == [[True, True, False, False]] * RANKS
    shared, single = (read_json(here / name / MANIFEST) for name in ("shared", "single"))
    each = [{"conversations": number} for number in (1, 2, 3)]
    assert shared["counts"] == {"conversations": 6, "each": each}
    assert set(shared["outputs"]) == {"part-0", "part-1", "part-2"}
    assert single["counts"] == {"conversations": 1}
    assert set(single["outputs"]) == {"whole-0"}


def test_all_take_leave(found: list[dict[str, Any]]) -> None:
    assert [one["left"] for one in found] == [True] * RANKS


def test_a_defect_on_the_first_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    ended = launch(script)
    assert ended.returncode != 0
    assert "RuntimeError: a defect" in ended.stderr
    assert "continued" not in ended.stdout


# -- one process --------------------------------------------------------------------------------------------------------


def test_one_process_asks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.world(), ranks.rank(), ranks.local_rank(), ranks.is_first()) == (1, 0, 0, True)
    value = object()
    assert ranks.from_first(lambda: value) is value, "nothing is pickled"
    assert ranks.gather(value) == [value]
    ranks.shut_down()


def test_one_process_that_a_launcher_started_is_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate gives a rank to one process too."""
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert (ranks.world(), ranks.rank(), ranks.local_rank()) == (1, 0, 0)
    assert ranks.gather(ranks.from_first(lambda: 7)) == [7]


def test_with_one_process_pytorch_is_not_imported(tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from fusechat.run import ranks
from fusechat.run.steps import Step
step = Step("prepare", "x", Path(sys.argv[1]), {}, lambda directory: {}, join=lambda counts: counts[0])
done = [step.run(), ranks.from_first(lambda: 1), ranks.gather(2)]
ranks.shut_down()
print(json.dumps([done, "torch" in sys.modules]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "step")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"FUSECHAT_CACHE": str(tmp_path / "cache")},
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[True, 1, [2]], False]


# -- a rank that is left alone ----------------------------------------------------------------------------------------------


def test_an_error_that_only_says_that_another_rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:27552")
    within = ValueError("a batch could not be made")
    within.__cause__ = lost
    for error in (lost, within):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert not ranks.peer_died(error), "there is no other"
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert ranks.peer_died(error)
    assert not ranks.peer_died(RuntimeError("CUDA error"))
    assert not ranks.peer_died(OSError(104, "Connection reset by peer"))
