"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]…",
        help="A directory or other model reference, URL#NAME of a server, or with --workdir pivot, source-NAME, "
        "target-NAME, fused. LABEL=MODEL gives it another name.",
        show_default=False,
    ),
]
WorkDir = Annotated[Path | None, typer.Option(help="A run: its models, all without MODEL, and its report.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="[default: evaluate/results.json]")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only this many questions, for a trial.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="[default: bfloat16 on a GPU, else float32]")
]
Device = Annotated[str | None, typer.Option(help="[default: what is there]")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens of a batch, answers included.")]
Seed = Annotated[int, typer.Option(min=0, help="Of answers at a temperature above 0, and of few-shot examples.")]
JudgeUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible server: https://…/v1.", show_default=False)]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name there.", show_default=False)]
Concurrency = Annotated[int, typer.Option(min=1, help="Concurrent requests.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that one request may take.")]
EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="Stop before the judge is asked; print what it would cost.")
]
TemplateChoice = Annotated[
    str | None,
    typer.Option("--chat-template", metavar="NAME_OR_FILE", help="One of a model's own templates, or a file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the records as JSON, for a script to read.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")]
