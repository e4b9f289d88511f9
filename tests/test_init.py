"""The first minutes: `fusechat init`, what a run prints to continue with, links from errors to the docs, shell completion."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from fusechat.commands.init import init
from fusechat.errors import FuseChatError
from fusechat.pipeline import load_recipe
from fusechat.recipe.anchors import anchors, links
from fusechat.recipe.load import save_recipe
from test_readme import anchors as page_anchors

MODELS = {"pivot": "org/pivot", "data": "org/talks"}  # of the hub, which no test reaches


@pytest.fixture
def place(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with models and conversations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models").mkdir()
    for kind in models:
        (tmp_path / "my models" / kind).symlink_to(models[kind])
    runs.write_conversations(tmp_path / "train.jsonl", 10)
    runs.write_conversations(tmp_path / "held out.jsonl", 5, first=200)
    return tmp_path


def refused(*arguments: str | Path) -> list[str]:
    """The error lines of `init` without their prefix, where it ends with status 2 and nothing on stdout."""
    ended = runs.here("init", *arguments)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    lines = ended.stderr.splitlines()
    assert all(line.startswith("fusechat: error: ") for line in lines), lines
    return [line.removeprefix("fusechat: error: ") for line in lines]


def written(out: str = "recipe.yaml", **given: Any) -> Any:
    """The recipe that is written for models of the hub, as YAML has it; the plan then finds that they cannot be fetched."""
    options = {**MODELS, "sources": [], "validation": None, "name": None, "force": True, **given}
    with pytest.raises(FuseChatError, match="the hub gave no such model"):
        init(out=Path(out), **options)
    return yaml.safe_load(Path(out).read_text(encoding="utf-8"))


def test_the_written_recipe_runs_to_the_end_and_every_line_printed_then_works(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--pivot", "my models/llama", "--source", "teacher=my models/mistral")
    begun = runs.here(
        *("init", *given, "--data", "train.jsonl", "--validation", "held out.jsonl", "--out", "a b/first recipe.yaml")
    )
    assert begun.returncode == 0, begun.stderr
    first, *_, takes, last = begun.stdout.splitlines()
    assert first == "wrote a b/first recipe.yaml"
    assert re.fullmatch(r"takes about .* s, .* of disk, .* of memory on cpu; step by step: .*", takes)
    assert "note: steps of fine-tuning: 1; " in begun.stdout
    recipe = load_recipe(Path("a b/first recipe.yaml"))
    assert list(recipe.sources) == ["teacher"]
    _, *arguments = shlex.split(last.removeprefix("run it:  "))
    done = runs.here(*arguments)
    assert done.returncode == 0, done.stderr

    fused = Path("runs/llama-fused/merge/model")
    assert fused.is_dir()
    steps = done.stdout.partition("\nnext:\n")[2].splitlines()
    commands = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in steps if line.startswith("  "))
    words = {what: shlex.split(command) for what, command in commands.items()}
    assert words["serve on GPUs"] == ["vllm", "serve", str(fused)]
    assert words["write as GGUF"][3:] == [str(fused), "--outfile", "llama-fused.gguf"]
    assert runs.here("report", "runs/llama-fused").stdout == done.stdout

    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))
    chatted = runs.here(*words["chat"][1:], "--max-new-tokens", "3")
    assert (chatted.returncode, len(chatted.stdout) > 1) == (0, True), chatted.stderr
    browser = place / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > opened\n')
    browser.chmod(0o755)
    python, *module = words["open the report"]
    assert python == "python"
    subprocess.run([sys.executable, *module], env=os.environ | {"BROWSER": str(browser)}, check=True)
    assert (place / "opened").read_text().strip() == (place / "runs/llama-fused/report/index.html").as_uri()
    _push(words["push to the hub"], fused, monkeypatch)
    _serve(words["serve"], fused, monkeypatch)


def _push(words: list[str], fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own command takes the line: it makes the repository and uploads the directory."""
    from huggingface_hub import HfApi, RepoUrl
    from huggingface_hub.cli.hf import main

    calls: list[Any] = []
    url = RepoUrl("https://huggingface.co/someone/llama-fused")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: calls.append(repo_id) or url)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: calls.append(given["folder_path"]))
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.suppress(SystemExit, AttributeError):  # it would print an address that an upload gives
        main()
    assert calls == ["llama-fused", str(fused)]


