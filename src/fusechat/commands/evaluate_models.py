"""`fusechat eval`: runs one suite on given models, or those of a run, and stores the results.

    ROOT/<suite>/…             answers, judgements and records.json of the suite; existing answers are not asked again
    ROOT/results.json          the records of all suites; for a run also its own, and its report is written again

ROOT is WORKDIR/evaluate for the models of a run, else the directory of --out.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fusechat.commands.run import lock
from fusechat.data.conversations import Conversation, DataSet, Malformed, read_conversations
from fusechat.data.prepared import Prepared
from fusechat.errors import DataError, FuseChatError, ModelError, RecipeError, StorageError, WorkdirError, storage_error
from fusechat.evaluate.answers import Answering
from fusechat.evaluate.records import RESULTS, About, Measurement, Record, gather, keep, records, write_results
from fusechat.evaluate.subjects import Subject, check_labels, parse_model
from fusechat.models.chat_model import ChatModel
from fusechat.models.client import MODEL_KEY, check_url
from fusechat.models.tokenise import RejectedError, prepare_conversation
from fusechat.pipeline import build_steps, run_models, targets_of
from fusechat.recipe.pinned import recipe_of
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.files import write_json
from fusechat.run.lock import exclusive_lock
from fusechat.run.manifests import versions
from fusechat.run.progress import log
from fusechat.run.steps import MANIFEST, STARTED, Step

Measured = Mapping[str, Sequence[Measurement]]
_LIBRARIES = {"alpaca-eval": ("alpaca-eval",), "harness": ("lm-eval",), "mt-bench": ("openai",)}


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and where results go. `pivot`: the label of the model that others are compared with."""

    suite: str
    subjects: tuple[Subject, ...]
    root: Path
    out: Path
    pivot: str | None
    recipe: Recipe | None = None
    workdir: Path | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def directory(self) -> Path:
        """The suite's directory."""
        return self.root / self.suite

    @property
    def title(self) -> str:
        """The title of its table."""
        return self.recipe.name if self.recipe is not None else self.suite

    @property
    def sft(self) -> str | None:
        """The label of the run's target of plain fine-tuning, if measured."""
        target = self.recipe.sft_target() if self.recipe is not None else None
        return next((one.label for one in self.subjects if target and one.name == f"target-{target}"), None)

    def label_of(self, name: str) -> str:
        """The label in tables of a run's model, such as `pivot` or `fused`; other names are labels already."""
        return next((subject.label for subject in self.subjects if name in (subject.name, subject.shown)), name)

    def answering(self, **how: Any) -> Answering:
        """How its models answer; answers are stored with the suite's other files."""
        return Answering(self.directory, **how)


@contextmanager
def evaluation(
    suite: str,
    models: Sequence[str],
    *,
    workdir: Path | None,
    out: Path | None,
    needs_models: bool = True,
    chat_template: str | None = None,
) -> Iterator[Evaluation]:
    """Locks the directory of the results while the suite runs. Without `models`, those of the run. `chat_template`: for given
    models, the name of one of their own or a file. Raises RecipeError, ModelError or WorkdirError."""
    if workdir is not None and out is not None:
        raise RecipeError("--out: the results of a run are kept in its --workdir; give one of the two")
    if workdir is not None and chat_template is not None:
        raise RecipeError("--chat-template: the recipe says which templates the models of a run have")
    with _told("--out" if workdir is None else "--workdir"), ExitStack() as held:
        if workdir is None:
            if not models and needs_models:
                raise RecipeError("names no MODEL: give some, or the --workdir of a run")
            subjects = [parse_model(text, chat_template) for text in models]
            check_labels(subjects)
            file = out or Path("evaluate") / RESULTS
            if file.is_dir():
                raise RecipeError(f"--out {file}: is a directory; name a file in it, such as {file / RESULTS}")
            _make(file)
            held.enter_context(exclusive_lock(file.parent / ".lock", file.parent, remove=True))
            pivot = subjects[0].label if subjects else None
            found = Evaluation(suite, tuple(subjects), file.parent, file, pivot)
        else:
            recipe = recipe_of(workdir)
            held.enter_context(lock(recipe, workdir))
            subjects = _of_run(recipe, workdir, models)
            root = workdir / "evaluate"
            pivot = next((subject.label for subject in subjects if subject.role == PIVOT), None)
            found = Evaluation(suite, tuple(subjects), root, root / RESULTS, pivot, recipe, workdir)
        for subject in found.subjects:
            if subject.server is not None:
                check_url(subject.server.url, subject.label, MODEL_KEY)
        found.directory.mkdir(parents=True, exist_ok=True)
        write_json(found.directory / STARTED, {"suite": suite})  # a run then keeps the directory
        yield found


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Names the option in errors of the disk."""
    try:
        yield
    except FuseChatError:
        raise
    except Exception as error:
        line = storage_error(error, place=place)
        if line is None:
            raise
        raise StorageError(line) from error


def resolved(dtype: str | None, device: str | None) -> dict[str, str]:
    """The dtype and the device with defaults filled in. Raises ModelError."""
    from fusechat.models.load import choose_device, default_dtype

    place = choose_device(device)
    return {"dtype": dtype or default_dtype(place), "device": str(place)}


def finish(evaluated: Evaluation, measured: Measured, settings: Mapping[str, Any]) -> list[Record]:
    """Writes the records, the results, and a run's report; returns the records of these models."""
    used = versions(*_LIBRARIES.get(evaluated.suite, ()))
    models = {one.label: About(one.role, one.shown or one.label, one.identity) for one in evaluated.subjects}
    how: dict[str, Any] = {"models": models, "pivot": evaluated.pivot, "sft": evaluated.sft}
    new = records(evaluated.suite, measured, settings=settings, versions=used, **how)
    keep(evaluated.directory, new)
    timings = {"seconds": round(time.monotonic() - evaluated.began, 3)}
    manifest = {"stage": "evaluate", "name": evaluated.suite, "versions": used, "timings": timings}
    write_json(evaluated.directory / MANIFEST, manifest)
    (evaluated.directory / STARTED).unlink(missing_ok=True)
    if evaluated.workdir is None or evaluated.recipe is None:
        write_results(evaluated.out, gather(evaluated.root))
    else:
        _write_again(evaluated.recipe, evaluated.workdir)
    return new


