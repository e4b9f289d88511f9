"""The day that chat templates are told: some write it into every prompt, which must not depend on when a step happens to run."""

from datetime import date
from functools import lru_cache
from pathlib import Path

import yaml

_ASKS = "strftime_now"  # a function that Transformers gives to templates
_FILES = ("chat_template.j*", "tokenizer_config.json", "chat_templates/*.jinja", "additional_chat_templates/*.jinja")
_HEAD = 1 << 26  # bytes of a GGUF file in which its chat template stands
_LETTERS = "aAbBcdDeFGgHhIjklmMnpPrRsStTuUVwWxXyYzZ"


def is_dated(template: str) -> bool:
    """Whether a template asks for the day."""
    return _ASKS in template


@lru_cache(maxsize=32)
def dated(template: str, day: str | None) -> str:
    """The template with that day (year-month-day) in place of today; as it is where it does not ask, or without a day."""
    if day is None or not is_dated(template):
        return template
    known = {
        code: date.fromisoformat(day).strftime(code) for letter in _LETTERS for code in (f"%{letter}", f"%-{letter}")
    }
    table = "{" + ", ".join(f"{code!r}: {text!r}" for code, text in known.items()) + "}"
    # A macro hides the function of its name. Codes are read one by one, as `strftime` reads them.
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
    return date.today().isoformat()


def asks_for_the_day(path: Path) -> bool:
    """Whether a chat template of a model directory, or of a GGUF file, asks for the day."""
    if path.is_file():
        with path.open("rb") as stream:
            return _ASKS.encode() in stream.read(_HEAD)
    files = (file for pattern in _FILES for file in path.glob(pattern))
    return any(_ASKS.encode() in file.read_bytes() for file in files)


def day_of(path: Path) -> str | None:
    """The day that a work directory was begun on: `path`, or the one that it lies in. None where there is none."""
    for directory in (path, *path.parents):
        recipe = directory / "recipe.yaml"
        if recipe.is_file() and (directory / ".lock").is_file():
            try:
                found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                return None
            return str(found["date"]) if isinstance(found, dict) and found.get("date") else None
    return None