def _serve(words: list[str], fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own command takes the line, and then asks for its server's packages."""
    from transformers.cli import serve
    from transformers.cli.transformers import main

    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    monkeypatch.setattr(sys, "argv", words)
    assert words[2:] == [str(fused)]
    with pytest.raises(ImportError, match="Missing dependencies for serving"):
        main()


def test_without_held_out_conversations_recipe_and_terminal_say_what_is_not_measured(place: Path) -> None:
    given = ("--pivot", "my models/llama", "--source", "my models/mistral", "--data", "train.jsonl")
    begun = runs.here("init", *given)
    assert begun.returncode == 0, begun.stderr
    assert (
        "note: without held-out conversations (--validation), nothing is measured: no bits per byte, " in begun.stdout
    )
    text = Path("recipe.yaml").read_text()
    assert "  # validation: held-out.jsonl  # without it, nothing is measured" in text
    Path("recipe.yaml").write_text(text.replace("# validation: held-out.jsonl", "validation: held out.jsonl"))
    assert [data.path for data in load_recipe(Path("recipe.yaml")).validation_sets()] == [str(place / "held out.jsonl")]


def test_for_prompts_without_answers_the_sources_answer(place: Path) -> None:
    """Of a file with answers, a comment says how."""
    (place / "prompts.jsonl").write_text('{"prompt": "What is 1 + 2?"}\n{"prompt": "What is 2 + 2?"}\n')
    given = ("--pivot", "my models/llama", "--source", "my models/mistral")
    found = {}
    for name in ("prompts", "train"):
        begun = runs.here("init", *given, "--data", f"{name}.jsonl", "--out", f"{name}.yaml")
        assert begun.returncode == 0, begun.stderr
        found[name] = load_recipe(Path(f"{name}.yaml"))
    assert found["train"].generate is None
    assert (found["train"].fuse.sft_weight, found["prompts"].fuse.sft_weight) == (0.9, 0.3)
    assert found["prompts"].generate is not None
    assert found["prompts"].generate.max_new_tokens == 512
    text = (
        Path("train.yaml").read_text().replace("# generate:", "generate:").replace("sft_weight: 0.9", "sft_weight: 0.3")
    )
    assert load_recipe_text(place, text).generate == found["prompts"].generate


def load_recipe_text(place: Path, text: str) -> Any:
    (place / "changed.yaml").write_text(text)
    return load_recipe(place / "changed.yaml")


def test_sources_without_a_name_get_valid_ones_that_differ(place: Path) -> None:
    references = {
        "org/Model": "Model",
        "other/model": "model-2",
        "third/MODEL@v1": "MODEL-3",
        "org/data": "data-2",
        "org/Pivot": "Pivot-2",
        "org/7b..x--y-": "7b.x-y",
        "wheel:dist==1.0/a/größer-270m-q4_k_m.gguf.part00": "gr-er-270m",
        "my models/llama": "llama-2",
        "llama=org/llama": "llama",
        "LLAMA-3=org/llama": "LLAMA-3",
        "mine=org/a": "mine",
    }
    found = written(sources=list(references))
    assert list(found["sources"]) == list(references.values())
    assert found["name"] == "pivot-fused"
    assert found["sources"]["mine"] == "org/a"
    assert found["sources"]["llama-2"] == "./my models/llama"
    assert written(sources=["org/a"], pivot="org/x_", name="5e6")["name"] == "5e6"
    number = load_recipe(Path("recipe.yaml"))
    assert number.name == "5e6", "a text, though without quotes recipes have it for a number"
    save_recipe(number, Path("saved.yaml"))
    assert load_recipe(Path("saved.yaml")) == number
    for label in ("true", "1", "null", "1e5", "no", "2025-01-31", "0x1f"):
        written(sources=[f"org/{label}"])
        assert list(load_recipe(Path("recipe.yaml")).sources) == [label]


def test_paths_are_those_that_were_meant_as_seen_from_the_recipe(
    place: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "deep" / "here").mkdir(parents=True)
    (place / "deep" / "own").symlink_to(models["gemma"])
    (place / "home").mkdir()
    (place / "a #b: {c}.jsonl").write_text((place / "train.jsonl").read_text())
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.chdir(place / "deep")
    sources = ["a=../my models/llama", f"b={place / 'deep' / 'own'}", f"c={models['gemma']}", "d=~", "e=.", "f=org/f"]
    expected = {
        "a": "../../my models/llama",
        "b": "../own",
        "c": str(models["gemma"]),
        "d": str(place / "home"),
        "e": "..",
        "f": "org/f",
    }
    for out in ("here/recipe.yaml", str(place / "deep" / "here" / "recipe.yaml")):
        found = written(out, sources=sources, data="../a #b: {c}.jsonl", validation="../held out.jsonl")
        absolute = out.startswith("/")
        assert found["sources"] == {**expected, "b": str(place / "deep" / "own")}
        recipe = load_recipe(Path(out))
        assert {name: Path(str(one.model)).resolve() for name, one in recipe.sources.items() if name != "f"} == {
            "a": models["llama"].resolve(),
            "b": models["gemma"].resolve(),
            "c": models["gemma"].resolve(),
            "d": place / "home",
            "e": place / "deep",
        }, absolute
        assert [data.path for data in recipe.all_training_sets()] == [str(place / "a #b: {c}.jsonl")]
        assert [data.path for data in recipe.validation_sets()] == [str(place / "held out.jsonl")]
    found = written("recipe.yaml", sources=sources)
    assert found["sources"]["b"] == "./own", "an absolute path in the recipe's directory"


def test_what_cannot_be_right_is_named_by_its_option_and_nothing_is_written(place: Path) -> None:
    right = {"--pivot": "my models/llama", "--source": "my models/mistral", "--data": "train.jsonl"}
    (place / "notes.txt").write_text("not conversations")
    nothing = "'nosuch' is neither a directory, a .gguf file, a wheel: reference nor a hub id"
    for changes, expected in (
        ({"--pivot": "nosuch"}, [f"--pivot: {nothing}"]),
        ({"--source": "nosuch"}, [f"--source: {nothing}"]),
        ({"--source": "a=nosuch"}, [f"--source: {nothing}"]),
        ({"--source": "a="}, ["--source: a=: names no model"]),
        ({"--source": "Fused=my models/mistral"}, ["--source: 'Fused': this name is taken; choose another"]),
        (
            {"--source": "a b=my models/mistral"},
            ["--source: 'a b': a name holds letters, digits, '.', '_' and '-' only,"],
        ),
        ({"--pivot": "none.gguf"}, ["--pivot: none.gguf: no such file"]),
        ({"--data": "none.jsonl"}, ["--data: none.jsonl: no such file"]),
        ({"--data": "notes.txt"}, ["--data: notes.txt: unknown kind of data file; use .jsonl, .json,"]),
        ({"--data": "my models"}, ["--data: my models: is a directory; name the file of conversations in it"]),
        ({"--validation": "none.json"}, ["--validation: none.json: no such file"]),
        ({"--name": "ti/ny"}, ["--name: 'ti/ny': a name holds letters,"]),
        ({"--out": "my models"}, ["--out my models: is not a file"]),
        ({"--out": "/dev/null"}, ["--out /dev/null: is not a file"]),
        ({"--out": "train.jsonl/recipe.yaml"}, ["--out train.jsonl/recipe.yaml: cannot be written (File exists)"]),
        ({"--pivot": "nosuch", "--data": "none.jsonl"}, [f"--pivot: {nothing}", "--data: none.jsonl: no such file"]),
        ({"--pivot": ""}, ["--pivot: missing; see fusechat init --help"]),
    ):
        lines = refused(*(word for pair in (right | changes).items() for word in pair))
        assert [line.startswith(start) for line, start in zip(lines, expected, strict=True)] == [True] * len(lines), (
            lines
        )
    both = ("--source", "A=my models/mistral", "--source", "a=my models/gemma")
    assert refused("--pivot", "my models/llama", "--data", "train.jsonl", *both) == [
        "--source: a: two sources have this name"
    ]
    assert refused() == ["--pivot, --source, --data: missing; see fusechat init --help"], "where nobody can be asked"
    assert not (place / "recipe.yaml").exists()


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(place: Path) -> None:
    Path("recipe.yaml").write_text("mine\n")
    given = ("--pivot", "org/pivot", "--source", "org/a", "--data", "train.jsonl")
    assert refused(*given) == ["recipe.yaml: exists; choose another --out, or replace it with --force"]
    assert Path("recipe.yaml").read_text() == "mine\n"
    assert runs.here("init", *given, "--force").returncode == 2
    assert load_recipe(Path("recipe.yaml")).pivot.model == "org/pivot"


def test_what_the_plan_finds_is_told_a_line_each_after_the_recipe_is_written(place: Path) -> None:
    Path("bad.jsonl").write_text('{"text": "no messages"}\nnot JSON\n')
    given = ("--pivot", "my models/llama", "--source", "my models/mistral")
    for data, source, expected in (
        ("bad.jsonl", "my models/mistral", ['bad.jsonl:1: neither "messages"', "bad.jsonl:2: not JSON"]),
        ("train.jsonl", "my models/gemma", ["gemma): has no chat template"]),
    ):
        ended = runs.here("init", "--pivot", "my models/llama", "--source", source, "--data", data, "--force")
        assert ended.returncode == 2
        assert ended.stdout.splitlines()[-1] == "fix what follows, then run: fusechat run recipe.yaml"
        errors = [line for line in ended.stderr.splitlines() if "fusechat: error: " in line]
        assert all(any(what in line for line in errors) for what in expected), errors
        assert Path("recipe.yaml").is_file()
    runs.write_recipe(place / "my models", {kind: place / "my models" / kind for kind in ("llama", "mistral", "gemma")})
    (place / "runs" / "llama-fused").mkdir(parents=True)
    (place / "runs" / "llama-fused" / "precious").touch()
    ended = runs.here("init", *given, "--data", "train.jsonl", "--force")
    assert "runs/llama-fused: is not empty and no work directory of FuseChat" in ended.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_missing_is_asked_for_on_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        "nosuch",
        "org/pivot",
        "",
        "a=org/a",
        "my models/mistral",
        "",
        "none.jsonl",
        "org/talks",
        "held out.jsonl",
    ]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    ended = runs.here("init")
    assert ended.returncode == 2, "the models are not here"
    for refusal in ("'nosuch' is neither a directory", "none.jsonl: no such file"):
        assert f"Error: {refusal}" in ended.stderr
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert (recipe["pivot"], recipe["data"]["train"]) == ("org/pivot", "org/talks")
    assert recipe["data"]["validation"] == "held out.jsonl"
    assert recipe["sources"] == {"a": "org/a", "mistral": "./my models/mistral"}
    monkeypatch.setattr(sys, "stdin", Terminal("org/other\n"))
    ended = runs.here("init", "--source", "org/a", "--data", "org/talks", "--validation", "held out.jsonl", "--force")
    assert yaml.safe_load(Path("recipe.yaml").read_text())["pivot"] == "org/other", "nothing else was asked for"
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    ended = runs.here("init", "--out", "other.yaml")
    assert (ended.returncode, Path("other.yaml").exists()) == (130, False), "the terminal was closed"
    assert ended.stderr.splitlines()[-1].startswith("fusechat: error: interrupted")


