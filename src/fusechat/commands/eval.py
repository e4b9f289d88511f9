"""`fusechat eval SUITE MODEL…`: the command line of the suites. `evaluate_models.py` decides where results go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusechat.commands.options import (
    AsJson,
    BatchTokens,
    Changes,
    Concurrency,
    Device,
    Dtype,
    EstimateOnly,
    JudgeModel,
    JudgeUrl,
    Limit,
    Models,
    Out,
    RecipeFile,
    Seed,
    TemplateChoice,
    Timeout,
    WorkDir,
)
from fusechat.errors import RecipeError

measure = typer.Typer(no_args_is_help=True, help="Measure a model, or an alignment.")


@measure.command("mt-bench")
def mt_bench(
    models: Models = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    data: Annotated[Path | None, typer.Option(help="FastChat's llm_judge/data. [default: that of the package]")] = None,
    mode: Annotated[
        Literal["single", "pairwise"], typer.Option(help="A score for each answer, or a verdict against the baseline.")
    ] = "single",
    baseline: Annotated[
        str | None, typer.Option(help="Of pairwise: a model's name. [default: pivot, or first]")
    ] = None,
    reference: Annotated[str, typer.Option(help="Which reference answers: gpt-4, gpt-4-0125-preview.")] = "gpt-4",
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 1024,
    judge_max_tokens: Annotated[int, typer.Option(min=1, help="The longest judgement.")] = 2048,
    chat_template: TemplateChoice = None,
    workdir: WorkDir = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_tokens: BatchTokens = 16384,
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    estimate: EstimateOnly = False,
    as_json: AsJson = False,
) -> None:
    """MT-Bench: 80 questions of two turns, answers graded by a judge."""
    from fusechat.commands.evaluate_models import evaluation, finish, resolved
    from fusechat.evaluate.mt_bench import data as questions
    from fusechat.evaluate.mt_bench import suite

    if baseline is not None and mode == "single":
        raise RecipeError("--baseline: nothing is compared with it; --mode pairwise does")
    loaded = questions.load(data, reference=reference)
    judge = _judge(judge_url, judge_model, concurrency=concurrency, timeout=timeout)
    with evaluation("mt-bench", models or [], workdir=workdir, out=out, chat_template=chat_template) as found:
        how: dict[str, Any] = {**resolved(dtype, device), "batch_tokens": batch_tokens, "seed": seed}
        measured, settings = suite.run(
            found.subjects,
            data=loaded,
            answering=found.answering(**how, concurrency=concurrency, timeout=timeout),
            judge=judge,
            directory=found.directory,
            mode=mode,
            baseline=found.label_of(baseline) if baseline else found.pivot,
            limit=limit,
            max_new_tokens=max_new_tokens,
            judge_max_tokens=judge_max_tokens,
            announce=_announcing(only=estimate),
        )
        _show(finish(found, measured, {**settings, **how, "judge_address": judge.address}), found, as_json)


@measure.command("alpaca-eval")
def alpaca_eval(
    models: Models = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A directory with df_gamed.csv and the baseline's outputs or annotations. [default: the hub's]"
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score these annotations; no MODEL and no judge.")
    ] = None,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers.")] = 0.0,
    chat_template: TemplateChoice = None,
    workdir: WorkDir = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_tokens: BatchTokens = 16384,
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    estimate: EstimateOnly = False,
    as_json: AsJson = False,
) -> None:
    """AlpacaEval 2.0: 805 instructions, win rate and length-controlled win rate against the baseline."""
    from fusechat.commands.evaluate_models import evaluation, finish, resolved
    from fusechat.evaluate.alpaca import data as instructions
    from fusechat.evaluate.alpaca import suite
    from fusechat.evaluate.alpaca.library import library

    if annotations is not None:
        if models or workdir or judge_url or judge_model or limit or estimate or chat_template:
            raise RecipeError("--annotations: goes with --data and --out only, without MODEL and judge")
        with evaluation("alpaca-eval", [], workdir=None, out=out, needs_models=False) as found:
            gamed = None if data is None else data / "df_gamed.csv" if data.is_dir() else data
            measured, settings = suite.score_annotations(annotations, gamed=gamed)
            _show(finish(found, measured, settings), found, as_json)
        return
    with library():  # reports a missing package now, not after hours of answers
        loaded = instructions.load(data)
    judge = _judge(judge_url, judge_model, concurrency=concurrency, timeout=timeout)
    with evaluation("alpaca-eval", models or [], workdir=workdir, out=out, chat_template=chat_template) as found:
        how: dict[str, Any] = {**resolved(dtype, device), "batch_tokens": batch_tokens, "seed": seed}
        measured, settings = suite.run(
            found.subjects,
            data=loaded,
            answering=found.answering(**how, concurrency=concurrency, timeout=timeout),
            judge=judge,
            directory=found.directory,
            limit=limit,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            announce=_announcing(only=estimate),
        )
        _show(finish(found, measured, {**settings, **how, "judge_address": judge.address}), found, as_json)


@measure.command("harness")
def harness(
    models: Models = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,…", help="Tasks of lm_eval.", show_default=False)] = None,
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory of task files of your own.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. [default: the task's]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a batch.")] = 8,
    limit: Limit = None,
    chat_template: TemplateChoice = None,
    workdir: WorkDir = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Any tasks of the Language Model Evaluation Harness, with the model's chat template."""
    from fusechat.commands.evaluate_models import evaluation, finish, resolved
    from fusechat.evaluate import harness as suite

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks: names no task")
    manager = suite.check_tasks(names, include)
    places: dict[str, Any] = {"workdir": workdir, "out": out, "chat_template": chat_template}
    with evaluation("harness", models or [], **places) as found:
        how: dict[str, Any] = {**resolved(dtype, device), "batch_size": batch_size, "limit": limit}
        how |= {"few_shot": few_shot, "seed": seed}
        options: dict[str, Any] = {"tasks": names, "manager": manager, "include": include, "directory": found.directory}
        measured = suite.run(found.subjects, **options, **how)
        _show(finish(found, measured, {"tasks": names, "chat_template": True, **how}), found, as_json)


