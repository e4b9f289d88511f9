"""Tasks of the Language Model Evaluation Harness, through `lm_eval` as a library: own chat template, every sample kept."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from fusechat.errors import FuseChatError, ModelError, RecipeError, first_line, storage_error
from fusechat.evaluate.records import ASKED, Measurement
from fusechat.evaluate.subjects import Subject
from fusechat.models.load import choose_device, padding
from fusechat.models.memory import free_memory, out_of_memory
from fusechat.models.saved_template import asking
from fusechat.run.extras import import_extra
from fusechat.run.files import digest, digest_json, read_json, write_json, write_text
from fusechat.run.progress import log

SUITE, SAMPLES, INTERRUPTED = "harness", "samples.jsonl", "measured.json"


def check_tasks(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's task manager. Raises RecipeError for a task that neither the harness nor the directory `include` has."""
    library = import_extra("lm_eval.tasks", "--tasks: lm_eval", "harness")
    if include is not None and not include.is_dir():
        raise RecipeError(f"--include {include}: no such directory")
    path = str(include) if include else None
    with _quietly():
        manager = library.TaskManager(include_path=path, include_defaults=False) if path else None
        if manager is None or any(task not in manager.all_tasks for task in tasks):  # its own are slow to list
            manager = library.TaskManager(include_path=path, include_defaults=True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        if include:
            _refuse_broken(include)
        where = f"the harness or {include}" if include else "the harness; --include DIR brings your own"
        raise RecipeError(f"--tasks {','.join(unknown)}: no such task in {where}")
    return manager


def _refuse_broken(include: Path) -> None:
    """The harness leaves out what is no YAML silently."""
    for file in sorted(include.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise RecipeError(f"{file}{line}: not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: not YAML: {first_line(error)}") from None


def run(
    subjects: Sequence[Subject],
    *,
    tasks: Sequence[str],
    manager: Any,
    include: Path | None,
    directory: Path,
    limit: int | None,
    few_shot: int | None,
    dtype: str,
    device: str,
    batch_size: int,
    seed: int,
) -> dict[str, list[Measurement]]:
    """Every task on every model, one model after the other; `directory`/<model>/samples.jsonl has a line for each sample, with what
    the model answered. An interrupted run continues with the same model. Raises RecipeError where a task cannot be run, with
    the harness's own words."""
    found = {}
    place = choose_device(device)
    chat_models = [subject.local(SUITE) for subject in subjects]
    for chat_model in chat_models:
        chat_model.template()  # one that has none, before hours go by with the others
    how: dict[str, Any] = {"tasks": list(tasks), "limit": limit, "few_shot": few_shot, "batch_size": batch_size}
    how |= {"dtype": dtype, "seed": seed}
    for subject, chat_model in zip(subjects, chat_models, strict=True):
        file, key = directory / subject.folder / INTERRUPTED, _key(subject, include, how)
        kept = _kept(file, key)
        if kept is not None:
            log.info("harness: %s was measured before the interruption", subject.label)
            found[subject.label] = kept
            continue
        log.info("harness: %s on %s", subject.label, ", ".join(tasks))
        with _quietly():
            results = _measure(chat_model, manager=manager, place=place, **how)
        write_text(directory / subject.folder / SAMPLES, "".join(_lines(results)))
        found[subject.label] = measurements(results)
        write_json(file, {"key": key, "measured": [asdict(one) for one in found[subject.label]]})
        free_memory()
    for subject in subjects:
        (directory / subject.folder / INTERRUPTED).unlink(missing_ok=True)
    return found


def _kept(file: Path, key: str) -> list[Measurement] | None:
    """What an interrupted run left."""
    try:
        kept = read_json(file)
        return [Measurement(**one) for one in kept["measured"]] if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(subject: Subject, include: Path | None, settings: Mapping[str, Any]) -> str:
    files = sorted(file for file in include.rglob("*") if file.is_file()) if include else []
    return digest_json([ASKED, subject.identity, {str(file): digest(file) for file in files}, dict(settings)])


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            kept = {key: value for key, value in sample.items() if not key.endswith("_hash")}
            yield json.dumps({"task": task, **kept}, ensure_ascii=False, default=str) + "\n"


def _measure(
    chat_model: Any,
    *,
    tasks: Sequence[str],
    manager: Any,
    limit: int | None,
    few_shot: int | None,
    dtype: str,
    place: Any,
    batch_size: int,
    seed: int,
) -> Mapping[str, Any]:
    from unittest.mock import patch

    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    template = chat_model.template()
    tokenizer = template.tokenizer
    own, pad = tokenizer.chat_template, tokenizer.pad_token
    asks = asking(template)
    if not asks.exact:
        log.warning("harness: %s: %s", chat_model.name, asks.note)
    tokenizer.chat_template = template.on_its_day(asks.template)
    if pad is not None:
        tokenizer.pad_token_id = padding(tokenizer, chat_model.vocabulary_size())
    try:
        model = HFLM(pretrained=chat_model.model(dtype=dtype, device=place), tokenizer=tokenizer, batch_size=batch_size)
        # It would ask git for the commit of the current directory, and git complains where there is none.
        with patch.object(evaluator, "get_git_commit_hash", return_value=None):
            results: Mapping[str, Any] = evaluator.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except FuseChatError:
        raise
    except Exception as error:  # of any kind: a task is a program with data of its own
        if out_of_memory(error):
            raise ModelError(
                f"{chat_model.name}: does not fit in memory with its batches; lower --batch-size"
            ) from error
        if storage_error(error):
            raise
        raise RecipeError(f"--tasks {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        tokenizer.chat_template, tokenizer.pad_token = own, pad
    return results


def measurements(results: Mapping[str, Any]) -> list[Measurement]:
    """What the harness found, in its own values and names: `exact_match,strict-match`. Samples give the items, so that two
    models are compared on the same ones."""
    found = []
    samples = results.get("samples", {})
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        counted = _counted(results, task)
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            items = _items(samples.get(task, ()), metric, kind)
            found.append(
                Measurement(
                    task,
                    name,
                    items if _is_mean(items, float(value)) else {},
                    0,
                    value=float(value),
                    why=None if math.isfinite(value) else "the harness found no finite value",
                    standard_error=float(error) if _is_number(error) else None,
                    higher_is_better=better.get(metric),
                    n=counted,
                )
            )
    return found


def _counted(results: Mapping[str, Any], task: str) -> int:
    """Documents of a task, or of all tasks of a group."""
    own = results.get("n-samples", {}).get(task)
    if own:
        return int(own["effective"])
    return sum(_counted(results, part) for part in results.get("group_subtasks", {}).get(task, ()))


def _items(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> dict[str, tuple[float, float]]:
    """Document → its value; none where a document has no number."""
    values = {str(one["doc_id"]): one.get(metric) for one in samples if one.get("filter", kind) == kind}
    if not all(_is_number(value) for value in values.values()):
        return {}
    return {key: (float(value), 1.0) for key, value in values.items()}  # type: ignore[arg-type]


def _is_mean(items: Mapping[str, tuple[float, float]], value: float) -> bool:
    """Whether the metric is the mean over documents; a perplexity is not, though every document has a number."""
    return bool(items) and math.isclose(sum(one for one, _ in items.values()) / len(items), value, abs_tol=1e-9)


def _is_number(value: Any) -> bool:
    """Python's or NumPy's, and finite; the harness writes "N/A" for what it does not know, and NaN for what cannot be."""
    return isinstance(value, Real) and math.isfinite(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """The harness sets up the root logger and talks a lot; what is wrong it raises, or says as an error."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    names = ("lm_eval", "datasets", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
