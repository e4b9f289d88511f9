"""Whether the models' tensors have the same meaning, by their tokenizers and configurations."""

import filecmp
import re
from pathlib import Path
from typing import Any

from fusechat.merge.checkpoint import Checkpoint
from fusechat.merge.mismatches import shortened
from fusechat.models.companion_files import read_json_of

_NO_MATTER = re.compile(  # configuration keys that do not change what a model computes, or are checked elsewhere
    r"_.*|.*_token_id|.*dropout.*|initializer.*|(torch_)?dtype|auto_map|use_cache|transformers_version|tie_word_embeddings|"
    r"vocab_size|id2label|label2id|num_labels|output_.*|return_dict.*|use_return_dict|problem_type|gradient_checkpointing|"
    r"pretraining_tp|task_specific_params|torchscript|unsloth.*|attn_implementation|quantization_config"
)


def token_lines(inputs: list[Checkpoint]) -> list[str]:
    """A line for each model that has other tokens at the first model's ids, or more tokens. Unreadable vocabularies are skipped."""
    others = [model for model in inputs[1:] if not _same_tokenizer(inputs[0].directory, model.directory)]
    first = vocabulary(inputs[0].directory) if others else {}
    lines = []
    for model in others if first else []:
        tokens = vocabulary(model.directory)
        both = sorted(tokens.keys() & first.keys())
        other = [(number, tokens[number], first[number]) for number in both if tokens[number] != first[number]]
        if other:
            shown = shortened(f"{number} is {here!r} and not {there!r}" for number, here, there in other)
            what = f"{len(other)} ids are other tokens' than in {inputs[0].label} ({shown})"
            lines.append(f"{model.label}: {what}; rows of different tokens are merged with each other")
        known = set(first.values())
        further = [tokens[number] for number in sorted(tokens.keys() - first.keys()) if tokens[number] not in known]
        if further:
            shown = shortened(map(repr, further))
            what = f"{len(further)} tokens are not in {inputs[0].label}'s tokenizer ({shown})"
            lines.append(f"{model.label}: {what}, and that is the merged model's")
    return lines


def _same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both have the same file. Parsing large ones takes memory."""
    first, second = one / "tokenizer.json", other / "tokenizer.json"
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def configuration_lines(inputs: list[Checkpoint]) -> list[str]:
    """A line for each model whose configuration computes differently from the first one's, which is kept."""
    lines = []
    for model in inputs[1:]:
        first, other = _matters(inputs[0].config), _matters(model.config)
        if first == other:
            continue
        whole = (_with_defaults(inputs[0].directory), _with_defaults(model.directory))
        if whole[0] is not None and whole[1] is not None:
            first, other = _matters(whole[0]), _matters(whole[1])
        else:  # a class with unknown defaults
            first, other = ({key: config[key] for key in first.keys() & other.keys()} for config in (first, other))
        keys = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if keys:
            shown = ", ".join(f"{key} is {other.get(key)!r} and not {first.get(key)!r}" for key in keys)
            lines.append(f"{model.label}: its configuration differs from {inputs[0].label}'s, which is kept: {shown}")
    return lines


def vocabulary(directory: Path) -> dict[int, str]:
    """Id → token from tokenizer.json, else from the files of older tokenizers; empty if none can be read."""
    whole = read_json_of(directory / "tokenizer.json")
    model = whole["model"] if isinstance(whole.get("model"), dict) else {}
    found: dict[int, str] = {}
    words = model.get("vocab") or read_json_of(directory / "vocab.json") or _lines(directory / "vocab.txt")
    if isinstance(words, dict):
        found |= {number: token for token, number in words.items() if isinstance(number, int)}
    elif isinstance(words, list):  # with scores, in order of ids
        found |= {number: piece[0] for number, piece in enumerate(words) if isinstance(piece, list) and piece}
    added = whole.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            found[token["id"]] = str(token.get("content"))
    if not whole and found:
        more = read_json_of(directory / "added_tokens.json")
        found |= {number: token for token, number in more.items() if isinstance(number, int)}
    return found


def _lines(file: Path) -> dict[str, int]:
    try:
        return {token: number for number, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
    except (OSError, UnicodeDecodeError):
        return {}


def _matters(config: dict[str, Any], within: str = "") -> dict[str, Any]:
    """The keys of a configuration that determine what the model computes; nested keys with a dot."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _NO_MATTER.fullmatch(key):
            continue
        if isinstance(value, dict):
            found |= _matters(value, f"{within}{key}.")
        elif value is not None:
            found[f"{within}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _with_defaults(directory: Path) -> dict[str, Any] | None:
    """The configuration with the class's defaults, and current names for old keys."""
    from fusechat.models.load import quiet_transformers

    quiet_transformers()
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict())
    except Exception:  # of many types; all mean that Transformers has no such class
        return None
