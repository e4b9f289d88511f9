"""The section `evaluate`, and how a recipe names a verifier: `exact`, `final_number`, `contains`, `module:function`, or a command
as text or as words."""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

from fusechat.recipe.sections import Dtype, Section

SECONDS = 10.0  # that a verifier may take for an answer
_Text = Annotated[str, StringConstraints(min_length=1)]


def _has_words(value: Any) -> Any:
    if isinstance(value, str) and not shlex.split(value):  # raises ValueError for half a quotation
        raise ValueError("is empty")
    return value


Verifier = Annotated[_Text | Annotated[list[_Text], Field(min_length=1)], AfterValidator(_has_words)]


class Evaluate(Section):
    bits_per_byte: bool = True
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(default=2048, ge=1)
    answers: int = Field(default=4, ge=0)
    answer_tokens: int = Field(default=128, ge=1)
    verifier: Verifier | None = None
    verifier_seconds: float = Field(default=SECONDS, gt=0)
    verifier_limit: int | None = Field(default=None, ge=1)


def problems(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place and line of what is wrong with the verifier of held-out answers."""
    evaluate = recipe.evaluate
    if evaluate.verifier is None:
        for key, default in (("verifier_seconds", SECONDS), ("verifier_limit", None)):
            if getattr(evaluate, key) != default:
                yield ("evaluate", key), "goes with evaluate.verifier"
    elif not recipe.validation_sets():
        yield ("evaluate", "verifier"), "needs held-out conversations: set data.validation, or that of a source"
