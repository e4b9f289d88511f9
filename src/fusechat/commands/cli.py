"""The command line, one function for each verb. Slow imports are made by the verb that needs them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusechat.commands.eval import measure
from fusechat.commands.options import Changes, RecipeFile, TemplateChoice
from fusechat.errors import FuseChatError, storage_error
from fusechat.recipe.anchors import links
from fusechat.run import ranks

INTERRUPTED = 130  # exit status after Ctrl-C
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fuses several chat LLMs into one model.",
)
app.add_typer(measure, name="eval")
WorkDirectory = Annotated[Path, typer.Argument(metavar="WORKDIR", help="The directory of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a script to read.")]


@app.command()
def init(
    pivot: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Gives the fused model its structure, size and tokenizer.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]MODEL", help="A model that teaches. Repeat the option for more."),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Conversations, or a data set of the hub.")] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out conversations, to measure all models.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the fused model. [default: PIVOT-fused]")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe and check it. Asks for what is missing. A model is a directory, a .gguf file or a hub id."""
    from fusechat.commands.init import init as write_recipe

    write_recipe(pivot=pivot, sources=source or [], data=data, validation=validation, name=name, out=out, force=force)


@app.command()
def run(
    recipe: RecipeFile,
    workdir: Annotated[Path | None, typer.Option(help="Where the run keeps its files. [default: runs/NAME]")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Only this source's branch, without the merge.")
    ] = None,
    set_: Changes = None,
) -> None:
    """Run the whole pipeline, resuming where an earlier run stopped."""
    from fusechat.commands.run import run as run_pipeline
    from fusechat.pipeline import load_recipe

    loaded = ranks.from_first(lambda: load_recipe(recipe, set_))
    workdir = workdir or Path("runs") / loaded.name
    run_pipeline(loaded, workdir, until=until, only=only)
    if until in (None, "report") and only is None and ranks.is_first():
        from fusechat.commands.finished import print_finished

        print_finished(loaded, workdir)


@app.command()
def plan(
    recipe: RecipeFile,
    device: Annotated[
        str | None,
        typer.Option(help="h100, 8xh100, rtx4090, …, or cpu, cuda, mps of this machine. [default: the recipe's]"),
    ] = None,
    conversations: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Plan for N training conversations like the recipe's."),
    ] = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="One line for each stage.")] = False,
    workdir: Annotated[
        Path | None, typer.Option(help="Where the run will keep its files. [default: runs/NAME]")
    ] = None,
    set_: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take (disk, memory, time), and what would fail in it, before it begins. Reads no weights."""
    from fusechat.errors import PlanError
    from fusechat.pipeline import load_recipe
    from fusechat.plan.calibration import choose, dtype_on
    from fusechat.plan.command import make_plan
    from fusechat.plan.table import as_json as in_json
    from fusechat.plan.table import show
    from fusechat.recipe.pinned import pin

    loaded = load_recipe(recipe, set_, dtype=dtype_on(device))
    workdir = workdir or Path("runs") / loaded.name
    loaded = pin(loaded, workdir, automatic=device is None)
    made = make_plan(loaded, workdir, choose(device, loaded.device, workdir), conversations=conversations)
    if as_json:
        print(json.dumps(in_json(made), indent=1))
    else:
        show(made, by_stage=by_stage)
    if made.problems:
        raise PlanError(*made.problems)


@app.command()
def status(
    workdir: WorkDirectory,
    recipe: Annotated[Path | None, typer.Option(help="A changed recipe, before it is run. [default: as run]")] = None,
    set_: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show what is done, running, stale or damaged, and why."""
    from fusechat.commands.status import show_status

    show_status(workdir, recipe, set_, as_json=as_json)


