"""`auto` in a recipe: bfloat16 where the device computes in it at full speed, else float32. A CPU without such arithmetic converts
every number, which makes bfloat16 several times slower there than float32."""

from copy import deepcopy
from typing import Any

AUTO = "auto"
_PLACES = (("capture", "dtype"), ("evaluate", "dtype"), ("fuse", "training", "bf16"))


def with_dtypes(raw: Any, dtype: str | None = None) -> Any:
    """A raw recipe with every `auto` replaced. `dtype`: by what; None chooses for the recipe's device. What has another form is
    left for others to refuse."""
    sources = _at(raw, ("sources",))
    names = sources if isinstance(sources, dict) else ()
    places = [*_PLACES, *(("sources", name, "capture", "dtype") for name in names)]
    automatic = [place for place in places if _at(raw, place) == AUTO]
    if not automatic:
        return raw
    from fusechat.core.models import fast_dtype

    chosen = dtype or fast_dtype(raw.get("device"))
    raw = deepcopy(raw)
    for *above, key in automatic:
        _at(raw, above)[key] = chosen == "bfloat16" if key == "bf16" else chosen
    return raw


def _at(raw: Any, place: Any) -> Any:
    for key in place:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw
