"""Fixes what a recipe leaves open once for a work directory, for all later processes: commits of hub ids, and `auto`."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from fusechat.data.conversations import DataSet
from fusechat.errors import WorkdirError
from fusechat.models.reference import COMMIT
from fusechat.models.resolve import current_commit, newest_commit
from fusechat.recipe.load import raw_recipe, read_recipe
from fusechat.recipe.precision import Place, value_at
from fusechat.recipe.schema import Recipe
from fusechat.recipe.sections import DataPath, ModelSpec
from fusechat.run.integrity import read_checked
from fusechat.run.manifests import MANIFEST
from fusechat.run.progress import log

RECIPE = "recipe.yaml"
_IDENTITY = re.compile(rf"hub:(?P<asked>\S+)@(?P<commit>{COMMIT})( .*)?")
T = TypeVar("T")
Asked = tuple[str, str]  # `model` or `dataset`, and the recipe's hub id


def pin(recipe: Recipe, workdir: Path, *, begin: bool = False, automatic: bool = True) -> Recipe:
    """The recipe with the work directory's commits and its values of `auto`. `begin`: also fixes new ones, and logs what this
    machine or the hub would choose differently today. `automatic`: fix `auto` too."""
    saved = raw_recipe(workdir / RECIPE) if (workdir / RECIPE).is_file() else {}
    known = _commits_of(workdir, saved)
    for place in recipe.automatic if automatic else ():
        recipe = _as_it_was(recipe, place, value_at(saved, place), tell=begin)

    @cache
    def commit(kind: str, asked: str) -> str | None:
        found = known.get((kind, asked))
        if found is None:
            return current_commit(kind, asked) if begin else None
        if begin:
            _tell_of_newer(kind, asked, found)
        return found

    def pinned(spec: Any, place: Place) -> Any:
        """A model or data set; of the hub's, with its commit: the one that is written for it, else that of its id."""
        kind, asked = _asked(spec)
        if kind is None:
            return spec
        there = value_at(saved, place)
        own = (
            there.get("commit")
            if isinstance(there, dict) and asked in (there.get("model"), there.get("path"))
            else None
        )
        found = commit(kind, asked)
        return spec.model_copy(update={"commit": own or found})

    return _each(recipe, pinned)


def with_dtype(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe with `dtype` for `auto`."""
    for place in recipe.automatic:
        recipe = _put(recipe, place, dtype == "bfloat16" if place[-1] == "bf16" else dtype)
    return recipe


def recipe_of(workdir: Path) -> Recipe:
    """The recipe of a run, as it ran. Raises WorkdirError if there is none."""
    return pin(read_recipe(recipe_file(workdir)), workdir)


def recipe_file(workdir: Path) -> Path:
    """The path of a run's recipe. Raises WorkdirError if the directory is not a run's."""
    if not (workdir / RECIPE).is_file():
        raise WorkdirError(f"{workdir}: no work directory of FuseChat (it has no {RECIPE})")
    return workdir / RECIPE


def _asked(spec: Any) -> tuple[str | None, str]:
    """`model` or `dataset` and its hub id, for one without a commit; None for everything else."""
    if isinstance(spec, ModelSpec) and spec.model is not None and spec.reference.is_hub and spec.commit is None:
        return "model", str(spec.model)
    if isinstance(spec, DataPath) and DataSet("", spec.path).is_hub and spec.commit is None:
        return "dataset", spec.path
    return None, ""


def _each(part: T, change: Callable[[Any, Place], Any], place: Place = ()) -> T:
    """A section with `change(section, place)` applied to every section in it."""
    found: Any = part
    if isinstance(part, dict):
        found = {key: _each(value, change, (*place, key)) for key, value in part.items()}
    elif isinstance(part, list):
        found = [_each(value, change, (*place, str(number))) for number, value in enumerate(part)]
    elif isinstance(part, BaseModel):
        inner = {name: _each(getattr(part, name), change, (*place, name)) for name in type(part).model_fields}
        found = change(part.model_copy(update=inner), place)
    return found


def _as_it_was(recipe: Recipe, place: tuple[str, ...], before: Any, *, tell: bool) -> Recipe:
    now = value_at(recipe.model_dump(), place)
    if before is None or before == now:
        return recipe
    if tell:
        said = f"%s: auto is {before} in this work directory, as its recipe.yaml says; this machine would take {now}"
        log.warning(said, ".".join(place))
    return _put(recipe, place, before)


def _put(part: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    name, *rest = place
    if isinstance(part, dict):
        return {**part, name: _put(part[name], tuple(rest), value)}
    return part.model_copy(update={name: _put(getattr(part, name), tuple(rest), value)})


def _commits_of(workdir: Path, saved: Any) -> dict[Asked, str]:
    """The commits of hub ids in a work directory: from its recipe, or from manifests if an older version wrote that."""
    found = dict(_written(saved))
    if saved and not found:
        files = sorted(workdir.glob(f"*/**/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
        for manifest in map(read_checked, files):
            settings = ((manifest or {}).get("inputs") or {}).get("settings", {})
            for key, kind in (("model", "model"), ("pivot", "model"), ("data", "dataset")):
                known = _IDENTITY.fullmatch(str(settings.get(key)))
                if known:
                    found[kind, known["asked"]] = known["commit"]
    return found


def _written(part: Any) -> Iterator[tuple[Asked, str]]:
    """The hub ids of a raw recipe, with their commits."""
    if isinstance(part, dict):
        for key, kind in (("model", "model"), ("path", "dataset")):
            if key in part and "commit" in part:
                yield (kind, str(part[key])), str(part["commit"])
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _written(inner)


def _tell_of_newer(kind: str, asked: str, commit: str) -> None:
    newest = newest_commit(kind, asked)
    if newest not in (None, commit):
        log.warning(
            "%s: the hub has a newer commit than the one that this work directory continues with (%s); to take it, give it "
            "commit: %s in the recipe",
            *(asked, commit, newest),
        )