@measure.command("bits-per-byte")
def bits_per_byte(
    models: Models = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Conversations.", show_default=False)] = None,
    limit: Limit = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens; responses that end later are left out.")] = 2048,
    on_error: Annotated[Literal["stop", "skip"], typer.Option(help="What to do about malformed lines.")] = "stop",
    chat_template: TemplateChoice = None,
    workdir: WorkDir = None,
    out: Out = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "bfloat16",
    device: Device = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a batch.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Bits per byte of the responses in a file of conversations, which compares models whatever their tokenizer."""
    from fusechat.commands.evaluate_models import bits_per_byte as score
    from fusechat.commands.evaluate_models import evaluation, finish

    if data is None:
        raise RecipeError("--data: names no file of conversations")
    places: dict[str, Any] = {"workdir": workdir, "out": out, "chat_template": chat_template}
    with evaluation("bits-per-byte", models or [], **places) as found:
        how: dict[str, Any] = {"limit": limit, "max_length": max_length, "dtype": dtype, "batch_tokens": batch_tokens}
        measured, settings = score(found.subjects, data=data, on_error=on_error, device=device, **how)
        _show(finish(found, measured, settings), found, as_json)


def _judge(url: str | None, model: str | None, *, concurrency: int, timeout: float) -> Any:
    from fusechat.models.client import Client, judge_key

    if not url or not model:
        lacking = [name for name, value in (("--judge-url", url), ("--judge-model", model)) if not value]
        raise RecipeError(f"{' and '.join(lacking)}: name the judge's server and model")
    return Client(url=url, model=model, key=judge_key(), what="--judge-url", concurrency=concurrency, timeout=timeout)


def _announcing(*, only: bool) -> Callable[[Any], None]:
    """A function that prints the estimate of a judge's work, and with `only` ends the command."""

    def tell(estimate: Any) -> None:
        if only:
            print(estimate)
            raise typer.Exit
        from fusechat.run.progress import log

        log.info("%s", estimate)

    return tell


def _show(records: list[dict[str, Any]], found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(records, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fusechat.report.results import SCHEMA, result_tables, terminal_tables

    console = Console()
    for table in terminal_tables(result_tables({"schema": SCHEMA, "scores": records}), found.title):
        console.print(table)
    console.print(f"results: {found.out}", soft_wrap=True)


@measure.command("alignment")
def eval_alignment(
    recipe: RecipeFile,
    workdir: Annotated[Path | None, typer.Option(help="Where the run keeps its files. [default: runs/NAME]")] = None,
    top_k: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens kept of each distribution; may be given more than once.")
    ] = None,
    set_: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the ways to align each source's distributions, on held-out conversations: coverage, transferred nll."""
    from fusechat.commands.compare_alignments import evaluate_alignment, terminal_tables
    from fusechat.pipeline import load_recipe
    from fusechat.run.files import write_text

    loaded = load_recipe(recipe, set_)
    top_ks = sorted(set(top_k or [loaded.capture.top_k]))
    records = evaluate_alignment(loaded, workdir or Path("runs") / loaded.name, top_ks=top_ks)
    text = json.dumps(records, indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    from rich.console import Console

    console = Console()
    for table in terminal_tables(records):
        console.print(table)
