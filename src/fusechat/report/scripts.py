"""The page's scripts and data: one script of ours, Plotly packed, plots as JSON, and a policy under which no other script runs."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup

from fusechat.report.plots import Plot

_OWN = Path(__file__).with_name("page.js")
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Scripts:
    """`own` runs as it stands; `plotly` is gzip in base64, which `own` unpacks; `figures` is JSON that no text in it can end."""

    own: Markup
    plotly: Markup
    figures: Markup
    policy: str


def scripts(figures: Sequence[Plot]) -> Scripts:
    """Without figures Plotly is left out."""
    own = _OWN.read_text(encoding="utf-8")
    packed, digest = _plotly() if figures else ("", "")
    allowed = " ".join(f"'{one}'" for one in (source_hash(own), digest) if one)
    return Scripts(
        own=Markup(own),
        plotly=Markup(packed),
        figures=Markup(
            as_json([{"name": figure.name, "data": figure.data, "layout": figure.layout} for figure in figures])
        ),
        policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )


def as_json(value: object) -> str:
    """JSON that may stand in a script element: in it no text can close the element, or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPES)


def source_hash(script: str) -> str:
    """As a Content-Security-Policy names a script by its text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _plotly() -> tuple[str, str]:
    """Plotly packed, the same bytes each time, and its hash."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    packed = gzip.compress(source.encode(), 9, mtime=0)
    return base64.b64encode(packed).decode(), source_hash(source)
