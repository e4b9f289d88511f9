"""The date that chat templates see. Some write it into every prompt, which must not depend on when a step runs."""

from datetime import date
from functools import lru_cache
from pathlib import Path

import yaml

_ASKS = "strftime_now"  # a function that Transformers passes to templates
_FILES = ("chat_template.j*", "tokenizer_config.json", "chat_templates/*.jinja", "additional_chat_templates/*.jinja")
_HEAD = 1 << 26  # bytes of a GGUF file that contain its chat template
_LETTERS = "aAbBcdDeFGgHhIjklmMnpPrRsStTuUVwWxXyYzZ"


def is_dated(template: str) -> bool:
    """Whether a template reads the date."""
    return _ASKS in template


@lru_cache(maxsize=32)
def dated(template: str, day: str | None) -> str:
    """The template with `day` (YYYY-MM-DD) instead of today; unchanged if it reads no date, or `day` is None."""
    if day is None or not is_dated(template):
        return template
    known = {
        code: date.fromisoformat(day).strftime(code) for letter in _LETTERS for code in (f"%{letter}", f"%-{letter}")
    }
    table = "{" + ", ".join(f"{code!r}: {text!r}" for code, text in known.items()) + "}"
    # A macro hides the function of that name. It reads codes one by one, as `strftime` does.
    return (
        "{%- macro " + _ASKS + "(format) -%}{%- set codes = " + table + " -%}"
        "{%- set read = namespace(after=false) -%}"
        "{%- for part in format.split('%') -%}"
        "{%- if loop.first -%}{{- part -}}"
        "{%- elif read.after -%}{%- set read.after = false -%}{{- '%' ~ part -}}"
        "{%- elif part == '' -%}{%- set read.after = true -%}"
        "{%- else -%}{%- set size = 2 if part[0] == '-' else 1 -%}"
        "{{- codes.get('%' ~ part[:size], '%' ~ part[:size]) ~ part[size:] -}}{%- endif -%}"
        "{%- endfor -%}{%- endmacro +%}"
    ) + template


def today() -> str:
    """Today's date, YYYY-MM-DD."""
    return date.today().isoformat()


def asks_for_the_day(path: Path) -> bool:
    """Whether a chat template of a model directory or GGUF file reads the date."""
    if path.is_file():
        with path.open("rb") as stream:
            return _ASKS.encode() in stream.read(_HEAD)
    files = (file for pattern in _FILES for file in path.glob(pattern))
    return any(_ASKS.encode() in file.read_bytes() for file in files)


def day_of(path: Path) -> str | None:
    """The day on which the work directory that contains `path` was created; None if there is none."""
    for directory in (path, *path.parents):
        recipe = directory / "recipe.yaml"
        if recipe.is_file() and (directory / ".lock").is_file():
            try:
                found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                return None
            return str(found["date"]) if isinstance(found, dict) and found.get("date") else None
    return None
