"""Sizes, counts and times for people."""

from fusechat.run.progress import in_time


def size(count: float | None) -> str:
    """Bytes in decimal units: 538 MB."""
    return _scaled(count, (" bytes", " kB", " MB", " GB", " TB"))


def amount(count: float | None) -> str:
    """A count with its unit: 135M, 1.24B."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def operations(count: float | None) -> str:
    """Floating-point operations: 3.2 PFLOP."""
    return _scaled(count, tuple(f" {prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")))


def duration(seconds: float | None) -> str:
    return "–" if seconds is None else in_time(seconds)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}%"


def _scaled(count: float | None, units: tuple[str, ...]) -> str:
    if count is None:
        return "–"
    power = 0
    while power + 1 < len(units) and round(count / 1000**power, 0) >= 1000:
        power += 1
    value = count / 1000**power
    return f"{value:,.0f}{units[power]}" if not power or value >= 100 else f"{value:.3g}{units[power]}"