def test_every_link_leads_to_an_entry_of_the_recipe_page_and_every_entry_is_linked_to() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert anchors() <= page_anchors(page)
    assert set(re.findall(r'<a id="([^"]+)">', page)) <= anchors()


def test_the_longest_part_of_a_key_that_has_an_entry_is_linked_to() -> None:
    for message, expected in (
        ("r.yaml:3: fuse.sft_weight: Input should be less", ["fuse.sft_weight"]),
        ("r.yaml:3: fuse.sft_wieght: unknown key; did you mean sft_weight?", ["fuse"]),
        ("r.yaml: name: is missing", ["name"]),
        ("r.yaml:3: sede: unknown key; did you mean seed?", []),
        ("r.yaml:3: sources.pivot: this name is taken", ["sources"]),
        ("r.yaml:3: sources.Qwen2.5-0.5B.commit: should be", ["pivot.commit"]),
        ("r.yaml:3: sources.a.data.train.0.limit: should be", ["data.train.limit"]),
        ("r.yaml:3: sources.a.capture.topk: unknown key", ["sources.NAME.capture"]),
        ("r.yaml:3: sources.a.data.valdiation: unknown key", ["sources.NAME.data"]),
        ("r.yaml:3: data.validation.split: should be", ["data.train.split"]),
        ("r.yaml:3: data.validation: should be", ["data.validation"]),
        ("r.yaml:3: merge.lambda: should be", ["merge.lambda"]),
        ("r.yaml:3: data: source a has no data: set data.train for all, or its own", ["data", "data.train"]),
        ("mend them, or set data.on_error: skip", ["data.on_error"]),
        ("data.train.jsonl:3: not JSON", []),
        ("data/merge.dtype: no such file", []),
        ("/runs/merge.yaml: no such file", []),
        ("pivot: no conversation of data can be used: it holds no records", []),
    ):
        assert links([message]) == [f"docs/recipe.md#{anchor}" for anchor in expected], message


