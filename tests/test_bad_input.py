"""Bad recipes and bad options: exit status 2, a line for each mistake that says where
it is, no traceback, and nothing marked done."""

import contextlib
import io
import logging
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

import runs
from fusechat.commands.cli import main

PREFIX = "fusechat: error: "
_PROGRESS = re.compile(
    r"(answers|prepare|capture|align|count|transfer|fuse|merge|evaluate|report|fetch|convert)(ing)?\b.*"
    r"|[\w-]+: \d+ of \d+ answers end where they became too long"
)
RECIPE = """\
name: tiny
pivot: org/pivot
sources:
  first: org/first
  second:
    model: org/second
    chat_template: "{{ messages }}"
    data:
      train: own.jsonl
data:
  train: train.jsonl
  max_length: 256
capture:
  top_k: 6
fuse:
  sft_weight: 0.5
  training:
    learning_rate: 5e-6
seed: 0
"""


def complaints(*arguments: str | Path) -> list[str]:
    """Runs the command line in this process, which must end with status 2, and returns its error lines without their prefix.

    What stands before them may be progress only, nothing may stand between them, after them only links to the keys that they
    name, and nothing on stdout.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    log = logging.getLogger("fusechat")
    state = log.handlers[:], log.level, log.propagate
    try:
        with (
            mock.patch.object(sys, "argv", ["fusechat", *map(str, arguments)]),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        log.handlers[:], log.level, log.propagate = state
    assert ended.value.code == 2
    assert stdout.getvalue() == ""
    lines = stderr.getvalue().splitlines()
    while lines and lines[-1].startswith("see docs/recipe.md#"):
        del lines[-1]
    errors = [line for line in lines if line.startswith(PREFIX)]
    assert lines[len(lines) - len(errors) :] == errors, lines
    assert [line for line in lines[: len(lines) - len(errors)] if not _PROGRESS.fullmatch(line)] == []
    return [line.removeprefix(PREFIX) for line in errors]


def done(workdir: Path) -> list[str]:
    """The steps that are marked done."""
    return sorted(str(manifest.parent.relative_to(workdir)) for manifest in workdir.rglob("manifest.json"))


# -- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 0", "sede: 0", ["19: sede: unknown key; did you mean seed?"]),
        (
            "seed: 0",
            "zzzz: 0",
            [
                "19: zzzz: unknown key; known here: name, preset, pivot, sources, generate, targets, data, capture, align,"
            ],
        ),
        ("sft_weight", "sft_wieght", ["16: fuse.sft_wieght: unknown key; did you mean sft_weight?"]),
        ("max_length", "maxlength", ["12: data.maxlength: unknown key; did you mean max_length?"]),
        (
            "chat_template",
            "chat_tempalte",
            ["7: sources.second.chat_tempalte: unknown key; did you mean chat_template?"],
        ),
        (
            "train: own.jsonl",
            "train: own.jsonl\n      valdiation: x",
            ["10: sources.second.data.valdiation: unknown key; did you mean validation?"],
        ),
        (
            "    data:\n      train: own.jsonl",
            "    capture: {topk: 3}\n    data:\n      train: own.jsonl",
            ["8: sources.second.capture.topk: unknown key; did you mean top_k?"],
        ),
        (
            "model: org/second",
            'model: org/second\n    trust_remote_code: "False"',
            ["7: sources.second.trust_remote_code: Input should be a valid boolean, not 'False'"],
        ),
        ("256", '"256"', ["12: data.max_length: Input should be a valid integer, not '256'"]),
        ("256", "256.5", ["12: data.max_length: Input should be a valid integer, not 256.5"]),
        ("top_k: 6", "top_k: true", ["14: capture.top_k: Input should be a valid integer, not True"]),
        ("top_k: 6", "top_k: 0", ["14: capture.top_k: Input should be greater than or equal to 1, not 0"]),
        ("0.5", "1.5", ["16: fuse.sft_weight: Input should be less than or equal to 1, not 1.5"]),
        ("0.5", "half", ["16: fuse.sft_weight: Input should be a valid number, not 'half'"]),
        (
            "sft_weight: 0.5",
            "function: average",
            ["16: fuse.function: Input should be 'mince', 'avgce', 'source' or 'author', not 'average'"],
        ),
        ("capture:\n  top_k: 6", "capture:", ["13: capture: should be a mapping of keys, not nothing"]),
        (
            "capture:\n  top_k: 6",
            "capture: [top_k, 6]",
            ["13: capture: should be a mapping of keys, not list"],
        ),
        ("name: tiny", "name: ti/ny", ["1: name: a name holds letters, digits, '.', '_' and '-' only"]),
        ("name: tiny\n", "", [" name: is missing"]),
        ("seed: 0", "seed: 0\nname: other", ["20: name: stands here twice"]),
        ("sft_weight: 0.5", "sft_weight: 0.5\n  sft_weight: 0.6", ["17: fuse.sft_weight: stands here twice"]),
        ("  first:", "  pivot:", ["4: sources.pivot: this name is taken"]),
        ("  first:", "  Data:", ["4: sources.Data: this name is taken"]),
        ("  first:", "  Second:", ["3: sources: two names differ in case only"]),
        ("  train: train.jsonl\n", "", ["10: data: source first has no data"]),
        (
            "data:\n  train: train.jsonl\n  max_length: 256\n",
            "",
            [" data: source first has no data"],
        ),
        (
            "learning_rate",
            "learning_rte",
            ["17: fuse.training: unknown training argument learning_rte; did you mean learning_rate?"],
        ),
        (
            "learning_rate: 5e-6",
            "output_dir: here",
            ["17: fuse.training: output_dir cannot be set: checkpoints live in"],
        ),
        (
            "learning_rate: 5e-6",
            "enable_jit_checkpoint: true",
            ["17: fuse.training: enable_jit_checkpoint cannot be set: training would end as if it were finished"],
        ),
        ("name: tiny", "name: [tiny", ["2: not YAML: "]),
        ("name: tiny", "\tname: tiny", ["1: not YAML: "]),
        ("seed: 0", "seed: *nowhere", ["19: not YAML: "]),
        ("seed: 0", "? [seed]\n: 0", ["19: not YAML: "]),
        ("seed: 0", "seed: !!python/name:os.system", ["19: not YAML: "]),
        ("seed: 0", "seed: &again [*again]", [" nests too deep, or in itself"]),
        ("seed: 0", f"seed: {'[' * 3000}{']' * 3000}", [" nests too deep, or in itself"]),
        (RECIPE, "- name: tiny\n", [" a recipe is a mapping of keys, not list"]),
        (RECIPE, "tiny\n", [" a recipe is a mapping of keys, not str"]),
        (RECIPE, "", [" a recipe is a mapping of keys, not nothing"]),
        (RECIPE, "# nothing yet\n", [" a recipe is a mapping of keys, not nothing"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_line(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert RECIPE.count(old) == 1
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new))
    found = complaints("run", path, "--workdir", tmp_path / "work")
    assert len(found) == len(expected), found
    for line, what in zip(found, expected, strict=True):
        assert line.startswith(f"{path}:{what}"), line
    assert not (tmp_path / "work").exists()


def test_all_mistakes_of_a_recipe_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("  first: org/first", "  pivot: org/first\n  third: no model")
    text = text.replace("max_length: 256", "max_length: long").replace("0.5", "1.5").replace("seed: 0", "sede: 0")
    text = text.replace("    learning_rate: 5e-6", "    learning_rte: 1\n    seed: 2")
    path.write_text(text + "name: twice\n")
    assert sorted(line.removeprefix(f"{path}:").partition(": ")[0::2] for line in complaints("run", path)) == sorted(
        [
            ("22", "name: stands here twice"),
            ("4", "sources.pivot: this name is taken; choose another"),
            (
                "5",
                "sources.third: 'no model' is neither a directory, a .gguf file, a wheel: reference nor a hub id",
            ),
            ("13", "data.max_length: Input should be a valid integer, not 'long'"),
            ("17", "fuse.sft_weight: Input should be less than or equal to 1, not 1.5"),
            ("18", "fuse.training: unknown training argument learning_rte; did you mean learning_rate?"),
            ("18", "fuse.training: seed cannot be set: set seed at the top of the recipe"),
            ("21", "sede: unknown key; did you mean seed?"),
        ]
    )


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert complaints("run", tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: no such file"]
    [line] = complaints("run", tmp_path)
    assert line.startswith(f"{tmp_path}: cannot be read")
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    [line] = complaints("run", tmp_path / "latin.yaml")
    assert line.startswith(f"{tmp_path / 'latin.yaml'}: cannot be read")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("fuse.sft_weight", "--set fuse.sft_weight: not of the form KEY=VALUE"),
        ("=3", "--set =3: not of the form KEY=VALUE"),
        ("fuse..loss=kl", "--set fuse..loss=kl: not of the form KEY=VALUE"),
        ("fuse.sft_weight=[", "--set fuse.sft_weight=[: the value is not YAML"),
        ("fuse.sft_wieght=1", "{recipe}:15: fuse.sft_wieght: unknown key; did you mean sft_weight?"),
        ("fuse.sft_weight=one", "{recipe}:16: fuse.sft_weight: Input should be a valid number, not 'one'"),
        ("align.top_k=0", "{recipe}: align.top_k: Input should be greater than or equal to 1, not 0"),
        ("align.processes=0", "{recipe}: align.processes: Input should be greater than or equal to 1, not 0"),
        ("align.sequence=dwt", "{recipe}: align.sequence: Input should be 'boundary' or 'dtw', not 'dwt'"),
        (
            "align.vocabulary=MS",
            "{recipe}: align.vocabulary: Input should be 'exact', 'edit' or 'statistics', not 'MS'",
        ),
        ("align.unaligned=gold", "{recipe}: align.unaligned: Input should be 'label', 'skip', 'pivot' or 'condition'"),
        ("align.chain_rule=1", "{recipe}: align.chain_rule: Input should be a valid boolean, not 1"),
        ("align={look_ahead: true, vocabulary: edit}", "{recipe}: align: look_ahead needs vocabulary: statistics"),
    ],
)
def test_a_bad_change_on_the_command_line(tmp_path: Path, change: str, expected: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work", "--set", change)
    assert line.startswith(expected.format(recipe=recipe))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (
            "--until",
            "preapre",
            "no such stage; choose one of generate, prepare, capture, align, fuse, rounds, merge, evaluate, report",
        ),
        ("--only", "mistrall", "the recipe has no such source or target; it has mistral, gemma"),
    ],
)
def test_a_stage_or_source_that_there_is_not(
    tmp_path: Path, models: dict[str, Path], option: str, value: str, expected: str
) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    assert complaints("run", recipe, "--workdir", tmp_path / "work", option, value) == [f"{option} {value}: {expected}"]
    assert done(tmp_path) == []
    assert option != "--until" or not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "nonsense"},
        {"optim": "adamm"},
        {"learning_rate": "fast"},
        {"per_device_train_batch_size": "two"},
        {"per_device_train_batch_size": 0},
    ],
    ids=str,
)
def test_a_bad_value_for_training_is_found_before_any_work(
    tmp_path: Path, models: dict[str, Path], training: dict[str, object]
) -> None:
    recipe = runs.write_recipe(tmp_path, models, fuse={"training": training})
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert "fuse.training" in line
    assert str(next(iter(training.values()))) in line
    assert done(tmp_path) == []


# -- as a process -------------------------------------------------------------------------------------------------------


def test_a_process_says_it_in_a_line_each_and_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("seed", "sede").replace("0.5", "1.5"))
    ended = runs.fusechat("run", path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        f"{PREFIX}{path}:16: fuse.sft_weight: Input should be less than or equal to 1, not 1.5",
        f"{PREFIX}{path}:19: sede: unknown key; did you mean seed?",
        "see docs/recipe.md#fuse.sft_weight",
    ]
