"""Merging as `fusechat merge` does it."""

from pathlib import Path
from typing import Any


def merge(config: dict[str, Any], pivot: Path, targets: list[Path], out: Path) -> None:
    """`config`: `method` and its parameters."""
    from fusechat.merge import merge as fusechat_merge

    method, parameters = config["method"], {name: value for name, value in config.items() if name != "method"}
    if method == "linear":
        parameters.setdefault("weight", 1.0)
    own = {name: parameters.pop(name) for name in ("weight", "density") if name in parameters}
    whole: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(target), **({"parameters": own} if own else {})} for target in targets],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method != "linear":
        whole["base_model"] = str(pivot)
    fusechat_merge(whole, out)
