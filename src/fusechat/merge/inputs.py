"""The models that a merge file lists, with their parameters."""

import os
from dataclasses import dataclass, field
from typing import Any

from fusechat.merge.mergekit_names import PARAMETERS
from fusechat.merge.values import shown
from fusechat.models.reference import Reference
from fusechat.recipe.yaml_file import Document, Place, suggestion
from fusechat.run.progress import log

_KEYS = ("model", "parameters")


@dataclass(frozen=True)
class Input:
    """A model of the merge. `place`: where the file names it; `parameters`: its own, as given."""

    reference: Reference
    place: Place
    parameters: dict[str, Any] = field(default_factory=dict)


def read_inputs(document: Document) -> tuple[list[Input], Reference | None]:
    """The listed models in order, and the base model. A base that is not listed becomes the last input. Mistakes are recorded in
    `document`, and their models left out."""
    models = document.content.get("models")
    inputs: list[Input] = []
    if isinstance(models, list) and models:
        for index, entry in enumerate(models):
            given = _entry(document, ("models", str(index)), entry)
            twice = given and any(given.reference == other.reference for other in inputs)
            if given and twice and document.content.get("merge_method") != "linear":
                document.complain((*given.place, "model"), f"{given.reference} is listed twice")
            elif given:
                inputs.append(given)
                if twice:
                    what = f"{given.reference} is listed twice, and the weights of both count"
                    log.warning("%s", document.at((*given.place, "model"), what))
    elif models is not None:
        what = "lists no model" if models == [] else f"should be a list of models, not {shown(models)}"
        document.complain(("models",), what)
    elif document.content.get("slices") is None and document.content.get("modules") is None:
        document.complain(("models",), "is missing")
    if document.content.get("base_model") is None:
        return inputs, None
    base = read_reference(document, ("base_model",), document.content["base_model"])
    if base is not None and all(given.reference != base for given in inputs):
        inputs.append(Input(base, ("base_model",)))
    return inputs, base


def _entry(document: Document, place: Place, entry: Any) -> Input | None:
    if not isinstance(entry, dict):
        document.complain(place, f"should be a mapping of model and parameters, not {shown(entry)}")
        return None
    for key in map(str, entry):
        if key not in _KEYS:
            what = "belongs under parameters" if key in PARAMETERS else "unknown key" + suggestion(key, _KEYS)
            document.complain((*place, key), what)
    parameters = read_mapping(document, (*place, "parameters"), entry.get("parameters"))
    if "model" not in entry:
        document.complain((*place, "model"), "is missing")
        return None
    reference = read_reference(document, (*place, "model"), entry["model"])
    return None if reference is None else Input(reference, place, parameters)


def read_mapping(document: Document, place: Place, raw: Any) -> dict[str, Any]:
    """Parameters by name; null is an empty mapping."""
    if raw is not None and not isinstance(raw, dict):
        document.complain(place, f"should be a mapping of parameters, not {shown(raw)}")
    return {str(key): value for key, value in raw.items()} if isinstance(raw, dict) else {}


def read_reference(document: Document, place: Place, raw: Any) -> Reference | None:
    """A model as text, or as mergekit's mapping `{model: {path: …, revision: …}}`, with local paths made absolute. None, with a
    recorded mistake, if it is neither."""
    if isinstance(raw, dict):
        raw, place = _unfolded(document, place, raw)
    if not isinstance(raw, str) or not raw:
        document.complain(place, f"should name a model, not {shown(raw)}")
        return None
    path, wheel = os.path.expanduser(raw), raw.startswith("wheel:")
    local = not wheel and os.path.exists(path)
    if "+" in raw and not local and not wheel:
        document.complain(place, f"{raw!r} adds a LoRA adapter, which is not supported: merge it into its model first")
        return None
    reference = Reference((os.path.abspath(path) if local else raw,))
    problem = reference.check()
    if problem:
        document.complain(place, problem)
        return None
    return reference


def _unfolded(document: Document, place: Place, raw: dict[Any, Any]) -> tuple[Any, Place]:
    """The reference in mergekit's mapping, and its place in the file."""
    for key, value in raw.items():
        if key in ("lora", "override_architecture"):
            if value is not None:
                document.complain((*place, key), "not supported")
        elif key != "model":
            document.complain((*place, str(key)), "unknown key" + suggestion(str(key), ("model",)))
    place = (*place, "model")
    inner = raw.get("model")
    if not isinstance(inner, dict):
        return inner, place
    for key in map(str, inner):
        if key not in ("path", "revision"):
            document.complain((*place, key), "unknown key" + suggestion(key, ("path", "revision")))
    path, revision = inner.get("path"), inner.get("revision")
    if revision is not None and not isinstance(revision, str):
        document.complain((*place, "revision"), f"should be text, not {shown(revision)}")
    return (f"{path}@{revision}" if isinstance(path, str) and revision else path), (*place, "path")
