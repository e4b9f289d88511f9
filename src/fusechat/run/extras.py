"""Optional packages: an extra of FuseChat installs each, and errors name it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fusechat.errors import RecipeError, first_line


def is_installed(package: str) -> bool:
    """Whether a top-level package can be found, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # already imported without a spec
        return True


def not_installed(what: str, extra: str, instead: str = "") -> str:
    """The message for a missing package. `what`: the key or option, and its need; `extra`: installs it; `instead`: another way."""
    return f"{what} is not installed (pip install 'fusechat[{extra}]')" + (f"; {instead}" if instead else "")


def import_extra(module: str, what: str, extra: str, instead: str = "") -> Any:
    """Imports a module of an optional package; other arguments as for `not_installed`. Raises RecipeError if that fails."""
    try:
        return import_module(module)
    except Exception as error:  # an incompatible package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise RecipeError(not_installed(what, extra, instead)) from None
        raise RecipeError(f"{what} is installed, but cannot be imported: {first_line(error)}") from error
