"""The work, a job at a time: each is done once and kept in a directory named by all that it rests on.

models/KEY/NAME/       a chat LLM, schooled            measures/KEY-QUESTIONS-last.json   what a model can do
data/KEY.jsonl         training conversations          tunings/KEY/                  a fine-tuned pivot
bases/KEY/             work directory up to `align`    merges/KEY/                   a merged model
answers/KEY/           work directory up to `generate`, where sources answer
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusechat.run.files import digest_json, write_json
from miniature import corpus, settings
from miniature.chatters import CHATTERS, PIVOT
from miniature.settings import SFT, Changes

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Place:
    """`root`: where everything is kept. `steps`: of schooling, instead of what each model has. `questions`: of each skill."""

    root: Path
    steps: int | None = None
    questions: int = 100

    def key(self, *parts: Any) -> str:
        return digest_json([FORMAT, self.steps, repr(CHATTERS), *parts])[:16]

    @property
    def models(self) -> Path:
        return self.root / "models" / self.key()

    def measures(self, key: str) -> Path:
        return self.root / "measures" / f"{key}-{self.questions}-last.json"


FORMAT = 1  # another number makes everything anew


@dataclass(frozen=True)
class School:
    name: str

    def key(self, place: Place) -> str:
        return place.key("schooled", self.name)

    def model(self, place: Place) -> Path:
        return place.models / self.name

    def done(self, place: Place) -> bool:
        return self.model(place).is_dir()

    def needs(self) -> "list[Job]":
        further = CHATTERS[self.name].further
        return [] if further is None else [School(further)]

    def run(self, place: Place) -> None:
        from miniature.schooling import school

        with finished(self.model(place)) as directory:
            school(self.name, directory, place.models, steps=place.steps)


@dataclass(frozen=True)
class Answers:
    """The questions of the conversations, answered by every source, and all answers scored by every model."""

    changes: Changes = field(hash=False)
    seed: int

    @property
    def base(self) -> "Base":
        return Base(settings.answering(self.changes), self.seed)

    def key(self, place: Place) -> str:
        return place.key("answers", self.base.key(place))

    def directory(self, place: Place) -> Path:
        return place.root / "answers" / self.key(place)

    def done(self, place: Place) -> bool:
        return self.directory(place).is_dir()

    def needs(self) -> "list[Job]":
        return schools(self.changes)

    def run(self, place: Place) -> None:
        with finished(self.directory(place)) as directory:
            _run(self.base.recipe(place), directory, until="generate")


@dataclass(frozen=True)
class Base:
    """Conversations, and what every source has to say about them in the pivot's tokens. With `generate`, conversations with the
    answers that are chosen."""

    changes: Changes = field(hash=False)
    seed: int

    @property
    def answers(self) -> Answers | None:
        return Answers(self.changes, self.seed) if "generate" in self.changes else None

    def key(self, place: Place) -> str:
        whole = settings.recipe(self.changes, seed=0, models=Path("models"), train=Path("train"))
        rests_on = [whole.get(section) for section in ("sources", "capture", "align", "generate")]
        return place.key("base", rests_on, settings.conversations(self.changes), self.seed)

    def directory(self, place: Place) -> Path:
        return place.root / "bases" / self.key(place)

    def train(self, place: Place) -> Path:
        asked = settings.conversations(self.changes)
        path = place.root / "data" / f"{place.key('data', asked, self.seed)}.jsonl"
        if not path.is_file():
            partial = path.with_suffix(f".{os.getpid()}")
            corpus.write(partial, corpus.lesson(self.seed, **asked))
            partial.rename(path)
        return path

    def recipe(self, place: Place) -> dict[str, Any]:
        return settings.recipe(self.changes, seed=self.seed, models=place.models, train=self.train(place))

    def done(self, place: Place) -> bool:
        return self.directory(place).is_dir()

    def needs(self) -> "list[Job]":
        return schools(self.changes) if self.answers is None else [self.answers]

    def run(self, place: Place) -> None:
        with finished(self.directory(place)) as directory:
            if self.answers is not None:
                _linked(self.answers.directory(place), directory)
            _run(self.recipe(place), directory, until="align")


@dataclass(frozen=True)
class Tuning:
    """A fine-tuned copy of the pivot: taught by the source that `target` names, by `all` of them, or `sft` by none."""

    target: str
    changes: Changes = field(hash=False)
    seed: int

    @property
    def base(self) -> Base:
        return Base(self.changes, self.seed)

    @property
    def on_file(self) -> bool:
        """Whether it is plain fine-tuning on conversations that stand in a file."""
        return self.target == SFT and "generate" not in self.changes

    def key(self, place: Place) -> str:
        whole = settings.recipe(self.changes, seed=self.seed, models=Path("models"), train=Path("train"))
        if self.target == SFT:  # whatever the sources say, where they do not answer
            fuse = whole["fuse"]["training"]
            read = settings.conversations(self.changes) if self.on_file else self.base.key(place)
            return place.key("sft", fuse, read, self.seed, self.changes.get("order"))
        return place.key("tuning", self.target, whole["fuse"], self.base.key(place))

    def model(self, place: Place) -> Path:
        return place.root / "tunings" / self.key(place) / "model"

    def done(self, place: Place) -> bool:
        return self.model(place).is_dir()

    def needs(self) -> "list[Job]":
        return [School(PIVOT)] if self.on_file else [self.base]

    def run(self, place: Place) -> None:
        with finished(self.model(place).parent) as directory:
            work = directory / "work"
            if not self.on_file:
                _linked(self.base.directory(place), work)
            # A recipe has a source.
            taught = {**self.changes, "sources": [PIVOT]} if self.on_file else self.changes
            recipe = Base(taught, self.seed).recipe(place)
            recipe["seed"] = self.changes.get("order", self.seed)
            _run(recipe, work, until="fuse", only=self.target)
            fused = work / "fuse" / self.target
            for name in ("model", "manifest.json", "losses.jsonl"):
                shutil.move(fused / name, directory / name)
            shutil.rmtree(work)


@dataclass(frozen=True)
class Merged:
    """Tunings as one model, by the parameters of a method of `fusechat merge`."""

    tunings: tuple[Tuning, ...]
    config: dict[str, Any] = field(hash=False)

    def key(self, place: Place) -> str:
        return place.key("merged", [tuning.key(place) for tuning in self.tunings], self.config)

    def done(self, place: Place) -> bool:
        return measured(place, self.key(place)) is not None

    def needs(self) -> "list[Job]":
        return list(self.tunings)

    def run(self, place: Place) -> None:
        from miniature.merging import merge

        place_of = place.root / "merges" / self.key(place)
        with finished(place_of) as directory:
            merge(
                self.config,
                place.models / PIVOT,
                [tuning.model(place) for tuning in self.tunings],
                directory / "model",
            )
        measure(place, self.key(place), place_of / "model")
        shutil.rmtree(place_of)


@dataclass(frozen=True)
class Measured:
    """What a schooled or fine-tuned model can do."""

    of: School | Tuning

    def key(self, place: Place) -> str:
        return self.of.key(place)

    def done(self, place: Place) -> bool:
        return measured(place, self.key(place)) is not None

    def needs(self) -> "list[Job]":
        return [self.of]

    def run(self, place: Place) -> None:
        measure(place, self.key(place), self.of.model(place))


Job = School | Answers | Base | Tuning | Merged | Measured


def schools(changes: Changes) -> list[Job]:
    """The models that a recipe has."""
    return [School(name) for name in (PIVOT, *settings.sources(changes))]


def measured(place: Place, key: str) -> dict[str, Any] | None:
    """What a model of this key can do: split → skill → figures; None where it was not measured."""
    path = place.measures(key)
    return dict(json.loads(path.read_text())) if path.is_file() else None


def measure(place: Place, key: str, model: Path) -> None:
    from miniature.measure import measure as ask

    place.measures(key).parent.mkdir(parents=True, exist_ok=True)
    write_json(place.measures(key), {split: ask(model, split, place.questions) for split in SPLITS})


@contextmanager
def finished(directory: Path) -> Iterator[Path]:
    """A directory that has its name only once it is whole; what a killed job left is cleared away."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(directory)


def _linked(work: Path, copy: Path) -> None:
    """A work directory once more, to go on from; its files are the same ones, for nothing writes into a finished file."""
    shutil.copytree(work, copy, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"), dirs_exist_ok=True)


def _run(recipe: dict[str, Any], work: Path, **options: Any) -> None:
    """As `fusechat run` does it, in this process."""
    from fusechat.commands.run import run
    from fusechat.pipeline import load_recipe

    path = work.with_name(f"{work.name}.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run(load_recipe(path), work, **options)
    path.unlink()