@app.command()
def clean(
    workdir: WorkDirectory,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Free what a finished run no longer needs: distributions and checkpoints. Says how much first, and asks."""
    from fusechat.commands.clean import free, parts, summary

    found = parts(workdir)
    print("\n".join(summary(found)))
    if not found:
        return
    if not yes and not (sys.stdin.isatty() and typer.confirm("Remove them?")):
        print("nothing was removed" + ("" if sys.stdin.isatty() else "; --yes removes without asking"))
        return
    free(workdir)


@app.command()
def report(workdir: WorkDirectory) -> None:
    """Write the report of a finished run again, and print its table."""
    from fusechat.commands.finished import print_finished
    from fusechat.errors import WorkdirError
    from fusechat.pipeline import build_steps
    from fusechat.recipe.pinned import recipe_of

    recipe = recipe_of(workdir)
    *before, page = build_steps(recipe, workdir)
    unfinished = [f"{step.label} is {step.state()[0]}" for step in before if not step.finished]
    if unfinished:
        raise WorkdirError(f"{workdir}: not finished: {unfinished[0]}; run the recipe first")
    page.redo()
    print_finished(recipe, workdir)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or any other model reference.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For a temperature above 0.")] = 0,
    device: Annotated[str | None, typer.Option(help="[default: what is there]")] = None,
    chat_template: TemplateChoice = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Talk to a model. Questions come from the terminal, or a line each from standard input."""
    from fusechat.commands.chat import talk

    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "device": device}
    talk(model, system=system, chat_template=chat_template, trust_remote_code=trust_remote_code, **how)


@app.command()
def tokens(
    pivot: Annotated[str, typer.Argument(metavar="PIVOT", help="A model, or a tokenizer.json; of a run: pivot.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The other one; of a run: a source's name.")],
    text: Annotated[str | None, typer.Option(help="The text; - reads standard input.")] = None,
    workdir: Annotated[Path | None, typer.Option(help="A run, of which to show a conversation.")] = None,
    conversation: Annotated[
        str | None, typer.Option(metavar="ID", help="Its number from 0, its id, or a prefix of its id.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw on a page, with all about each token.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw two models' tokens of a text one above the other, aligned at bytes."""
    from fusechat.errors import RecipeError
    from fusechat.show.tokens import of_text, present

    if html is not None and html.is_dir():
        raise RecipeError(f"--html {html}: is a directory; name a file")
    if text is not None and workdir is None and conversation is None:
        shown = of_text(pivot, source, text=text)
    elif text is None and workdir is not None and conversation is not None:
        from fusechat.commands.tokens_of_run import of_run

        shown = of_run(workdir, pivot, source, conversation=conversation)
    else:
        raise RecipeError("give either --text, or --workdir and --conversation; see fusechat tokens --help")
    present(shown, html=html, as_json=as_json)


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(metavar="MERGE.yaml", help="What to merge and how, as mergekit has it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory of the merged model.")],
    allow_vocab_resize: Annotated[
        bool, typer.Option("--allow-vocab-resize", help="Merge the rows that vocabularies of different sizes share.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: all cores]")] = None,
    shard_size: Annotated[float, typer.Option(help="The largest file of the output, in GB.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Merge models in parameter space, continuing where a killed merge stopped."""
    from fusechat.errors import RecipeError
    from fusechat.merge.standalone import run as run_merge
    from fusechat.merge.summary import print_summary

    if not 0 < shard_size < 1e9:
        raise RecipeError(f"--shard-size {shard_size}: should be a number of GB, more than 0")
    summary = run_merge(
        config, out, allow_vocab_resize=allow_vocab_resize, threads=threads, shard_bytes=int(shard_size * 1e9)
    )
    print_summary(summary, out, as_json=as_json)


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from fusechat import __version__

        print(f"fusechat {__version__}")
        raise typer.Exit
    if "--help" not in sys.argv:
        from fusechat.run.progress import setup_logging

        setup_logging()


def main() -> Any:
    """Runs the command line. Exit status: 0 when done, 2 for errors that the user can correct, 1 for a defect of FuseChat."""
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:  # Typer does not pass on the exception
            raise KeyboardInterrupt
        sys.exit(status)
    except FuseChatError as error:
        _fail(*(() if error.reported else error.messages))
    except (KeyboardInterrupt, typer.Abort) as stopped:
        if isinstance(stopped, typer.Abort):
            print(file=sys.stderr)  # ends the line of the question
        _fail("interrupted; run the same command again to continue", status=INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's error about the command itself
            _usage(error)
        storage = storage_error(error)
        if storage is None and ranks.peer_died(error):
            _fail(f"process {ranks.rank()}: another process of this run has ended; run again to continue")
        if storage is None:
            raise
        _fail(storage)


def _usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    command = error.ctx.command_path if getattr(error, "ctx", None) else "fusechat"
    _fail(f"{error.format_message().rstrip('.')}; see {command} --help")


def _fail(*messages: str, status: int = 2) -> None:
    for message in messages:
        print(f"fusechat: error: {message}", file=sys.stderr)
    for link in links(messages) if "merge" not in sys.argv[1:2] else ():  # its keys are not in recipe.md
        print(f"see {link}", file=sys.stderr)
    sys.exit(status)
