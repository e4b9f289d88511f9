"""What is to be done to get each tensor of the merged model, decided from headers and configurations before any weight is read."""

from collections.abc import Iterable
from dataclasses import dataclass

from fusechat.core.progress import log
from fusechat.errors import ModelError
from fusechat.merge.checkpoint import BYTES, FLOATS, Checkpoint, Entry
from fusechat.merge.values import layer_of

HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")  # output embeddings, as architectures call them
EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BASE, WIDEST = "base", "widest"  # types of the output: as the base has each tensor; as holds what every input has
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """One tensor of the output. `sources`: for every input, under which name it has the tensor. The first `merged` elements are
    merged, the rest are the first input's; 0 where the tensor is copied."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    size: int
    merged: int

    @property
    def bytes(self) -> int:
        return self.size * BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """`left_out`: output embeddings, where the output ties them to the input's. `only_base`: copied since no target has them."""

    pieces: list[Piece]
    left_out: list[str]
    only_base: list[str]

    def shards(self, limit: int) -> list[tuple[str, list[Piece]]]:
        """(file name, pieces) of the output: at most `limit` bytes of tensors a file, and at least one tensor."""
        groups: list[list[Piece]] = [[]]
        filled = 0
        for piece in self.pieces:
            if groups[-1] and filled + piece.bytes > limit:
                groups.append([])
                filled = 0
            groups[-1].append(piece)
            filled += piece.bytes
        if len(groups) == 1:
            return [("model.safetensors", groups[0])]
        return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def make_plan(
    inputs: list[Checkpoint], donor: Checkpoint, *, dtype: str, has_base: bool, allow_vocab_resize: bool
) -> Plan:
    """`donor`: the model whose configuration the output has. With `has_base` the first input is the base, and tensors that it
    alone has are copied. Raises ModelError with everything that does not fit."""
    problems = [problem for checkpoint in inputs for problem in _quantised(checkpoint)]
    pieces: list[Piece] = []
    left_out, only_base = [], []
    everywhere = _in_order(name for checkpoint in inputs for name in checkpoint.entries)
    both = any(_is(name, HEADS) for name in everywhere) and any(_is(name, EMBEDDINGS) for name in everywhere)
    tied = both and donor.is_tied()
    for name in everywhere:
        if tied and _is(name, HEADS):
            left_out.append(name)
            for checkpoint in inputs:
                if name in checkpoint.entries and not checkpoint.is_tied():
                    log.warning("%s: is not tied in %s as in %s; left out", name, checkpoint.label, donor.label)
            continue
        sources = {checkpoint.label: _source(checkpoint, name) for checkpoint in inputs}
        has = [label for label, source in sources.items() if source is not None]
        if has_base and has == [inputs[0].label]:
            only_base.append(name)
            sources = {has[0]: name}
        try:
            if None in sources.values():
                lacking = [label for label, source in sources.items() if source is None]
                raise ModelError(f"{name}: is missing from {_list(lacking)}, and {has[0]} has it")
            names = tuple(map(str, sources.values()))
            entries = [checkpoint.entries[source] for checkpoint, source in zip(inputs, names, strict=False)]
            merged = _merged(name, inputs, entries, allow_vocab_resize)
            merged = 0 if name in only_base else merged
            like = donor.entries.get(name, entries[0])
            code = _output(dtype, like, entries)
            pieces.append(Piece(name, entries[0].shape, code, names, entries[0].size, merged))
        except ModelError as error:
            problems += error.messages
    if problems:
        more = [f"and {len(problems) - 20} more of this kind"] if len(problems) > 20 else []
        raise ModelError(*problems[:20], *more)
    return Plan(pieces, left_out, only_base)


def _merged(name: str, inputs: list[Checkpoint], entries: list[Entry], resize: bool) -> int:
    """How many elements of a tensor are merged: all, those of the rows that all vocabularies have, or none of a buffer's."""
    first = entries[0]
    for checkpoint, entry in zip(inputs, entries, strict=False):  # the base's alone, where no other has it
        here = f"{name}: is {list(first.shape)} in {inputs[0].label} and {list(entry.shape)} in {checkpoint.label}"
        if entry.dtype not in BYTES:
            raise ModelError(f"{name}: is stored as {entry.dtype} in {checkpoint.label}; convert that model first")
        if (entry.dtype in FLOATS) != (first.dtype in FLOATS):
            raise ModelError(f"{name}: is a buffer of whole numbers in one model, and of floats in another")
        if entry.shape == first.shape:
            continue
        vocabularies = _of_vocabulary(checkpoint, entry) and _of_vocabulary(inputs[0], first)
        if not vocabularies or entry.shape[1:] != first.shape[1:] or first.dtype not in FLOATS:
            raise ModelError(here)
        if not resize:
            what = "vocabularies of different sizes; --allow-vocab-resize merges the rows that all have"
            raise ModelError(f"{here}: {what}")
    return min(entry.size for entry in entries) if first.dtype in FLOATS else 0


def _of_vocabulary(checkpoint: Checkpoint, entry: Entry) -> bool:
    """Whether the tensor has a row for each token of the model."""
    text = checkpoint.config.get("text_config")
    sizes = {config.get("vocab_size") for config in (checkpoint.config, text) if isinstance(config, dict)}
    return bool(entry.shape) and entry.shape[0] in sizes


def _output(dtype: str, like: Entry, entries: list[Entry]) -> str:
    kinds = {entry.dtype for entry in entries}
    if entries[0].dtype not in FLOATS:
        return entries[0].dtype
    if dtype == BASE and like.dtype in FLOATS:
        return like.dtype
    if dtype in (BASE, WIDEST):
        return kinds.pop() if len(kinds) == 1 else "F32"  # nothing smaller holds both float16 and bfloat16
    return CODES[dtype]


def _source(checkpoint: Checkpoint, name: str) -> str | None:
    """Under which name the model has the tensor: where embeddings are tied, one stands for the other."""
    if name in checkpoint.entries:
        return name
    for these, others in ((HEADS, EMBEDDINGS), (EMBEDDINGS, HEADS)):
        if _is(name, these) and checkpoint.is_tied():
            return next((other for other in checkpoint.entries if _is(other, others)), None)
    return None


def _quantised(checkpoint: Checkpoint) -> list[str]:
    found = checkpoint.config.get("quantization_config")
    kind = f" ({found['quant_method']})" if isinstance(found, dict) and "quant_method" in found else ""
    return (
        [f"{checkpoint.label}: its weights are quantised{kind} and cannot be merged; dequantise it first"]
        if found
        else []
    )


def _is(name: str, endings: tuple[str, ...]) -> bool:
    """Whether it is such an embedding, and no part of a layer: `layers.0.attention.output.weight` is no output embedding."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings) and layer_of(name) is None


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted, with layer 2 before layer 10."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]

    return sorted(set(names), key=key)


def _list(items: Iterable[str]) -> str:
    found = list(items)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
