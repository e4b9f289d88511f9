"""The fused model's README: what it was made of, and how."""

from pathlib import Path
from typing import Any

import jinja2
import yaml


def model_card(
    *,
    name: str,
    method: str,
    pivot: str,
    sources: dict[str, str],
    data: dict[str, str],
    how_to_ask: str | None,
    coefficients: dict[str, float],
    recipe: dict[str, Any],
) -> str:
    """Markdown with the metadata header that the Hugging Face hub reads."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # Markdown, not HTML: nothing to escape
    return environment.get_template("card.md.j2").render(
        name=name,
        method=method,
        pivot=portable(pivot),
        sources=portable(sources),
        data=data,
        how_to_ask=how_to_ask,
        coefficients=coefficients,
        recipe=yaml.safe_dump(portable(recipe), sort_keys=False, allow_unicode=True, width=100),
    )


def portable(value: Any) -> Any:
    """Paths of this machine by their last part only: a card is published."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") and "\n" not in value else value
