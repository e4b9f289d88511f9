"""Decides how to make each tensor of the merged model, from headers and configurations, before any weight is read."""

from collections.abc import Iterable
from dataclasses import dataclass

from fusechat.errors import ModelError
from fusechat.merge.checkpoint import BYTES, FLOATS, Checkpoint, Entry
from fusechat.merge.mismatches import Missing, is_buffer, missing_lines, quantised, shortened, should_have
from fusechat.merge.ties import Ties, find_ties
from fusechat.merge.values import layer_of
from fusechat.run.progress import log

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BASE, WIDEST = "base", "widest"  # types of the output: as the base has each tensor; as holds what every input has


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output. `sources`: its name in each input. The first `merged` elements are merged, the rest copied from
    the first input; 0 copies all."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    size: int
    merged: int

    @property
    def bytes(self) -> int:
        """The number of bytes."""
        return self.size * BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """`left_out`: copies of tied tensors, and buffers that the class does not read. `only_base`: copied, because no target has
    them. `untied`: embeddings are merged separately, although the donor's configuration ties them."""

    pieces: list[OutputTensor]
    left_out: list[str]
    only_base: list[str]
    untied: bool = False

    def shards(self, limit: int) -> list[tuple[str, list[OutputTensor]]]:
        """(file name, tensors) of the output, with at most `limit` bytes of tensors in a file, or a single larger tensor."""
        groups: list[list[OutputTensor]] = [[]]
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
    """Plans the output. `donor`: the model that gives the configuration. With `has_base` the first input is the base; tensors
    that only it has, and no target should have, are copied. Raises ModelError with a line for each mismatch."""
    problems = [problem for checkpoint in inputs for problem in quantised(checkpoint)]
    if problems:
        raise ModelError(*problems)
    names = _in_order(name for checkpoint in inputs for name in checkpoint.entries)
    ask = _in_question(inputs)
    ties = find_ties(inputs, donor, names) if ask else Ties()
    unread = _unread(inputs, donor, names) if ask else set()
    pieces: list[OutputTensor] = []
    missing: list[Missing] = []
    left_out, only_base = [], []
    for name in names:
        if name in ties.left_out or name in unread:
            left_out.append(name)
            continue
        found = [ties.source(inputs, number, name) for number in range(len(inputs))]
        sources = [source for source in found if source is not None]
        if has_base and sources == found[:1] and _is_the_bases(name, inputs, donor):
            only_base.append(name)
        elif None in found:
            lacking = [number for number, source in enumerate(found) if source is None]
            missing.append(Missing(name, lacking, next(n for n, source in enumerate(found) if source is not None)))
            continue
        try:
            pieces.append(_piece(name, inputs, sources, donor, dtype=dtype, resize=allow_vocab_resize))
        except ModelError as error:
            problems += error.messages
    problems = [*missing_lines(inputs, missing), *problems]
    if problems:
        more = [f"and {len(problems) - 20} more of this kind"] if len(problems) > 20 else []
        raise ModelError(*problems[:20], *more)
    return Plan(pieces, left_out, only_base, ties.untie)


def _piece(
    name: str, inputs: list[Checkpoint], sources: list[str], donor: Checkpoint, *, dtype: str, resize: bool
) -> OutputTensor:
    """The output's tensor; copied if only the first input has a source. Raises ModelError."""
    entries = [checkpoint.entries[source] for checkpoint, source in zip(inputs, sources, strict=False)]
    merged = _merged(name, inputs, entries, resize)
    code = _output(dtype, donor.entries.get(name, entries[0]), entries)
    return OutputTensor(
        name, entries[0].shape, code, tuple(sources), entries[0].size, merged if len(entries) == len(inputs) else 0
    )


def _in_question(inputs: list[Checkpoint]) -> bool:
    """Whether the models' classes are needed, which takes seconds and memory: for missing tensors, possible ties, and buffers."""
    if any(checkpoint.entries.keys() != inputs[0].entries.keys() for checkpoint in inputs):
        return True
    matrices = {name: entry.shape for name, entry in inputs[0].entries.items() if len(entry.shape) > 1}
    outer = [shape for name, shape in matrices.items() if layer_of(name) is None]
    plainly_untied = all(_is_plainly_untied(checkpoint) for checkpoint in inputs)
    if len(set(outer)) < len(outer) and not plainly_untied:
        return True
    return any(is_buffer(name, entry) for name, entry in inputs[0].entries.items())


def _is_plainly_untied(checkpoint: Checkpoint) -> bool:
    """Whether it is a decoder whose only configuration says that embeddings are not tied."""
    config = checkpoint.config
    composed = any(isinstance(part, dict) and key.endswith("config") for key, part in config.items())
    return config.get("tie_word_embeddings") is False and not composed and not config.get("is_encoder_decoder")


def _unread(inputs: list[Checkpoint], donor: Checkpoint, names: list[str]) -> set[str]:
    """Buffers that older versions wrote and the class does not read."""
    architecture = donor.architecture
    if architecture is None:
        return set()
    entries = {name: entry for checkpoint in inputs for name, entry in checkpoint.entries.items()}
    buffers = [name for name in names if is_buffer(name, entries[name]) and not architecture.reads(name)]
    found = [name for name in buffers if architecture.has_part_of(name)]
    if found:
        log.warning("left out are buffers that %s does not read: %s", architecture.name, shortened(found))
    return set(found)


def _is_the_bases(name: str, inputs: list[Checkpoint], donor: Checkpoint) -> bool:
    """Whether a tensor that only the base has is no damage of the targets: a head, or a module outside the model's class."""
    if donor.architecture is not None and not donor.architecture.reads(name):
        return True
    if donor.architecture is None and is_buffer(name, inputs[0].entries[name]):
        return True
    return not any(should_have(target, name) for target in inputs[1:])


def _merged(name: str, inputs: list[Checkpoint], entries: list[Entry], resize: bool) -> int:
    """How many elements of a tensor are merged: all, the rows that all vocabularies share, or none (buffers)."""
    first = entries[0]
    for checkpoint, entry in zip(inputs, entries, strict=False):  # only the base's, if no other has it
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
    """Whether the tensor has a row for each token."""
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
        return kinds.pop() if len(kinds) == 1 else "F32"  # the smallest that holds float16 and bfloat16
    return CODES[dtype]


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted, with layer 2 before layer 10."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]

    return sorted(set(names), key=key)
