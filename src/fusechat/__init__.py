"""FuseChat: fuses the knowledge of several chat LLMs into one model of the size of a chosen pivot (arXiv 2408.07990).

docs/python.md describes the public names. All names but the errors are imported at first use, because they import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusechat.errors import (
    DataError,
    FuseChatError,
    ModelError,
    RecipeError,
    StorageError,
    TrainingError,
    WorkdirError,
)

if TYPE_CHECKING:
    from fusechat.align.sequence import align_starts
    from fusechat.commands.python_api import (
        Run,
        TextAlignment,
        align_text,
        load_recipe,
        merge_models,
        plan_recipe,
        run_recipe,
    )
    from fusechat.fuse.loss import fusion_loss
    from fusechat.models.spans import token_spans
    from fusechat.recipe.schema import Recipe

__version__ = "0.1.0"
__all__ = [
    "DataError",
    "FuseChatError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Run",
    "StorageError",
    "TextAlignment",
    "TrainingError",
    "WorkdirError",
    "align_starts",
    "align_text",
    "fusion_loss",
    "load_recipe",
    "merge_models",
    "plan_recipe",
    "run_recipe",
    "token_spans",
]
_ELSEWHERE = {
    "Recipe": "fusechat.recipe.schema",
    "align_starts": "fusechat.align.sequence",
    "fusion_loss": "fusechat.fuse.loss",
    "token_spans": "fusechat.models.spans",
}


if not TYPE_CHECKING:  # a type checker would resolve every name by __getattr__

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_ELSEWHERE.get(name, "fusechat.commands.python_api")), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
