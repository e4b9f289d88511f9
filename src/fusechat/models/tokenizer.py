"""The fast tokenizer of a model directory, as its `tokenizer.json` describes it.

Some classes, named in `tokenizer_config.json` or chosen by Transformers for a model type, build another tokenizer from the
vocabulary, which makes other tokens. The model was trained with the file; a difference is reported where conversations show it.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from fusechat.errors import ModelError
from fusechat.models.companion_files import read_json_of
from fusechat.models.load import model_error, quiet_transformers
from fusechat.run.files import seen
from fusechat.run.progress import log

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `tokenizer.json` if there is one, or of trusted custom code. Raises ModelError without a fast one."""
    return _loaded(directory, trust_remote_code, _state(directory))[0]


def class_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer of Transformers' automatic class, if it differs from `tokenizer.json`; else None."""
    return _loaded(directory, trust_remote_code, _state(directory))[1]


def _state(directory: Path) -> tuple[Any, ...]:
    """Size and times of the files, so that changed files are loaded again."""
    return tuple((file.name, *seen(file).values()) for file in sorted(directory.glob("*")) if file.is_file())


@lru_cache(maxsize=8)
def _loaded(directory: Path, trust_remote_code: bool, state: tuple[Any, ...]) -> tuple[Any, Any | None]:
    quiet_transformers()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    automatic: Any = None
    failure: Exception | None = None
    try:
        automatic = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        failure = error
    by_file = (directory / FILE).is_file() and not (trust_remote_code and _has_code(directory))
    if not by_file or isinstance(failure, MemoryError):
        if failure is not None:
            raise model_error(directory, "its tokenizer", failure) from failure
        if not automatic.is_fast:
            raise ModelError(f"{directory}: has only a slow tokenizer; a tokenizer.json is needed")
        return automatic, None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:
        raise model_error(directory, "its tokenizer", error) from error
    if automatic is None:
        log.warning("%s: its tokenizer's class cannot be loaded (%s); tokenizer.json is used", directory, failure)
        return tokenizer, None
    if automatic.is_fast and automatic.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str():
        return automatic, None
    _take_special_tokens(tokenizer, automatic)
    return tokenizer, automatic


def _has_code(directory: Path) -> bool:
    """Whether the tokenizer's class is code next to the model."""
    return "AutoTokenizer" in (read_json_of(directory / CONFIG).get("auto_map") or {})


def _take_special_tokens(tokenizer: Any, automatic: Any) -> None:
    """Sets special tokens that the class knows and the files do not, if they are in the vocabulary."""
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(automatic, name, None)
        if isinstance(token, str) and getattr(tokenizer, name, None) is None and token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
