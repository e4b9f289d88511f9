"""The Python interface: what `import fusechat` offers. See docs/python.md.

Mistakes raise FuseChatError. Nothing here ends the process or leaves it changed: environment variables, Transformers' settings
and random states are restored. Log lines are shown unless the program has logging of its own.
"""

import copy
import io
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusechat import pipeline
from fusechat.errors import DataError, ModelError, RecipeError, WorkdirError, naming_storage
from fusechat.recipe.schema import Recipe
from fusechat.run.progress import setup_logging_once
from fusechat.run.steps import Step
from fusechat.show.passages import Token, TokenView, spans_of

PathLike = str | os.PathLike[str]
RecipeLike = Recipe | Mapping[str, Any] | PathLike
Record = dict[str, Any]


@contextmanager
def _as_guest(place: Path | None = None) -> Iterator[None]:
    """Restores the state of the caller's process on exit. `place`: where files are written, for errors that do not name theirs."""
    import torch
    from transformers.utils import logging

    setup_logging_once()
    environment, verbosity, bars = dict(os.environ), logging.get_verbosity(), logging.is_progress_bar_enabled()
    numbers, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), naming_storage(place or Path()):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def load_recipe(recipe: Mapping[str, Any] | PathLike, /, **sections: Any) -> Recipe:
    """Reads and checks a recipe from a YAML file, or from a mapping with the same keys.

    `sections`: changes by key; mappings are merged key by key, so `fuse={"sft_weight": 1.0}` keeps the other keys of `fuse`.
    Relative paths in a file start at its directory, those in a mapping and in `sections` at the working directory. Raises
    RecipeError with one line for each mistake.
    """
    if isinstance(recipe, Mapping):
        return pipeline.load_recipe(recipe, changes=sections)
    return pipeline.load_recipe(_path("recipe", recipe), changes=sections)


@dataclass(frozen=True)
class Run:
    """A work directory, and the recipe that ran in it, with all defaults. `run_recipe` returns it."""

    workdir: Path
    recipe: Recipe = field(repr=False)

    @property
    def model_path(self) -> Path:
        """The directory of the fused model, in Hugging Face's format. Raises WorkdirError if the merge is not done."""
        return self._finished("merge") / "model"

    @property
    def results(self) -> list[Record]:
        """One record for each model, data set and metric of `evaluate/results.json`, including what `fusechat eval` added.

        Nested keys are joined by dots (`settings.dtype`), so that `pandas.DataFrame(run.results)` has a column for each. The
        list is empty if the recipe evaluates nothing. Raises WorkdirError if the evaluation is not done.
        """
        from fusechat.evaluate.records import RESULTS
        from fusechat.run.files import read_json

        if not any(step.label == _RESULTS for step in self._steps()):
            return []
        return [_flat(record) for record in read_json(self._finished(_RESULTS) / RESULTS)["scores"]]

    def load(self, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
        """Loads the fused model, in evaluation mode, and its tokenizer with Transformers.

        `device` defaults to the recipe's. `dtype` is float32, bfloat16 or float16; it defaults to bfloat16 on a GPU and to
        float32 elsewhere. Raises WorkdirError if the merge is not done, ModelError for an unavailable device, RecipeError for a
        bad `dtype`.
        """
        from fusechat.models.load import DTYPES, choose_device, default_dtype, load_model
        from fusechat.models.tokenizer import load_tokenizer

        if dtype is not None and dtype not in DTYPES:
            raise RecipeError(f"dtype: should be one of {', '.join(DTYPES)}, not {dtype!r}")
        trust = self.recipe.pivot.reference.trust_remote_code
        with _as_guest(self.workdir):
            directory, place = self.model_path, choose_device(device or self.recipe.device)
            model = load_model(directory, dtype=dtype or default_dtype(place), device=place, trust_remote_code=trust)
            return model, copy.deepcopy(load_tokenizer(directory, trust_remote_code=trust))

    def _steps(self) -> list[Step]:
        return pipeline.build_steps(self.recipe, self.workdir)

    def _finished(self, label: str) -> Path:
        step = next(step for step in self._steps() if step.label == label)
        if not step.finished:
            state, why = step.state()
            raise WorkdirError(f"{self.workdir}: {label} is {state} ({why}); run the recipe without until and only")
        return step.directory


_RESULTS = "evaluate results"


def _flat(record: Mapping[str, Any], above: str = "") -> Record:
    found: Record = {}
    for key, value in record.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def run_recipe(
    recipe: RecipeLike, workdir: PathLike | None = None, *, until: str | None = None, only: str | None = None
) -> Run:
    """Runs the steps of a recipe that are not done yet in `workdir` (default `runs/NAME`). Call it again to resume.

    `recipe`: a Recipe, or what `load_recipe` takes. `until`: the last stage to run (generate, prepare, capture, align, fuse,
    merge, evaluate, report). `only`: a source or target; runs its own branch, without the merge. Raises FuseChatError.
    """
    from fusechat.commands.run import run
    from fusechat.recipe.pinned import recipe_of

    loaded = _recipe(recipe)
    place = _workdir(loaded, workdir)
    with _as_guest(place):
        run(loaded, place, until=until, only=only)
        return Run(place, recipe_of(place))


def plan_recipe(
    recipe: RecipeLike,
    workdir: PathLike | None = None,
    *,
    device: str | None = None,
    conversations: int | None = None,
) -> dict[str, Any]:
    """Predicts what a run takes, step by step, and what would fail in it, without reading weights: `fusechat plan --json`.

    `recipe`, `workdir`: as for `run_recipe`. `device`: this machine's, or a known one (`h100`, `8xh100`, …); default the
    recipe's. `conversations`: plan for this many, of the kind in the recipe's data. Returns sizes in bytes and times in seconds.
    `problems` lists what would end the run; it is returned, not raised. Raises FuseChatError for unreadable models or data.
    """
    from fusechat.plan.calibration import choose, dtype_on
    from fusechat.plan.command import make_plan
    from fusechat.plan.table import as_json
    from fusechat.recipe.pinned import pin, with_dtype

    loaded = _recipe(recipe)
    place = _workdir(loaded, workdir)
    if conversations is not None and conversations < 1:
        raise RecipeError(f"conversations: should be 1 or more, not {conversations}")
    with _as_guest(place):
        dtype = dtype_on(device)
        loaded = pin(with_dtype(loaded, dtype) if dtype else loaded, place, automatic=device is None)
        return as_json(make_plan(loaded, place, choose(device, loaded.device, place), conversations=conversations))


def merge_models(
    config: Mapping[str, Any] | PathLike,
    out: PathLike,
    *,
    allow_vocab_resize: bool = False,
    threads: int | None = None,
    shard_size: float = 5.0,
) -> dict[str, Any]:
    """Merges models in parameter space, as `fusechat merge` does, and writes a Hugging Face model directory to `out`.

    `config`: a file or mapping in mergekit's format. `allow_vocab_resize`: merge the rows that all vocabularies share.
    `threads`: default all cores. `shard_size`: the largest output file, in GB. Returns the content of `merge_report.json`. Call
    it again to resume. Raises FuseChatError.
    """
    from fusechat.merge.standalone import merge

    if threads is not None and threads < 1:
        raise RecipeError(f"threads: should be 1 or more, not {threads}")
    if not 0 < shard_size < 1e9:
        raise RecipeError(f"shard_size: should be a number of GB, more than 0, not {shard_size}")
    given = config if isinstance(config, Mapping) else _path("config", config)
    place = _path("out", out)
    options: dict[str, Any] = {"threads": threads, "shard_bytes": int(shard_size * 1e9)}
    with _as_guest(place):
        return merge(given, place, allow_vocab_resize=allow_vocab_resize, **options)


@dataclass(frozen=True, eq=False, repr=False)
class TextAlignment:
    """A text's tokens by two tokenizers, aligned. `print` draws it; a notebook cell that ends with it draws it in colours.

    `pivot_tokens`, `source_tokens`: the tokens as drawn. `…_ids`: int32 [n]. `…_spans`: int64 [n, 2], UTF-8 bytes `[begin,
    end)` of the text. `starts`: int64 [pivot tokens], the source token that starts at the same byte, or -1. `coverage`: the
    share of `starts` that are not -1; None for a text without tokens.
    """

    text: str
    pivot_tokens: list[str]
    source_tokens: list[str]
    pivot_ids: np.ndarray
    source_ids: np.ndarray
    pivot_spans: np.ndarray
    source_spans: np.ndarray
    starts: np.ndarray
    coverage: float | None
    _view: TokenView

    def __repr__(self) -> str:
        return self._drawn()

    def _repr_html_(self) -> str:
        return self._drawn(colours=True)

    def _drawn(self, *, colours: bool = False) -> str:
        from rich.console import Console

        from fusechat.show.terminal import print_drawing

        options: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False, "force_jupyter": False}
        console = Console(file=io.StringIO(), width=100, record=True, force_terminal=colours, **options)
        print_drawing(self._view, console)
        if not colours:
            return console.export_text().rstrip("\n")
        return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>')


