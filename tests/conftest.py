"""Fixtures that all tests share: tiny models and their tokenizers, built once a session."""

import logging
import os
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

import showing
import tiny
from fusechat.run.progress import log

settings.register_profile("few", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("many", settings.get_profile("few"), max_examples=200)
settings.load_profile("many" if os.environ.get("FUSECHAT_TESTS") == "all" else "few")


# Files of tests that take longest, in order: begun last, one process would wait for them at the end.
LONGEST = ("test_quickstart", "test_paper_models", "test_eval_judged", "test_kills", "test_processes", "test_beside")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each kind of `tiny.KINDS`."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.build(kind, root / kind) for kind in tiny.KINDS}


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
