"""`auto` in a recipe: bfloat16 where the device computes in it at full speed, else float32. A CPU without such arithmetic converts
every number, which makes bfloat16 several times slower there than float32."""

from copy import deepcopy
from typing import Any

AUTO = "auto"
Place = tuple[str, ...]  # the keys that lead to a value of a recipe
_PLACES = (("capture", "dtype"), ("evaluate", "dtype"), ("fuse", "training", "bf16"))


def automatic(raw: Any) -> tuple[Place, ...]:
    """Where a raw recipe says `auto`."""
    sources = value_at(raw, ("sources",))
    names = sources if isinstance(sources, dict) else ()
    places = [*_PLACES, *(("sources", str(name), "capture", "dtype") for name in names)]
    return tuple(place for place in places if value_at(raw, place) == AUTO)


def with_dtypes(raw: Any, dtype: str | None = None) -> Any:
    """A raw recipe with every `auto` replaced. `dtype`: by what; None chooses for the recipe's device. What has another form is
    left for others to refuse."""
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
    """What a raw recipe has there; None for nothing."""
    for key in place:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw
