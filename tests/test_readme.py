"""What README and docs say is so: commands exist, the tree is the tree, every key of the recipe is explained."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import runs
from fusechat.recipe.schema import Recipe, SourceSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_that_the_readme_shows_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= set(targets)
    verbs = re.findall(r"`fusechat ([a-z]+) ([^`]*)`", README)
    assert {verb for verb, _ in verbs} >= {"run", "status", "report", "merge", "tokens", "eval", "chat"}
    for verb, arguments in verbs:
        words = [verb, arguments.split()[0]] if verb == "eval" else [verb]
        shown = runs.fusechat(*words, "--help")
        assert shown.returncode == 0, verb
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in shown.stdout, f"fusechat {verb} {option}"


def test_every_file_in_the_tree_exists_and_every_module_stands_in_it() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"[a-z_]+\.py", tree))
    existing = {file.name for file in (ROOT / "src").rglob("*.py")}
    assert named <= existing
    for file in (ROOT / "src" / "fusechat" / "core").glob("*.py"):
        assert file.name in named or file.name == "__init__.py", f"core/{file.name} is not in the README's tree"
    for file in (ROOT / "src" / "fusechat").glob("*.py"):
        assert file.name in named or file.name in ("__init__.py", "__main__.py"), file.name
    for folder in (path for path in (ROOT / "src" / "fusechat").iterdir() if (path / "__init__.py").is_file()):
        assert f"{folder.name}/" in tree


def test_every_key_of_the_recipe_is_explained() -> None:
    explained = set(re.findall(r"`([a-z_0-9<>.]+)`", (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")))
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        inner = getattr(section, "model_fields", None)
        if inner is None or name == "pivot":
            assert name in explained or f"{name}.<name>" in explained, name
        else:
            for key, setting in inner.items():
                assert f"{name}.{setting.alias or key}" in explained, f"{name}.{key}"
    for key in SourceSpec.model_fields:
        assert f"sources.<name>.{key}" in explained or key in explained, key


def test_the_arithmetic_data_is_what_its_program_writes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "make_arithmetic.py", tmp_path)
    (tmp_path / "data").mkdir()
    subprocess.run([sys.executable, str(tmp_path / "make_arithmetic.py")], check=True)
    for name in ("arithmetic.train.jsonl", "arithmetic.held-out.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (ROOT / "examples" / "data" / name).read_bytes()
