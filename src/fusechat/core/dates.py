"""The day that chat templates are told: some write it into every prompt, which must not depend on when a step happens to run."""

import re
from datetime import date

_ASKS = "strftime_now"  # a function that Transformers gives to templates
_CODES = re.compile(r"%-?[A-Za-z%]")
_LETTERS = "aAbBcdDeFGgHhIjklmMnpPrRsStTuUVwWxXyYzZ"


def is_dated(template: str) -> bool:
    """Whether a template asks for the day."""
    return _ASKS in template


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
        "{%- endfor -%}{%- endmacro -%}"
    ) + template


def today() -> str:
    return date.today().isoformat()
