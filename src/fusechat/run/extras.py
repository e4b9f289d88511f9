"""Packages that only some features need: an extra of FuseChat brings each, and without it one line says which."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fusechat.errors import RecipeError, first_line


def is_installed(package: str) -> bool:
    """Whether a top-level package can be found; imports nothing."""
    try:
        return find_spec(package) is not None
    except ValueError:  # imported already, in a way that has no spec
        return True


def not_installed(what: str, extra: str, instead: str = "") -> str:
    """What to tell the user. `what`: the key or option, and what it needs; `extra`: brings it; `instead`: another way."""
    return f"{what} is not installed (pip install 'fusechat[{extra}]')" + (f"; {instead}" if instead else "")


def import_extra(module: str, what: str, extra: str, instead: str = "") -> Any:
    """A module of a package that an extra brings; the rest is as for `not_installed`. Raises RecipeError where it is not installed,
    or cannot be imported."""
    try:
        return import_module(module)
    except Exception as error:  # a package that does not fit the others may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise RecipeError(not_installed(what, extra, instead)) from None
        raise RecipeError(f"{what} is installed, but cannot be imported: {first_line(error)}") from error