def _make(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out {file}: its directory cannot be made ({error.strerror})") from error


def _of_run(recipe: Recipe, workdir: Path, names: Sequence[str]) -> list[Subject]:
    """Models of a run by name (default: all), and others by reference or server."""
    steps = build_steps(recipe, workdir)
    targets = targets_of(steps)
    merged = next(step for step in steps if step.stage == "merge")
    models = {model.name: model for model in run_models(recipe, targets, merged)}
    labels = [model.label for model in models.values()]
    subjects = []
    for name in names or models:
        model = models.get(name)
        if model is None:
            try:
                subjects.append(parse_model(name))
            except FuseChatError as error:
                raise type(error)(f"{error}; the run has {', '.join(models)}") from error
            continue
        if model.made_by is not None:
            _refuse_unfinished(model.made_by, workdir)
        label = model.label if labels.count(model.label) == 1 else f"{model.label} ({model.role})"
        chat_model = replace(model.chat_model, name=label)
        subjects.append(Subject(model.role, label, chat_model, shown=model.label, name=name))
    if any(subject.role for subject in subjects) and not any(subject.role == PIVOT for subject in subjects):
        log.info("the pivot is measured as well: the others are compared with it")
        return _of_run(recipe, workdir, [PIVOT, *names])
    check_labels(subjects)
    return subjects


def _refuse_unfinished(step: Step, workdir: Path) -> None:
    state, why = step.state()
    if state != "done":
        raise WorkdirError(f"{workdir}: not finished: {step.label} is {state} ({why}); run the recipe first")


def _write_again(recipe: Recipe, workdir: Path) -> None:
    """Writes results.json and the report of a run again, if all of their inputs exist."""
    *before, page = build_steps(recipe, workdir)
    results = next(step for step in before if step.name == "results")
    waiting = next((step for step in before if step is not results and not step.finished), None)
    if waiting is not None:
        log.info("%s is not done: the run's results.json and report will have this when it is", waiting.label)
        return
    results.run()
    page.run()


def bits_per_byte(
    subjects: Sequence[Subject],
    *,
    data: str,
    limit: int | None,
    max_length: int,
    on_error: str,
    dtype: str,
    device: str | None,
    batch_tokens: int,
) -> tuple[Measured, dict[str, Any]]:
    """Bits per byte of responses in a file of conversations that every model can use, and the settings. Raises DataError."""
    from fusechat.evaluate.bits_per_byte import Responses, compare, score_responses
    from fusechat.models.load import choose_device
    from fusechat.run.progress import progress

    held_out = DataSet(Path(data).name, data, on_error)
    conversations = list(islice(_usable(held_out), limit))
    found: dict[str, Responses] = {}
    chat_models = [subject.local("bits-per-byte") for subject in subjects]
    for subject, chat_model in zip(subjects, chat_models, strict=True):
        prepared = _prepared(conversations, chat_model, max_length=max_length)
        model = chat_model.model(dtype=dtype, device=choose_device(device))
        with progress(f"bits per byte of {subject.label}", len(prepared), "conversations") as advance:
            how: dict[str, Any] = {"batch_tokens": batch_tokens, "name": subject.label}
            found[subject.label] = score_responses(model, prepared, advance=advance, **how)
        del model
    wanted = sum(len(conversation.responses) for conversation in conversations)
    measured = {}
    for label, score in compare(found).items():
        measured[label] = [replace(score, missing=wanted - score.responses).measurement(held_out.name)]
    settings = {"dtype": dtype, "batch_tokens": batch_tokens, "max_length": max_length, "limit": limit}
    return measured, {**settings, "data": held_out.identity()}


def _usable(data: DataSet) -> Iterator[Conversation]:
    """Conversations with a response, each once."""
    seen = set()
    for record in read_conversations(data):
        if isinstance(record, Malformed):
            if data.on_error == "stop":
                raise DataError(f"{record.where}: {record.reason}; or leave such lines out by --on-error skip")
            log.warning("%s: left out: %s", record.where, record.reason)
        elif record.responses and record.id not in seen:
            seen.add(record.id)
            yield record


def _prepared(conversations: Sequence[Conversation], chat_model: ChatModel, *, max_length: int) -> list[Prepared]:
    """The conversations that a model can use, prepared; others are logged, and left out for all models."""
    from fusechat.models.load import without_embedding

    template, rows = chat_model.template(), chat_model.vocabulary_size()
    found, lost = [], []
    for conversation in conversations:
        try:
            one = prepare_conversation(conversation, template, max_length=max_length)[0]
        except RejectedError as error:
            lost.append(str(error))
            continue
        wrong = without_embedding([int(one.input_ids.max())], rows, template.tokenizer)
        if wrong:
            raise ModelError(f"{chat_model.name}: {conversation.where} has {wrong}")
        found.append(one)
    if lost:
        log.warning("%s cannot use %d of %d conversations: %s", chat_model.name, len(lost), len(conversations), lost[0])
    return found
