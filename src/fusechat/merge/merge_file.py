"""Reads a configuration in mergekit's format and reports all its mistakes at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.errors import RecipeError
from fusechat.merge import mergekit_names
from fusechat.merge.ignored_settings import Conditions, without_accepted
from fusechat.merge.inputs import Input, read_inputs, read_mapping
from fusechat.merge.methods import Method, load_method, method_names
from fusechat.merge.parameters import Parameter, Values
from fusechat.merge.values import Setting, position, read_setting, resolve, shown
from fusechat.models.reference import Reference
from fusechat.recipe.yaml_file import Document, Place, kind, of_mapping, parse, read_text, second_document, suggestion
from fusechat.run.progress import log

_DTYPES = ("float32", "bfloat16", "float16")
_WHAT = "a merge configuration"


@dataclass(frozen=True)
class Scope:
    """The settings at `place`, by parameter. `unread`: names that have no meaning there."""

    place: Place
    settings: dict[str, Setting] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergeFile:
    """A checked merge configuration. Local models are absolute paths.

    `base`: the base model of a method with `BASE`, else None. `targets`: the merged models in order, without that base. `donor`:
    the model that gives configuration and tokenizer. `dtype`: of the output, or None. `name`: the title of the model card.
    `source`: the configuration as given. `conditions`: checked once the models are open.
    """

    method: str
    name: str | None
    base: Reference | None
    targets: list[Reference]
    donor: Reference
    dtype: str | None
    granularity: str
    source: dict[str, Any]
    conditions: Conditions
    _document: Document = field(repr=False)
    _parameters: tuple[Parameter, ...] = field(repr=False)
    _shared: Scope = field(repr=False)
    _own: list[Scope] = field(repr=False)  # of each target

    def values(self, tensor_name: str, layer_count: int) -> Values:
        """Every parameter's value for one tensor, whose stack has `layer_count` layers; `per_model` ones as a list by target.
        Raises RecipeError if filters leave the tensor without a required value."""
        at = position(tensor_name, layer_count)
        values: Values = {}
        for parameter in self._parameters:
            if parameter.per_model:
                values[parameter.name] = [
                    self._value(parameter, tensor_name, at, own, self._shared) for own in self._own
                ]
            else:
                values[parameter.name] = self._value(parameter, tensor_name, at, self._shared)
        return values

    def _value(self, parameter: Parameter, tensor_name: str, at: float, *scopes: Scope) -> float | bool:
        named = [scope for scope in scopes if parameter.name in scope.settings]
        value = resolve([scope.settings[parameter.name] for scope in named], tensor_name, at)
        if value is None and parameter.required:
            place = (*named[0].place, parameter.name)
            raise RecipeError(self._document.at(place, f"no filter holds for {tensor_name}, and there is no default"))
        return parameter.default if value is None else value


def read_merge_file(config: Mapping[str, Any] | str | Path) -> MergeFile:
    """Checks a configuration without reading models. Relative paths start at the working directory. Raises RecipeError."""
    document = _document(config)
    source = document.content
    name, method = _name(document), _method(document)
    module = load_method(method) if method else None
    document.content, conditions = without_accepted(document, module)
    _check_keys(document, module)
    dtypes = [_dtype(document, key) for key in ("out_dtype", "dtype")]
    faults = len(document.wrong)
    inputs, base = read_inputs(document)
    named = len(document.wrong) == faults and document.content.get("models") is not None
    raw = read_mapping(document, ("parameters",), document.content.get("parameters"))
    if module is None:
        raise RecipeError(*document.wrong)
    granularity = _granularity(document, module, raw)
    shared = _scope(document, module, ("parameters",), raw)
    own = {given.place: _scope(document, module, (*given.place, "parameters"), given.parameters) for given in inputs}
    targets = [given for given in inputs if not (module.BASE and given.reference == base)]
    if named:  # else the targets are unknown
        _check_targets(document, module, targets)
        _check_required(document, module, targets, shared, own)
    if document.wrong:
        raise RecipeError(*document.wrong)
    _warn(document, module, [shared, *own.values()])
    return MergeFile(
        method=str(method),
        name=name,
        base=base if module.BASE else None,
        targets=[target.reference for target in targets],
        donor=base or inputs[0].reference,
        dtype=dtypes[0] or dtypes[1],
        granularity=granularity,
        source=source,
        conditions=conditions,
        _document=document,
        _parameters=module.PARAMETERS,
        _shared=shared,
        _own=[own[target.place] for target in targets],
    )


def _document(config: Mapping[str, Any] | str | Path) -> Document:
    if isinstance(config, Mapping):
        return of_mapping(config, "merge")
    if not isinstance(config, str | os.PathLike):
        raise RecipeError(f"merge: {_WHAT} is a mapping of keys, not {kind(config)}")
    path = Path(config)
    text = read_text(path)
    line = second_document(text)
    if line is not None:
        raise RecipeError(f"{path}:{line}: a second document begins here; {_WHAT} is a file of its own")
    return parse(text, path, what=_WHAT)


def _name(document: Document) -> str | None:
    name = document.content.get("name")
    if name is None or (isinstance(name, str) and name.strip() and "\n" not in name.strip()):
        return name.strip() if name else None
    document.complain(("name",), f"should be one line of text, not {shown(name)}")
    return None


def _method(document: Document) -> str | None:
    method, names = document.content.get("merge_method"), method_names()
    if isinstance(method, str) and method in names:
        return method
    known = f"; known here: {', '.join(names)}"
    if method is None:
        what = "is missing" + known
    elif not isinstance(method, str):
        what = f"should be the name of a method, not {shown(method)}{known}"
    elif method in mergekit_names.METHODS:
        what = f"{method} is a method of mergekit that is not here{known}"
    else:
        hint = suggestion(method.lower(), names)
        what = f"no such method as {method!r}{known}{hint if hint != known else ''}"
    document.complain(("merge_method",), what)
    return None


def _check_keys(document: Document, module: Method | None) -> None:
    parameters = {*mergekit_names.PARAMETERS, *(_known(module) if module else ())}
    for key, value in document.content.items():
        if key in mergekit_names.KEYS:
            continue
        if key in mergekit_names.UNSUPPORTED:
            if value is not None:
                document.complain((key,), mergekit_names.UNSUPPORTED[key])
        elif key in parameters:
            document.complain((key,), "belongs under parameters")
        else:
            document.complain((key,), "unknown key" + suggestion(key, mergekit_names.KEYS))


def _known(module: Method) -> list[str]:
    """The names that the method reads in `parameters`."""
    names = [parameter.name for parameter in module.PARAMETERS]
    return [*names, "granularity"] if _granularities(module) else names


def _granularities(module: Method) -> tuple[str, ...]:
    """The method's granularities, the default first; most methods work on single tensors only."""
    return getattr(module, "GRANULARITIES", ())


