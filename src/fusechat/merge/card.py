"""The model card (README.md) of a merged model."""

from pathlib import Path
from typing import Any

import jinja2


def render_card(template: str, **values: Any) -> str:
    """Renders a template of this directory: Markdown with the metadata header of the Hugging Face hub."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # Markdown, not HTML: nothing to escape
    return environment.get_template(template).render(portable(values))


def portable(value: Any) -> Any:
    """Replaces local paths by their last part, because a card is published."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") and "\n" not in value else value
