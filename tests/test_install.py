"""What `pip install fusechat` brings: the wheel, the core that works alone, and a line for each command that needs an extra."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import alpaca_evaluating
import mt_benching
import runs

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PREFIX = "fusechat: error: "
# Not imported by FuseChat: Transformers needs them to read the files of some models.
INDIRECT = {"protobuf": "tokenizer.model", "sentencepiece": "tokenizer.model"}
FOR_MAKE = (
    "dev",
    "figures",
    "mergekit",
)  # extras that no command of FuseChat needs: make test, make miniature, make bench-merge
# In one process, so that what is slow to import is imported once: status and stderr of each command line.
SEVERAL = """\
import contextlib, io, json, sys
from fusechat.commands.cli import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv, said = ["fusechat", *arguments], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    found.append((status, said.getvalue().splitlines()))
print(json.dumps(found))
"""


def run(*command: object, cwd: Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that sees nothing of this environment."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    options: dict[str, Any] = {"cwd": cwd, "input": stdin, "env": inherited | environment}
    return subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the project's own files, by the setuptools that is here, without an index."""
    copy = tmp_path_factory.mktemp("source") / "fusechat"
    shutil.copytree(SOURCE, copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, copy)
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", built, copy)
    [found] = built.iterdir()
    return found


def pip(*arguments: object, python: Path | None = None) -> None:
    """The pip that is here, on this environment or on that of another `python`."""
    into = ("--python", python) if python else ()
    done = run(sys.executable, "-m", "pip", "--quiet", *into, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has the wheel and what it depends on, as links to what is installed here, and no more."""
    root = tmp_path_factory.mktemp("core")
    venv.create(root, symlinks=True)
    commands = root / "bin"
    pip("install", "--no-deps", "--no-index", "--no-compile", wheel, python=commands / "python")
    [site] = root.glob("lib/python*/site-packages")
    [ours] = metadata.distributions(path=[str(site)])
    for distribution in needed(ours.requires or [], set()):
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    return commands


def needed(requirements: list[str], seen: set[str], extras: frozenset[str] = frozenset()) -> Iterator[Any]:
    """The distributions that requirements name, and those that these need."""
    for one in map(Requirement, requirements):
        name = canonicalize_name(one.name)
        if name in seen or (one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras | {""})):
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        yield distribution
        yield from needed(distribution.requires or [], seen, frozenset(one.extras))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        [about] = [opened.read(name).decode() for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        licences = [name for name in opened.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    files = [path for path in (SOURCE / "fusechat").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {str(path.relative_to(SOURCE)) for path in files}
    assert {Path(name).suffix for name in names} >= {".py", ".j2", ".js"}
    assert f"Requires-Python: {PROJECT['requires-python']}\n" in about
    assert len(licences) == 1


def test_every_dependency_is_needed_and_every_import_is_a_dependency() -> None:
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    optional = {canonicalize_name(Requirement(line).name) for line in extras} - {"fusechat"}
    assert not core & optional
    assert len(core) == len(PROJECT["dependencies"])
    owners = metadata.packages_distributions()
    imported: set[str] = set()
    for file in (SOURCE / "fusechat").rglob("*.py"):
        for package in imports(file) - {"fusechat", "IPython"} - sys.stdlib_module_names:  # a notebook's own
            owned = {canonicalize_name(name) for name in owners.get(package, (package,))}
            assert owned & (core | optional), f"{file.name} imports {package}, which is no dependency"
            imported |= owned
    assert core - imported == set(INDIRECT)


def imports(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_the_core_alone_answers(core: Path, tmp_path: Path) -> None:
    shown = run(core / "fusechat", "--version", cwd=tmp_path)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"fusechat {PROJECT['version']}\n", "")
    shown = run(core / "fusechat", "--help", cwd=tmp_path, COLUMNS="100", TERM="dumb")
    assert (shown.returncode, shown.stderr) == (0, "")
    verbs = re.findall(r"^\W+([a-z][a-z-]+) {2,}", shown.stdout.partition("Commands")[2], flags=re.MULTILINE)
    assert {"run", "plan", "report", "merge", "chat", "eval"} <= set(verbs)
    helps = [[verb, "--help"] for verb in verbs]
    assert several(core, helps, tmp_path) == [(0, [])] * len(verbs)


def several(core: Path, commands: list[list[str]], cwd: Path) -> list[tuple[int, list[str]]]:
    """Status and stderr of each command line, in the core's environment."""
    done = run(core / "python", "-c", SEVERAL, cwd=cwd, stdin=json.dumps(commands), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]


def as_quantised(model: Path, copy: Path) -> Path:
    """A copy of a model that says of itself that bitsandbytes has quantised it."""
    shutil.copytree(model, copy)
    about = json.loads((copy / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(about))
    return copy


def test_a_command_says_which_extra_it_needs(core: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Before any work: one line, and status 2."""
    recipe = runs.write_recipe(tmp_path, models)
    quantised = as_quantised(models["mistral"], tmp_path / "quantised")
    baseline = alpaca_evaluating.write(tmp_path / "baseline.json", alpaca_evaluating.baseline_records())
    judged = alpaca_evaluating.write(tmp_path / "judged.json", alpaca_evaluating.annotation_records())
    judge = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "it")
    questions = mt_benching.write(tmp_path / "questions")
    model, conversations = models["llama"], tmp_path / "train.jsonl"
    served = "{backend: vllm, url: 'http://127.0.0.1:9/v1'}"

    def running(*settings: str) -> list[object]:
        return ["run", recipe, "--workdir", tmp_path / "work", *(word for one in settings for word in ("--set", one))]

    wanted: list[tuple[list[object], str, str]] = [
        (["eval", "mt-bench", model, *judge], "MT-Bench: ", "mt-bench"),
        (["eval", "mt-bench", model, "--data", questions, *judge], "--judge-url: ", "judge"),
        (["eval", "alpaca-eval", model, "--data", baseline, *judge], "AlpacaEval: ", "alpaca-eval"),
        (["eval", "alpaca-eval", "--annotations", judged], "AlpacaEval: ", "alpaca-eval"),
        (["eval", "harness", model, "--tasks", "gsm8k"], "--tasks: ", "harness"),
        (["eval", "bits-per-byte", quantised, "--data", conversations], f"{quantised}: ", "bitsandbytes"),
        (["chat", quantised], f"{quantised}: ", "bitsandbytes"),
        (running(f"sources.mistral={quantised}"), f"mistral ({quantised}): ", "bitsandbytes"),
        (running("fuse.training.optim=paged_adamw_8bit"), "fuse.training.optim: ", "bitsandbytes"),
        (running("fuse.lora={r: 4}"), f"{recipe}:26: fuse.lora: ", "lora"),
        (running("fuse.training.report_to=tensorboard"), "fuse.training.report_to: ", "tensorboard"),
        (running("fuse.training.report_to=[wandb]"), "fuse.training.report_to: ", "wandb"),
        (running("sources.mistral.capture={backend: vllm}"), "mistral: capture.backend: ", "vllm"),
        (running(f"sources.mistral.capture={served}"), "mistral: capture.url: ", "server"),
    ]
    commands = [[str(word) for word in words] for words, _, _ in wanted]
    for (status, said), (words, begins, extra) in zip(several(core, commands, tmp_path), wanted, strict=True):
        errors = [line.removeprefix(PREFIX) for line in said if line.startswith(PREFIX)]
        assert (status, len(errors)) == (2, 1), (words, said)
        assert errors[0].startswith(begins), (words, said)
        assert f"not installed (pip install 'fusechat[{extra}]')" in errors[0], (words, said)
        assert not any("Traceback" in line for line in said), (words, said)
    assert not (tmp_path / "work" / "prepare").exists()
    assert {extra for _, _, extra in wanted} == set(PROJECT["optional-dependencies"]) - set(FOR_MAKE)


def test_what_make_runs_says_which_extra_it_needs(core: Path, tmp_path: Path) -> None:
    merging = run(core / "python", ROOT / "benchmarks" / "merge.py", cwd=tmp_path)
    assert merging.returncode != 0
    assert "pip install 'fusechat[mergekit]'" in merging.stderr.splitlines()[-1]
    drawing = run(core / "python", "-m", "miniature", cwd=tmp_path, PYTHONPATH=str(ROOT / "benchmarks"))
    assert drawing.returncode == 2
    assert drawing.stderr == "miniature: kaleido or scipy is not installed (pip install 'fusechat[figures]')\n"


@pytest.mark.slow
def test_an_empty_environment_runs_a_recipe(wheel: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The wheel and all that pip finds for it; nothing here is seen."""
    venv.create(tmp_path / "empty", with_pip=True)
    commands = tmp_path / "empty" / "bin"
    installed = run(commands / "pip", "install", "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    if "No matching distribution found" in installed.stderr or "Could not find a version" in installed.stderr:
        pytest.skip("no package index: " + installed.stderr.strip().splitlines()[-1])
    assert installed.returncode == 0, installed.stderr
    listed = json.loads(run(commands / "pip", "list", "--format", "json", cwd=tmp_path).stdout)
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    found = {canonicalize_name(one["name"]) for one in listed}
    assert found & {canonicalize_name(Requirement(line).name) for line in extras} <= {
        "fusechat",
        "setuptools",
    }  # torch's
    recipe = runs.write_recipe(tmp_path, models)
    done = run(commands / "fusechat", "run", recipe, "--workdir", "work", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "report" / "index.html").is_file()
    fused = tmp_path / "work" / "merge" / "model"
    answered = run(commands / "fusechat", "chat", fused, "--max-new-tokens", "4", cwd=tmp_path, stdin="Hello?\n")
    assert answered.returncode == 0, answered.stderr
    drawn = run(commands / "fusechat", "tokens", fused, models["gemma"], "--text", "Hello.", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    source = f"sources.mistral={as_quantised(models['mistral'], tmp_path / 'quantised')}"
    planned = run(commands / "fusechat", "plan", recipe, "--device", "cpu", "--set", source, cwd=tmp_path)
    assert planned.returncode == 2
    assert "mistral (" in planned.stderr
    assert "pip install 'fusechat[bitsandbytes]'" in planned.stderr