def _granularity(document: Document, module: Method, raw: dict[str, Any]) -> str:
    """Takes `granularity` out of the file's parameters."""
    known = _granularities(module)
    if not known:
        return "tensor"
    granularity = raw.pop("granularity", known[0])
    if granularity not in known:
        document.complain(("parameters", "granularity"), f"should be {_either(known)}, not {shown(granularity)}")
    return str(granularity)


def _dtype(document: Document, key: str) -> str | None:
    dtype = document.content.get(key)
    plain = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if plain is not None and plain not in _DTYPES:
        document.complain((key,), f"should be {_either(_DTYPES)}, not {shown(dtype)}")
    return plain


def _either(words: tuple[str, ...]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1]))


def _scope(document: Document, module: Method, place: Place, raw: dict[str, Any]) -> Scope:
    scope = Scope(place)
    shared = place == ("parameters",)
    readable = {parameter.name: parameter for parameter in module.PARAMETERS}
    for name, value in raw.items():
        if name in readable and (shared or readable[name].per_model):
            scope.settings[name], wrong = read_setting(value, readable[name])
            for where, what in wrong:
                document.complain((*place, name, *where), what)
        elif name in readable or name in mergekit_names.PARAMETERS:
            scope.unread.append(name)
        else:
            document.complain((*place, name), "unknown parameter" + suggestion(name, _known(module)))
    return scope


def _check_targets(document: Document, module: Method, targets: list[Input]) -> None:
    method = document.content["merge_method"]
    if module.BASE and document.content.get("base_model") is None:
        document.complain(("base_model",), f"is missing: {method} works on updates from a base model")
    elif not targets:
        document.complain(("models",), "none is left to merge but the base model")
    elif module.TARGETS not in (None, len(targets)):
        document.complain(
            ("models",), f"{method} takes {module.TARGETS} in addition to the base model, not {len(targets)}"
        )


def _check_required(
    document: Document, module: Method, targets: list[Input], shared: Scope, own: dict[Place, Scope]
) -> None:
    method = document.content["merge_method"]
    for parameter in module.PARAMETERS:
        name = parameter.name
        if not parameter.required or name in shared.settings:
            continue
        if not parameter.per_model:
            document.complain(("parameters", name), f"is missing: {method} has no default for it")
            continue
        for target in targets:
            if name not in own[target.place].settings:
                what = f"{target.reference} has no {name}, for which {method} has no default"
                also = "; merged by this method too, it should stand among the models"
                document.complain(target.place, what + also * (target.place == ("base_model",)))


def _warn(document: Document, module: Method, scopes: list[Scope]) -> None:
    """Logs a line for each name that is not read, at its first place."""
    method = document.content["merge_method"]
    warned = set(mergekit_names.SILENT)
    for scope in scopes:
        for name in scope.unread:
            if name not in warned:
                one = name in _known(module)
                why = "is one for all models, and not read here" if one else f"is not read by {method}"
                log.warning("%s", document.at((*scope.place, name), f"{why}; ignored"))
            warned.add(name)
