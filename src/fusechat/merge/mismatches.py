"""Why models cannot be merged, from the names and dtypes of their tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

from fusechat.merge.checkpoint import Checkpoint, Entry
from fusechat.merge.values import stack_of

QUANTISED = frozenset(  # names that GPTQ, AWQ, bitsandbytes, FP8, … use in place of a weight, or next to it
    (
        *("qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
        *(
            "weight_packed",
            "weight_scale",
            "weight_scale_inv",
            "weight_scales",
            "weight_zero_point",
            "W_q",
            "qscales",
        ),
        *("weight_shape", "input_scale", "weight_format"),
    )
)
_SHOWN = 3


@dataclass(frozen=True)
class Missing:
    """A missing tensor: the indices of inputs that lack it, and the first that has it."""

    name: str
    lacking: list[int]
    has: int


def quantised(checkpoint: Checkpoint) -> list[str]:
    """A line if the model's weights are quantised, by its configuration or its tensors."""
    config = checkpoint.config
    found = next(
        (config[key] for key in ("quantization_config", "quantization", "compression_config") if config.get(key)), None
    )
    if not found and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("quantization_config")
    kind = f" ({found['quant_method']})" if isinstance(found, dict) and "quant_method" in found else ""
    if not found:
        name = min((name for name, entry in checkpoint.entries.items() if _is_code(name, entry)), default=None)
        if name is None:
            return []
        kind = f" (it has {name})"
    return [f"{checkpoint.label}: its weights are quantised{kind} and cannot be merged; dequantise it first"]


def _is_code(name: str, entry: Entry) -> bool:
    """Whether a tensor is part of a quantised weight: by its name, or an integer matrix named `weight`."""
    parts = name.split(".")
    if QUANTISED.intersection(parts[-2:]):
        return True
    return parts[-1] == "weight" and len(entry.shape) > 1 and entry.dtype[0] in "IU"


def is_buffer(name: str, entry: Entry) -> bool:
    """Whether a tensor may be a buffer: not named like a weight, or a causal mask named `bias`."""
    last = name.rpartition(".")[2]
    return last not in ("weight", "bias") or (last == "bias" and len(entry.shape) > 2)


def should_have(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a model without this tensor is damaged: its class has it, or the model has part of the same module or stack."""
    if checkpoint.architecture is not None and checkpoint.architecture.reads(name):
        return True
    return not checkpoint.modules.isdisjoint(modules_above(name))


def modules_above(name: str) -> list[str]:
    """The modules that contain a tensor: `model` and `model.norm` for `model.norm.weight`."""
    parts = name.split(".")
    return [".".join(parts[:cut]) for cut in range(1, len(parts))]


def missing_lines(inputs: list[Checkpoint], missing: list[Missing]) -> list[str]:
    """Messages for missing tensors: one for all under other names, one for a stack with fewer layers, one for each other."""
    lines: dict[str, None] = {}  # each once, in order
    explained: set[str] = set()
    for model in inputs[1:] if missing else []:
        renamed = _other_names(inputs[0], model)
        if renamed:
            name, other = next(iter(renamed.items()))
            more = f", and so {len(renamed) - 1} more" if len(renamed) > 1 else ""
            what = f"calls {name} what {inputs[0].label} calls {other}{more}; save one of them again as the other is"
            lines[f"{model.label}: {what}"] = None
            explained |= renamed.keys() | set(renamed.values())
    for one in missing:
        model, having = inputs[one.lacking[0]], inputs[one.has]
        stack, layer = stack_of(one.name) or ("", 0)
        if one.name in explained:
            continue
        if 0 < model.stacks.get(stack, 0) <= layer:
            counts = f"{having.stacks[stack]} layers in {having.label} and {model.stacks[stack]} in {model.label}"
            lines[f"{stack}: has {counts}"] = None
        else:
            labels = shortened(inputs[number].label for number in one.lacking)
            lines[f"{one.name}: is missing from {labels}, and {having.label} has it"] = None
    return list(lines)


def _other_names(first: Checkpoint, model: Checkpoint) -> dict[str, str]:
    """The same tensors under other names: those that only `model` has → those that only `first` has. By the classes, which know
    the names of older versions, else by prefix."""
    alone = [name for name in model.entries if name not in first.entries]
    theirs = [name for name in first.entries if name not in model.entries]
    if model.architecture is not None and first.architecture is not None:
        known = {first.architecture.known_as(name): name for name in theirs}
        pairs = ((name, known.get(model.architecture.known_as(name))) for name in alone)
    else:
        shorter = {end: name for name in theirs for end in _ends(name)}
        pairs = ((name, next((shorter[end] for end in _ends(name) if end in shorter), None)) for name in alone)
    return {name: other for name, other in pairs if other and first.entries[other].shape == model.entries[name].shape}


def _ends(name: str) -> list[str]:
    """The name, and its dotted suffixes of at least two parts."""
    parts = name.split(".")
    return [".".join(parts[cut:]) for cut in range(max(len(parts) - 1, 1))]


def shortened(items: Iterable[str]) -> str:
    """The first few items as text, and how many more there are."""
    found = list(items)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
