"""`import fusechat`: every example of docs/python.md, every public name, and what becomes of the process that uses them."""

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from transformers.utils import logging as transformers_logging

import fusechat
import runs
import tiny
from fusechat import pipeline
from fusechat.plan.calibration import Measured
from fusechat.run import progress
from showing import TEXT

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
PIVOT, STARLING, MIXTRAL = (
    *("openchat/openchat_3.5", "berkeley-nest/Starling-LM-7B-alpha"),
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def process_state() -> dict[str, Any]:
    """What a caller has of its process, apart from what is imported and kept in memory."""
    return {
        "environment": dict(os.environ),
        "torch": (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "random numbers": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "Transformers": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "logging": [(one.level, one.propagate, list(one.handlers)) for one in (logging.getLogger(), progress.log)],
        "main": sys.modules["__main__"],
        "directory": Path.cwd(),
    }


@pytest.fixture(scope="module")
def place(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: tiny models under the names of docs/python.md, its recipe and its data."""
    directory = tmp_path_factory.mktemp("python")
    for number, (name, kind) in enumerate(((PIVOT, "llama"), (STARLING, "llama"), (MIXTRAL, "mistral"))):
        tiny.build(kind, directory / name, seed=number)
    (directory / "recipe.yaml").write_text(blocks("yaml")[0])
    runs.write_conversations(directory / "conversations.jsonl", 10)
    runs.write_conversations(directory / "held-out.jsonl", 4, first=100)
    with contextlib.chdir(directory):
        yield directory


@pytest.fixture(scope="module")
def page(place: Path) -> SimpleNamespace:
    """All examples of docs/python.md, run in order: their names, what each printed, the process before and after."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    names: dict[str, Any] = {}
    printed, before = [], process_state()
    for number, block in enumerate(blocks("python")):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, f"docs/python.md, example {number + 1}", "exec"), names)
        printed.append(out.getvalue())
    return SimpleNamespace(names=names, printed=printed, before=before, after=process_state())


def test_every_example_runs_and_prints_what_it_says(page: SimpleNamespace) -> None:
    said = [re.findall(r"print\((?:[^#\n]*)\)  # (.*)", block) for block in blocks("python")]
    assert said[1] == [page.printed[1].strip().replace("False", "True")]  # bf16, by the machine
    assert said[3] == [page.printed[3].strip()]
    assert said[-1] == [page.printed[-1].strip()]
    assert "bits_per_byte" in page.printed[5]


def test_the_page_is_complete() -> None:
    named = set(re.findall(r"`(?:fusechat\.)?(\w+)`", PAGE))
    assert set(fusechat.__all__) - named == set()
    assert all(len(line) < 120 for line in PAGE.splitlines())


def test_the_process_is_as_it_was(page: SimpleNamespace) -> None:
    for what, before in page.before.items():
        after = page.after[what]
        if what == "random numbers":  # the example of the loss draws some itself
            before, after = before[:2], after[:2]
        assert after == before, what


def test_the_import_brings_no_heavy_library() -> None:
    """Whatever else is imported, it is none of what takes long; and names of errors, `dir` and a wrong name bring none either."""
    code = """
        import sys, fusechat
        assert fusechat.FuseChatError and issubclass(fusechat.RecipeError, fusechat.FuseChatError)
        assert set(fusechat.__all__) <= set(dir(fusechat))
        try:
            fusechat.load_recipes
        except AttributeError as error:
            assert str(error) == "module 'fusechat' has no attribute 'load_recipes'"
        print(sorted(name for name in sys.modules if name.startswith("fusechat.")))
        print([name for name in ("torch", "transformers", "numpy", "pydantic", "yaml", "rich") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert [eval(line) for line in done.stdout.splitlines()] == [["fusechat.errors"], []]


def test_public_names_are_what_they_are_elsewhere() -> None:
    import fusechat.align
    import fusechat.errors
    import fusechat.fuse

    assert fusechat.token_spans is fusechat.align.token_spans
    assert fusechat.align_starts is fusechat.align.align_starts
    assert fusechat.fusion_loss is fusechat.fuse.fusion_loss
    for name in (name for name in fusechat.__all__ if name.endswith("Error")):
        assert getattr(fusechat, name) is getattr(fusechat.errors, name)
    assert all(getattr(fusechat, name).__doc__ for name in fusechat.__all__ if not name.endswith("Error"))


def test_types_are_seen_by_a_type_checker(tmp_path: Path) -> None:
    """As in a program that has FuseChat installed: without `py.typed` mypy would see none. Other libraries are left out."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
        from typing import Any, assert_type
        import fusechat
        recipe = fusechat.load_recipe("recipe.yaml", fuse={"sft_weight": 1.0})
        run = fusechat.run_recipe(recipe, "runs/mine", until="merge")
        assert_type(recipe, fusechat.Recipe)
        assert_type(run, fusechat.Run)
        assert_type(run.results, list[dict[str, Any]])
        assert_type(fusechat.align_text("a", "b", "c").pivot_tokens, list[str])
        fusechat.run_recipe(3)
        fusechat.load_recipes
        """)
    )
    others = "torch numpy transformers pydantic yaml rich pyarrow huggingface_hub jinja2 numba typer plotly"
    skipped = ",".join(f"{name}.*" for name in others.split())
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{skipped}]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fusechat.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if "error" in line]
    assert 'Argument 1 to "run_recipe" has incompatible type "int"' in found[0], done.stdout
    assert 'Module has no attribute "load_recipes"' in found[1]
    assert found[2:] == ["Found 2 errors in 1 file (checked 1 source file)"]


def test_changes_are_those_of_the_command_line(place: Path) -> None:
    changes: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"seed": 3, "device": "cpu"}, ["seed=3", "device=cpu"]),
        ({"fuse": {"sft_weight": 1}}, ["fuse.sft_weight=1"]),
        ({"fuse": {"training": {"bf16": False}}, "merge": {"method": "linear", "select_topk": None}}, None),  # type: ignore[list-item]
        ({"targets": {"sft": [], "both": ("starling", "mixtral")}}, ["targets={sft: [], both: [starling, mixtral]}"]),
        ({"fuse": {"training": {}}}, ["fuse.training={}"]),
        ({"data": {"train": {"limit": np.int64(5)}}}, ["data.train.limit=5"]),
        ({"data": {"train": [{"path": "conversations.jsonl", "weight": 2.0}]}}, None),  # type: ignore[list-item]
        ({"sources": {"mixtral": {"chat_template_kwargs": {"a": 1}}}}, ["sources.mixtral.chat_template_kwargs={a: 1}"]),
    ]
    for sections, overrides in changes:
        found = fusechat.load_recipe("recipe.yaml", **sections)
        if overrides is not None:
            assert found == pipeline.load_recipe(place / "recipe.yaml", overrides), sections
    assert fusechat.load_recipe("recipe.yaml", data=changes[7][0]["data"]).weights() == {"conversations": 2.0}
    listed = {"name": "x", "pivot": PIVOT, "sources": {"a": STARLING}, "data": {"train": ["conversations.jsonl"]}}
    indexed = fusechat.load_recipe(listed, data={"train": {0: {"weight": 0.5}}})
    assert indexed.weights() == {"conversations": 0.5}
    assert listed["data"] == {"train": ["conversations.jsonl"]}


def test_a_dictionary_is_a_recipe_and_paths_start_where_the_page_says(place: Path, tmp_path: Path) -> None:
    (tmp_path / "conversations.jsonl").write_text("")
    (tmp_path / "held-out.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    there = fusechat.load_recipe(tmp_path / "recipe.yaml", data={"validation": "held-out.jsonl"})
    assert there.data.train.path == str(tmp_path / "conversations.jsonl")  # type: ignore[union-attr]
    assert there.data.validation.path == str(place / "held-out.jsonl")  # type: ignore[union-attr]
    content = {
        "name": np.str_("mine"),
        "pivot": Path(PIVOT),
        "sources": {"starling": {"model": Path(STARLING)}, "mixtral": place / MIXTRAL},
        "data": {"train": Path("conversations.jsonl"), "validation": {"path": "held-out.jsonl"}},
        "fuse": {"training": {"num_train_epochs": np.int64(1), "learning_rate": np.float64(5e-6), "bf16": "auto"}},
        "merge": {"select_topk": torch.tensor(0.1, dtype=torch.float64)},
    }
    assert fusechat.load_recipe(content) == fusechat.load_recipe("recipe.yaml")


def test_mistakes_name_the_key(place: Path, page: SimpleNamespace, tmp_path: Path) -> None:
    inside: dict[str, Any] = {"name": "x"}
    inside["fuse"] = inside
    model = {"model": PIVOT}
    slices: dict[str, Any] = {"merge_method": "linear", "models": [model, model | {"parameters": {"weight": object()}}]}
    recipe, work, out, names = page.names["recipe"], tmp_path / "work", tmp_path / "out", fusechat
    mistakes: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: names.load_recipe("no.yaml"), names.RecipeError, "no.yaml: no such file"),
        (lambda: names.load_recipe("."), names.RecipeError, ".: cannot be read"),
        (lambda: names.load_recipe(5), names.RecipeError, "recipe: should be a path, not int"),  # type: ignore[arg-type]
        (lambda: names.load_recipe({}), names.RecipeError, "recipe: name: is missing\nrecipe: pivot: is missing"),
        (
            lambda: names.load_recipe("recipe.yaml", fused={}),
            names.RecipeError,
            "recipe.yaml: fused: unknown key; did you mean fuse?",
        ),
        (
            lambda: names.load_recipe("recipe.yaml", fuse=1),
            names.RecipeError,
            "fuse: should be a mapping of keys, not int",
        ),
        (lambda: names.load_recipe("recipe.yaml", fuse={"sft_weight": 2}), names.RecipeError, "fuse.sft_weight: Input"),
        (
            lambda: names.load_recipe("recipe.yaml", seed={1}),
            names.RecipeError,
            "seed: should be text, a number, a list",
        ),
        (lambda: names.load_recipe("recipe.yaml", merge={"method": "tise"}), names.RecipeError, "merge.method: "),
        (lambda: names.load_recipe(inside), names.RecipeError, "recipe: nests too deep, or in itself"),
        (lambda: names.load_recipe({"name": "x", "pivot": 1 + 2j}), names.RecipeError, "recipe: pivot: should be text"),
        (
            lambda: names.load_recipe({"name": "x", "data": {"train": ["a", "b"]}}, data={"train": {"limit": 1}}),
            names.RecipeError,
            "recipe: data.train.limit: limit is no index of a list of 2",
        ),
        (lambda: names.run_recipe(recipe, work, until="fused"), names.RecipeError, "until fused: no such stage"),
        (lambda: names.run_recipe(recipe, work, only="x"), names.RecipeError, "only x: the recipe has no such source"),
        (lambda: names.run_recipe(recipe, 1), names.RecipeError, "workdir: should be a path, not int"),  # type: ignore[arg-type]
        (lambda: names.run_recipe(recipe, "openchat"), names.WorkdirError, "is not empty and no work directory"),
        (lambda: names.run_recipe(recipe, "x" * 300), names.StorageError, "File name too long"),
        (lambda: names.plan_recipe(recipe, device="h1000"), names.RecipeError, "device h1000"),
        (lambda: names.plan_recipe(recipe, conversations=0), names.RecipeError, "conversations: should be 1 or more"),
        (lambda: names.plan_recipe({}), names.RecipeError, "recipe: name: is missing"),
        (lambda: page.names["run"].load(dtype="float64"), names.RecipeError, "dtype: should be one of float32, "),
        (lambda: page.names["run"].load(device="gpu"), names.ModelError, "device: 'gpu' is unavailable"),
        (lambda: names.merge_models("no.yaml", out), names.RecipeError, "no.yaml: no such file"),
        (lambda: names.merge_models(3, out), names.RecipeError, "config: should be a path, not int"),  # type: ignore[arg-type]
        (lambda: names.merge_models({}, out), names.RecipeError, "merge: merge_method: is missing"),
        (lambda: names.merge_models(slices, out), names.RecipeError, "models.1.parameters.weight: should be text"),
        (lambda: names.merge_models({}, out, threads=0), names.RecipeError, "threads: should be 1 or more, not 0"),
        (lambda: names.merge_models({}, out, shard_size=0), names.RecipeError, "shard_size: should be a number of GB"),
        (lambda: names.align_text(3, PIVOT, "x"), names.ModelError, "pivot_tokenizer: should be a tokenizer of"),
        (lambda: names.align_text(PIVOT, "no such model", "x"), names.ModelError, "'no such model' is neither"),
        (lambda: names.align_text(PIVOT, PIVOT, None), names.DataError, "text: should be text, not NoneType"),  # type: ignore[arg-type]
        (lambda: names.align_text(PIVOT, PIVOT, "\ud800"), names.ModelError, "half a surrogate pair at character 0"),
        (lambda: names.token_spans("gpt2", "x"), names.ModelError, "str: a slow tokenizer has no spans"),
    ]
    before = process_state()
    for call, kind, said in mistakes:
        with pytest.raises(kind, match=re.escape(said)):
            call()
    assert process_state() == before
    assert not out.exists()


def test_results_are_flat_records_and_the_model_is_the_fused_one(place: Path, page: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = page.names["run"]
    assert (run.workdir, run.model_path) == (Path("runs/mine"), Path("runs/mine/merge/model"))
    assert repr(run) == "Run(workdir=PosixPath('runs/mine'))"
    assert run.recipe.model_copy(update={"date": None}) == page.names["recipe"]
    scores = json.loads((run.workdir / "evaluate" / "results.json").read_text())["scores"]
    expected = pandas.json_normalize(scores)
    found = pandas.DataFrame(run.results)
    pandas.testing.assert_frame_equal(found[expected.columns], expected)
    assert len(found.columns) == len(expected.columns)
    assert not any(isinstance(value, Mapping) for record in run.results for value in record.values())
    model, tokenizer = run.load(dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(run.model_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(weights, plain[name]) for name, weights in model.state_dict().items())
    assert not model.training
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(run.model_path).get_vocab()
    tokenizer.add_tokens(["<new>"])  # the caller's own: no later run has it
    assert "<new>" not in run.load()[1].get_vocab()


def test_what_is_not_done_or_of_an_older_recipe_is_not_given(
    place: Path, page: SimpleNamespace, tmp_path: Path
) -> None:
    half = fusechat.run_recipe(
        {**page.names["small"].model_dump(exclude_none=True), "name": "half"}, tmp_path, until="prepare"
    )
    changed = fusechat.Run(Path("runs/mine"), fusechat.load_recipe("recipe.yaml", fuse={"sft_weight": 0.3}))
    for run, state in ((half, "absent"), (changed, "stale")):
        for ask in (lambda: run.model_path, lambda: run.load(), lambda: run.results):  # noqa: B023
            with pytest.raises(fusechat.WorkdirError, match=f"{run.workdir}: (merge|evaluate results) is {state} "):
                ask()
    assert (half.workdir / "prepare" / "starling").is_dir()
    nothing = fusechat.load_recipe("recipe.yaml", data={"validation": None})
    assert fusechat.Run(tmp_path / "new", nothing).results == []


def test_an_interrupted_run_goes_on(place: Path, page: SimpleNamespace, tmp_path: Path) -> None:
    class Interrupts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("capture pivot"):
                signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what begins in the background ignores it
    level, interrupts = progress.log.level, Interrupts()
    progress.log.setLevel(logging.INFO)
    progress.log.addHandler(interrupts)
    before = process_state()
    try:
        with pytest.raises(KeyboardInterrupt):
            fusechat.run_recipe(page.names["small"], tmp_path, until="capture")
        assert process_state() == before
    finally:
        signal.signal(signal.SIGINT, handler)
        progress.log.removeHandler(interrupts)
        progress.log.setLevel(level)
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("prepare/**/manifest.json")}
    assert done
    run = fusechat.run_recipe(page.names["small"], tmp_path, until="capture")
    assert len(list(run.workdir.glob("capture/*/data/manifest.json"))) == 2
    assert {file: file.stat().st_mtime_ns for file in done} == done


def test_a_plan_is_what_the_command_line_prints(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = fusechat.load_recipe("recipe.yaml", capture={"dtype": "auto"})
    found = fusechat.plan_recipe(recipe, "runs/planned", device="2xh100", conversations=1000)
    arguments = ("--device", "2xh100", "--conversations", "1000", "--set", "capture.dtype=auto")
    done = runs.here("plan", "recipe.yaml", "--workdir", "runs/planned", "--json", *arguments)
    printed = json.loads(done.stdout)
    for plan in (found, printed):  # times of what is measured here, such as opening a tokenizer
        plan["totals"].pop("seconds")
        for step in plan["steps"]:
            step.pop("seconds")
    assert found == printed
    assert json.loads(json.dumps(found)) == found
    assert not Path("runs/planned").exists()
    monkeypatch.setitem(Measured.__init__.__kwdefaults__, "seconds", 0.1)  # type: ignore[misc]
    here = fusechat.plan_recipe("recipe.yaml", device="cpu")
    assert (here["recipe"], here["device"]["measured"], here["problems"]) == ("mine", True, [])


def test_a_merge_is_that_of_the_library(place: Path, page: SimpleNamespace, tmp_path: Path) -> None:
    from fusechat.merge import merge

    config = {
        "merge_method": "sce",
        "base_model": PIVOT,
        "models": [{"model": f"runs/mine/fuse/{name}/model"} for name in ("starling", "mixtral")],
        "parameters": {"select_topk": 0.2},
    }
    report = merge(config, tmp_path / "merged")
    assert page.names["report"]["tensors"] == report["tensors"]
    ours, theirs = (where / "model.safetensors" for where in (Path("merged"), tmp_path / "merged"))
    assert ours.read_bytes() == theirs.read_bytes()
    small = fusechat.merge_models(config, tmp_path / "shards", threads=1, shard_size=1e-5)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert small["tensors"] == report["tensors"]


def test_aligned_text_is_what_the_tokens_command_draws(
    place: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for text in (TEXT, "-", "", " Größe\n\n:42 🙂"):
        found = fusechat.align_text(PIVOT, Path(MIXTRAL) / "tokenizer.json", text)
        if text != "-":  # on the command line standard input
            asked = ("tokens", PIVOT, Path(MIXTRAL) / "tokenizer.json", "--text", text)
            (passage,) = json.loads(runs.here(*asked, "--json").stdout)["passages"]
            for row, ids, spans in (
                ("pivot", found.pivot_ids, found.pivot_spans),
                ("source", found.source_ids, found.source_spans),
            ):
                assert ids.tolist() == [token["id"] for token in passage[row]]
                assert spans.tolist() == [[token["begin"], token["end"]] for token in passage[row]]
            assert found.starts.tolist() == [-1 if at is None else at for at in passage["alignment"]]
            assert str(found).rstrip().splitlines() == runs.here(*asked).stdout.rstrip().splitlines()
        kinds = {
            name: (getattr(found, name).dtype.name, getattr(found, name).ndim) for name in ("pivot_ids", "source_spans")
        }
        assert kinds == {"pivot_ids": ("int32", 1), "source_spans": ("int64", 2)}
        assert found.starts.shape == (len(found.pivot_tokens),)
        assert len(found.source_tokens) == len(found.source_ids)
    assert "".join(found.pivot_tokens).startswith("·Gr")
    html = found._repr_html_()
    assert repr(found) == str(found)
    assert re.sub("<[^>]*>", "", html).split("\n")[0].rstrip() == str(found).split("\n")[0].rstrip()
    assert "background-color: #004b87" in html
    loaded = fusechat.align_text(tokenizers["llama"], tokenizers["gemma"], TEXT)
    assert (loaded.pivot_spans == fusechat.token_spans(tokenizers["llama"], TEXT)).all()
    assert loaded.coverage == (loaded.starts >= 0).mean()


NOTEBOOK = """
import builtins, sys, types

class ZMQInteractiveShell: ...
class Handle:
    def update(self, what): shown[-1] = render(what)

shown, lines = [], []
def render(what): return what._repr_mimebundle_((), ())["text/plain"]
def display(what, display_id=False):
    (shown if display_id else lines).append(render(what))
    return Handle() if display_id else None

builtins.get_ipython = ZMQInteractiveShell
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": types.SimpleNamespace(display=display)}
from fusechat.run import progress
progress.setup_logging_once()
with progress.progress("capture x", 4, "conversations") as advance:
    advance(3, "a note")
    progress.log.info("a line")
with progress.progress("wait", None):
    pass
print([shown, lines])
"""


def test_bars_show_in_a_notebook_whose_stderr_is_no_terminal() -> None:
    """By Rich's own detection of Jupyter, with IPython's display replaced by one that keeps what it is given."""
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=True)
    shown, lines = eval(done.stdout)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in (*shown, *lines)]
    assert re.match(r"\S capture x ━+.* 3/4 conversations .*a note", plain[0])
    assert re.match(r"\S wait 0:00:0", plain[1])
    assert "a line" in plain[2]
    assert (len(shown), len(lines), done.stderr) == (2, 1, "")


def test_log_lines_are_shown_once_and_where_the_program_wants_them(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, log = logging.getLogger(), progress.log
    for logger in (root, log):
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "level", log.level)
    kept = io.StringIO()
    root.addHandler(logging.StreamHandler(kept))
    progress.setup_logging_once()
    assert (log.handlers, log.propagate) == ([], True)
    log.warning("theirs")
    root.handlers.clear()
    for _ in range(2):
        progress.setup_logging_once()
    with contextlib.redirect_stderr(io.StringIO()) as elsewhere:
        log.info("there")
    elsewhere.close()
    log.info("ours")
    assert (kept.getvalue(), capsys.readouterr().err, len(log.handlers)) == ("theirs\n", "ours\n", 1)


def test_a_script_is_not_run_again_by_the_processes_of_a_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import operator\nfrom fusechat.align.processes import Processes\nprint('begun')\n"
        "with Processes(2) as processes:\n    print(list(processes.map(operator.add, 1, [1, 2, 3])))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("begun\n[2, 3, 4]\n", "")


def test_a_server_is_asked_where_a_loop_runs_already() -> None:
    """As the thread of a notebook has one, in which no other can be run."""
    from fusechat.models.vllm_server import _Loop

    async def as_in_a_notebook() -> list[str]:
        loop = _Loop()
        found = [loop.run(asyncio.sleep(0, answer)) for answer in ("first", "second")]
        loop.close()
        return found

    assert asyncio.run(as_in_a_notebook()) == ["first", "second"]


def test_a_model_that_is_replaced_is_loaded_anew(models: dict[str, Path], tmp_path: Path) -> None:
    """A notebook lives on while a model that lies at one place becomes another."""
    from fusechat.models.tokenizer import load_tokenizer

    tiny.build("llama", tmp_path / "model")
    first = load_tokenizer(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model") is first
    tiny.build("mistral", tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").get_vocab() != first.get_vocab()
