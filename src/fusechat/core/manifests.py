"""What a step's manifest says beside its files: with which versions it was made, and how one's inputs differ from another's."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

_VERSIONS = ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors", "accelerate")


def versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def difference(old: Any, new: Any, path: str = "") -> str:
    """The first few keys in which two manifests' inputs differ, for a person to read."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{path} changed"
    found = []
    for key in [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)][:4]:
        name = f"{path}.{key}".lstrip(".")
        one_sided = "" if key in old and key in new else "is new" if key in new else "is gone"
        found.append(f"{name} {one_sided}" if one_sided else difference(old[key], new[key], name))
    return "; ".join(found)
