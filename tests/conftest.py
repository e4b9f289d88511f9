"""Fixtures that all tests share: tiny models, their tokenizers and a finished run, made once for all processes of a session."""

import fcntl
import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
if "PYTEST_XDIST_WORKER" in os.environ:  # of runs in processes of their own: as many as cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

import answering
import runs
import showing
import tiny
from fusechat.plan.calibration import Measured
from fusechat.run.progress import log

settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("all", settings.get_profile("quick"), max_examples=500)
settings.load_profile("all" if os.environ.get("FUSECHAT_TESTS") == "all" else "quick")


# Files of tests that take longest, in order: begun last, one process would wait for them at the end.
LONGEST = ("test_quickstart", "test_paper_models", "test_eval_judged", "test_kills", "test_processes", "test_beside")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """What a test changes of the log, by a command or by `fusechat.run_recipe`, is as before for the next."""
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="session", autouse=True)
def _plans_measure_briefly() -> Iterator[None]:
    """How fast this machine is matters to no test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(Measured.__init__.__kwdefaults__, "seconds", 0.5)
        yield


@pytest.fixture(scope="module", autouse=True)
def _little_to_look_through() -> None:
    """The stages look for garbage after every model, which takes half a second with all that is imported in a session."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """A directory by its name, which the first process that asks for it makes; the others wait for that."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        place, done = root / name, root / f".{name}.done"
        with (root / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
                place.mkdir()
                make(place)
                done.touch()
        return place

    return get


@pytest.fixture(scope="session")
def models(shared: Any) -> dict[str, Path]:
    """A model directory of each kind of `tiny.KINDS`."""
    root = shared("models", lambda root: [tiny.build(kind, root / kind) for kind in tiny.KINDS])
    return {kind: root / kind for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def finished(shared: Any, models: dict[str, Path]) -> Iterator[Path]:
    """A directory with the recipe `recipe.yaml` of `runs.write_recipe`, its data, and `work`, a finished run; not to be changed."""
    yield from unchanged(shared("finished", lambda place: runs.finish(runs.write_recipe(place, models), 32)))


@pytest.fixture(scope="session")
def single(shared: Any, models: dict[str, Path]) -> Iterator[Path]:
    """As `finished`, with one source, mistral."""
    sources = {"mistral": str(models["mistral"])}
    yield from unchanged(
        shared("single", lambda place: runs.finish(runs.write_recipe(place, models, sources=sources), 19))
    )


def unchanged(directory: Path) -> Iterator[Path]:
    before = runs.digests(directory)
    yield directory
    assert runs.digests(directory) == before, "a test changed what all tests share"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` to change, whose data stay there: `recipe.yaml` and `work`, in which nothing is to be done."""
    shutil.copytree(finished / "work", tmp_path / "copied" / "work")
    shutil.copy(finished / "recipe.yaml", tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture(scope="session")
def taught(shared: Any, models: dict[str, Path]) -> dict[str, Path]:
    """The pivot as it is, and two sources that each know four words of six: `answering.KNOWN`."""

    def teach(root: Path) -> None:
        for kind, known in answering.KNOWN.items():
            answering.teach(models[kind], root / kind, kind, known)

    root = shared("taught", teach)
    return {"llama": models["llama"], **{kind: root / kind for kind in answering.KNOWN}}


@pytest.fixture(scope="session")
def tokenizers(models: dict[str, Path]) -> dict[str, Any]:
    """The tokenizer of each model directory, as AutoTokenizer loads it."""
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(directory) for kind, directory in models.items()}


@pytest.fixture(scope="session")
def loaded(models: dict[str, Path]) -> dict[str, Any]:
    """The model of each directory in float32 and evaluation mode, as AutoModelForCausalLM loads it; not to be changed."""
    from transformers import AutoModelForCausalLM

    return {
        kind: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for kind, directory in models.items()
    }


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, Any]) -> Callable[[str], Any]:
    """A tiny tokenizer, or a real vocabulary, by name."""
    loaded = dict(tokenizers)

    def find(name: str) -> Any:
        if name not in loaded:
            loaded[name] = showing.load_once(name)
        return loaded[name]

    return find


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What is logged as a warning."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(level=logging.WARNING)
    log.addHandler(listener)
    yield said
    log.removeHandler(listener)
