"""The alpaca_eval library, kept from what it does besides: reading `.env`, writing files, logging, changing settings of others."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fusechat.run.extras import import_extra

_STAND_IN = "pkg_resources"  # imported by the library and called for a version only, which we do not ask for
_NEEDS = ("AlpacaEval: its library", "alpaca-eval")  # what is told to be missing, and the extra that brings it


@dataclass(frozen=True)
class Library:
    """The modules of it that are used, and pandas, whose frames they take."""

    pandas: Any
    annotators: Any
    constants: Any
    glm: Any
    utils: Any


@contextmanager
def library() -> Iterator[Library]:
    """The library, for as long as the context lasts: nothing that it logs or warns about is shown, and the root logger and
    scikit-learn's settings are then as they were. Raises RecipeError where it is not installed."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    # Its calls of logging.info() would give a root logger without a handler one that prints, and leave it there.
    root.handlers[:] = [logging.NullHandler()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _import()
            with import_module("sklearn").config_context():
                yield found
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _import() -> Library:
    with _without_environment(), _stand_in():
        package, glm = (import_extra(name, *_NEEDS) for name in ("alpaca_eval", "alpaca_eval.metrics.glm_winrate"))
    return Library(import_module("pandas"), package.annotators, package.constants, glm, package.utils)


@contextmanager
def _without_environment() -> Iterator[None]:
    """While it is imported the library would take `.env` of the current directory into the environment."""
    dotenv = import_extra("dotenv", *_NEEDS)
    original = dotenv.load_dotenv
    dotenv.load_dotenv = lambda *_, **__: False
    try:
        yield
    finally:
        dotenv.load_dotenv = original


@contextmanager
def _stand_in() -> Iterator[None]:
    """An empty module where setuptools no longer has the one that the library imports."""
    missing = _STAND_IN not in sys.modules and find_spec(_STAND_IN) is None
    if missing:
        sys.modules[_STAND_IN] = ModuleType(_STAND_IN)
    try:
        yield
    finally:
        if missing:
            del sys.modules[_STAND_IN]