def align_text(pivot_tokenizer: Any, source_tokenizer: Any, text: str) -> TextAlignment:
    """Aligns two tokenizers' tokens of a text by bytes, as `fusechat tokens` draws it.

    A tokenizer is a fast tokenizer of Transformers, a model (directory, hub id, `.gguf` file) or a `tokenizer.json`. Raises
    ModelError for a tokenizer that cannot be loaded or is slow, DataError if `text` is not a string.
    """
    from fusechat.show.tokens import load, of_tokenizers

    if not isinstance(text, str):
        raise DataError(f"text: should be text, not {type(text).__name__}")
    named = []
    with _as_guest():
        for role, tokenizer in (("pivot_tokenizer", pivot_tokenizer), ("source_tokenizer", source_tokenizer)):
            if isinstance(tokenizer, str | os.PathLike):
                named.append((os.fspath(tokenizer), load(os.fspath(tokenizer))))
            elif hasattr(tokenizer, "name_or_path"):
                named.append((tokenizer.name_or_path or role, tokenizer))
            else:
                what = type(tokenizer).__name__
                raise ModelError(f"{role}: should be a tokenizer of Transformers or the name of a model, not {what}")
        view = of_tokenizers(named[0], named[1], text)
    (passage,) = view.passages
    return TextAlignment(
        text,
        pivot_tokens=_texts(passage.pivot),
        source_tokens=_texts(passage.source),
        pivot_ids=np.array([token.id for token in passage.pivot], dtype=np.int32),
        source_ids=np.array([token.id for token in passage.source], dtype=np.int32),
        pivot_spans=spans_of(passage.pivot),
        source_spans=spans_of(passage.source),
        starts=np.array(passage.partner, dtype=np.int64),
        coverage=view.coverage,
        _view=view,
    )


def _texts(tokens: Sequence[Token]) -> list[str]:
    return ["".join(glyph.text for glyph in token.glyphs) for token in tokens]


def _recipe(recipe: RecipeLike) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _workdir(recipe: Recipe, workdir: PathLike | None) -> Path:
    return Path("runs") / recipe.name if workdir is None else _path("workdir", workdir)


def _path(name: str, given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise RecipeError(f"{name}: should be a path, not {type(given).__name__}")
    return Path(given).expanduser()
