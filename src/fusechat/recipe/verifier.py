"""How a recipe names a verifier: `exact`, `final_number`, `contains`, `module:function`, or a command as text or as words."""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

SECONDS = 10.0  # that a verifier may take for an answer
_Text = Annotated[str, StringConstraints(min_length=1)]


def _has_words(value: Any) -> Any:
    if isinstance(value, str) and not shlex.split(value):  # raises ValueError for half a quotation
        raise ValueError("is empty")
    return value


Verifier = Annotated[_Text | Annotated[list[_Text], Field(min_length=1)], AfterValidator(_has_words)]


def problems(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place and line of what is wrong with the verifier of held-out answers."""
    evaluate = recipe.evaluate
    if evaluate.verifier is None:
        for key in ("verifier_seconds", "verifier_limit"):
            if getattr(evaluate, key) is not None:
                yield ("evaluate", key), "goes with evaluate.verifier"
    elif not recipe.validation_sets():
        yield ("evaluate", "verifier"), "needs held-out conversations: set data.validation, or that of a source"
