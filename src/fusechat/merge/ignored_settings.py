"""Settings of published configurations that have no effect here: removed before the configuration is read. If that depends on
the models, a condition checks it once they are open."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.errors import RecipeError
from fusechat.merge import mergekit_names
from fusechat.merge.checkpoint import Checkpoint
from fusechat.merge.compatibility import token_lines
from fusechat.merge.methods import Method
from fusechat.models.companion_files import read_json_of
from fusechat.recipe.yaml_file import Document, Place


@dataclass
class Conditions:
    """Removed settings that the models must satisfy: `layers`, slices cover all of this many layers; `tokens`, equal tokenizers;
    `templates`, equal chat templates."""

    layers: tuple[Place, int] | None = None
    tokens: Place | None = None
    templates: Place | None = None
    _document: Document | None = field(default=None, repr=False)

    def check(self, inputs: list[Checkpoint]) -> None:
        """Raises RecipeError with a line for each condition that does not hold."""
        wrong: list[tuple[Place, str]] = []
        if self.layers:
            place, count = self.layers
            for model in inputs:
                has = model.depth or max(model.stacks.values(), default=0)
                if has != count:
                    what = (
                        f"{model.label} has {has} layers, and these are {count}: {mergekit_names.UNSUPPORTED['slices']}"
                    )
                    wrong.append((place, what))
        for line in token_lines(inputs) if self.tokens else ():
            wrong.append((self.tokens or (), f"{line}, and merging by token is not supported"))
        templates = [_template(model.directory) for model in inputs] if self.templates else []
        for model, template in zip(inputs, templates, strict=False):
            if template != templates[0]:
                what = f"{model.label} has another than {inputs[0].label}: leave it out to keep the latter's"
                wrong.append((self.templates or (), what))
        if wrong and self._document:
            raise RecipeError(*(self._document.at(place, what) for place, what in wrong))


def without_accepted(document: Document, module: Method | None) -> tuple[dict[str, Any], Conditions]:
    """The configuration's content without these settings, and the conditions."""
    content = dict(document.content)
    conditions = Conditions(_document=document)
    donors = [content.get("base_model") or _first_model(content), "base"]
    if content.get("tokenizer_source") in donors and content.get("tokenizer_source"):
        conditions.tokens = ("tokenizer_source",)
        del content["tokenizer_source"]
    tokenizer = content.get("tokenizer")
    if isinstance(tokenizer, dict) and tokenizer.keys() == {"source"} and tokenizer["source"] in donors:
        conditions.tokens = ("tokenizer",)
        del content["tokenizer"]
    if content.get("chat_template") == "auto":
        conditions.templates = ("chat_template",)
        del content["chat_template"]
    _whole_slice(content, conditions)
    parameters = content.get("parameters")
    shared: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    for parameter in module.PARAMETERS if module else ():
        given = content.get(parameter.name)
        if given is not None and given == parameter.default and parameter.name not in shared:
            del content[parameter.name]
    for key in document.reused | mergekit_names.SILENT:
        if key not in mergekit_names.KEYS:
            content.pop(key, None)
    return content, conditions


def _first_model(content: dict[str, Any]) -> Any:
    models = content.get("models")
    return models[0].get("model") if isinstance(models, list) and models and isinstance(models[0], dict) else None


def _whole_slice(content: dict[str, Any], conditions: Conditions) -> None:
    """Replaces a single slice from layer 0, equal for all models, by the models themselves, if it covers all layers."""
    slices = content.get("slices")
    only = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    if (
        not isinstance(only, dict)
        or not {"sources"} <= only.keys() <= {"sources", "parameters"}
        or content.get("models")
    ):
        return
    sources = only["sources"]
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return
    ranges = [source.get("layer_range") for source in sources]
    if not ranges or not all(_is_from_the_first(found) and found == ranges[0] for found in ranges):
        return
    of_slice, of_all = only.get("parameters") or {}, content.get("parameters") or {}
    if not isinstance(of_slice, dict) or not isinstance(of_all, dict):
        return
    del content["slices"]
    content["models"] = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    content["parameters"] = {**of_all, **of_slice}
    conditions.layers = (("slices",), int(ranges[0][1]))


def _is_from_the_first(layers: Any) -> bool:
    return isinstance(layers, list) and len(layers) == 2 and layers[0] == 0 and isinstance(layers[1], int)


def _template(directory: Path) -> Any:
    """The chat template of a model directory, from the first place that has one; None if there is none."""
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = [
            read_json_of(directory / f"{name}.json").get("chat_template")
            for name in ("chat_template", "tokenizer_config")
        ]
        return next((template for template in found if template), None)