def test_errors_are_followed_by_their_links_each_once(place: Path) -> None:
    recipe = runs.write_recipe(place, {kind: place / "my models" / kind for kind in ("llama", "mistral", "gemma")})
    changes = ("fuse.loss=mse", "fuse.lost=kl", "sources.mistral.captur=3", "align.top_k=0", "align.top_1=0")
    ended = runs.here("run", recipe, *(word for change in changes for word in ("--set", change)))
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert [line.startswith("fusechat: error: ") for line in lines] == [True] * 5 + [False] * 5
    assert set(lines[5:]) == {
        f"see docs/recipe.md#{anchor}" for anchor in ("sources", "align.top_1", "align.top_k", "fuse.loss", "fuse")
    }
    Path("merge.yaml").write_text("name: 3\n")
    assert "see docs" not in runs.here("merge", "merge.yaml", "out").stderr, "whose keys are explained elsewhere"


def test_completion_for_the_shell() -> None:
    code = "import sys; sys.argv = ['fusechat', *sys.argv[1:]]; from fusechat.commands.cli import main; main()"
    program = [sys.executable, "-c", code]

    def ended(*arguments: str, **environment: str) -> str:
        words = ["bash", "-c", f"{shlex.join([*program, *arguments])}; exit $?"]  # the shell that is asked for
        done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
        return done.stdout

    script = ended("--show-completion")
    assert "complete -o default -F _fusechat_completion fusechat" in script
    for typed, expected in (("in", ["init"]), ("re", ["report"]), ("init --va", ["--validation"])):
        words = f"fusechat {typed}"
        index = str(len(words.split()) - 1)
        found = ended(_FUSECHAT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=index)
        assert found.split() == expected
    shown = ended("--help", COLUMNS="80")
    assert len(shown.splitlines()) < 45
    assert max(map(len, shown.splitlines())) <= 80
