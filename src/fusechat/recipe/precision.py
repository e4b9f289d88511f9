"""`auto` in a recipe: bfloat16 if the device computes it at full speed, else float32. A CPU without bfloat16 arithmetic converts
every number, which makes it several times slower than float32."""

from copy import deepcopy
from typing import Any

AUTO = "auto"
Place = tuple[str, ...]  # the keys that lead to a value
_PLACES = (("capture", "dtype"), ("evaluate", "dtype"), ("fuse", "training", "bf16"))


def automatic(raw: Any) -> tuple[Place, ...]:
    """The places of `auto` in a raw recipe."""
    sources = value_at(raw, ("sources",))
    names = sources if isinstance(sources, dict) else ()
    places = [*_PLACES, *(("sources", str(name), "capture", "dtype") for name in names)]
    return tuple(place for place in places if value_at(raw, place) == AUTO)


def with_dtypes(raw: Any, dtype: str | None = None) -> Any:
    """A raw recipe with every `auto` replaced by `dtype`, None for the recipe's device's. Other forms are left to validation."""
    places = automatic(raw)
    if not places:
        return raw
    from fusechat.models.load import fast_dtype

    chosen = dtype or fast_dtype(raw.get("device"))
    raw = deepcopy(raw)
    for *above, key in places:
        value_at(raw, tuple(above))[key] = chosen == "bfloat16" if key == "bf16" else chosen
    return raw


def value_at(raw: Any, place: Place) -> Any:
    """A raw recipe's value at a place, or None."""
    for key in place:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw
