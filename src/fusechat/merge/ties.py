"""Tied tensors, such as an output embedding that is the input embedding: which ones a merged model has, and their names in
inputs."""

from dataclasses import dataclass, field

from fusechat.merge.checkpoint import Checkpoint
from fusechat.merge.values import layer_of
from fusechat.run.progress import log

HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")  # names of output embeddings
EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
Group = list[str]  # names of one tensor, the original first


@dataclass(frozen=True)
class Ties:
    """`left_out`: copies, which a model creates itself on loading. `own`: copies by the class that differ in the donor, so that
    they are merged separately. `untie`: the configuration must say so."""

    left_out: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    untie: bool = False
    _groups: list[list[Group]] = field(default_factory=list)  # of each input

    def source(self, inputs: list[Checkpoint], number: int, name: str) -> str | None:
        """The name under which an input has a tensor; a tied tensor may have another's."""
        if name in inputs[number].entries:
            return name
        group = next((group for group in self._groups[number] if name in group), []) if self._groups else []
        return next((other for other in group if other in inputs[number].entries), None)


def find_ties(inputs: list[Checkpoint], donor: Checkpoint, names: list[str]) -> Ties:
    """Finds tied tensors: for the output by the donor's class, for each input by its own. `names`: of all inputs' tensors.

    Copies stored next to their original are compared: if they differ they are not tied, whatever the configuration says, because
    Transformers loads them so.
    """
    left_out: set[str] = set()
    own: set[str] = set()
    for group in _groups(donor, names):
        kept = next((name for model in (donor, inputs[0]) for name in group if name in model.entries), group[0])
        for name in group:
            if name != kept and donor.entries.keys() >= {name, kept} and not donor.same(name, kept):
                own.add(name)
                log.warning(
                    "%s: is no copy of %s in %s, though its configuration ties them; merged apart",
                    name,
                    kept,
                    donor.label,
                )
            elif name != kept:
                left_out.add(name)
                _warn(inputs, donor, name, kept)
    pair = donor.architecture is None or len(donor.architecture.copies) == 1
    return Ties(left_out, own, bool(own) and pair, [_groups(checkpoint, names) for checkpoint in inputs])


def _warn(inputs: list[Checkpoint], donor: Checkpoint, name: str, kept: str) -> None:
    """Warns about an input's copy that differs from its original, and is lost."""
    for checkpoint in inputs:
        if checkpoint.entries.keys() >= {name, kept} and not checkpoint.same(name, kept):
            log.warning("%s: is not tied in %s as in %s; left out", name, checkpoint.label, donor.label)


def _groups(checkpoint: Checkpoint, names: list[str]) -> list[Group]:
    """Those of `names` that are one tensor, by the model's class, else by its configuration."""
    if checkpoint.architecture is None:
        embeddings, heads = ([name for name in names if is_embedding(name, kind)] for kind in (EMBEDDINGS, HEADS))
        return [[embeddings[0], *heads]] if embeddings and heads and checkpoint.is_tied() else []
    copies = checkpoint.architecture.copies
    known = {name: checkpoint.architecture.known_as(name) for name in names} if copies else {}
    groups: dict[str, list[str]] = {original: [] for original in copies.values()}
    for name, as_known in sorted(known.items(), key=lambda item: item[1] in copies):
        original = copies.get(as_known, as_known)
        if original in groups:
            groups[original].append(name)
    return [group for group in groups.values() if len(group) > 1]


def is_embedding(name: str, endings: tuple[str, ...]) -> bool:
    """Whether it is an embedding outside the layers, unlike `layers.0.attention.output.weight`."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings) and layer_of(name) is None
