"""What README and docs say is so: commands exist, the tree is the tree, every key of the recipe is explained."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import runs
from fusechat.models.verifiers import contains
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
        shown = runs.here(*words, "--help")
        assert shown.returncode == 0, verb
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in shown.stdout, f"fusechat {verb} {option}"


def test_the_readme_is_read_in_three_minutes_and_no_line_of_a_document_is_long() -> None:
    assert len(README.split("## Reference")[0].split()) <= 700
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        long = [number for number, line in enumerate(page.read_text("utf-8").splitlines(), 1) if len(line) >= 120]
        assert not long, f"{page}: lines {long} have 120 characters or more"


def test_links_between_documents_lead_somewhere() -> None:
    pages = {page.resolve(): page.read_text("utf-8") for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            where, _, anchor = link.partition("#")
            target = (page.parent / where).resolve() if where else page
            if not link.startswith("http"):
                assert target.exists(), f"{page}: {link}"
                assert not anchor or anchor in anchors(pages[target]), f"{page}: {link}"


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them, and those that a page sets itself."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*words, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def test_every_module_stands_in_the_tree_and_every_file_of_the_tree_exists() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## The tree")[1]
    rooms = dict(re.findall(r"^  ([a-z]+)/ .*\n((?:    .*\n)*)", tree, flags=re.MULTILINE))
    src = ROOT / "src" / "fusechat"
    for room in (path for path in src.iterdir() if (path / "__init__.py").is_file()):
        named = set(re.findall(r"[a-z_0-9]+\.py", rooms[room.name]))
        assert named == {file.name for file in room.glob("*.py")} - {"__init__.py"}, room.name
    for file in src.glob("*.py"):
        assert file.name == "__main__.py" or f"  {file.name} " in tree, file.name


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


def test_the_data_of_examples_are_what_their_programs_write(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "examples" / "data" / "words.txt", tmp_path / "data")
    for program in ("make_arithmetic.py", "make_words.py"):
        shutil.copy(ROOT / "examples" / program, tmp_path)
        subprocess.run([sys.executable, str(tmp_path / program)], check=True)
    written = {file.name: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    assert len(written) == 1 + 2 + 5
    for name, content in written.items():
        assert content == (ROOT / "examples" / "data" / name).read_bytes(), name


def test_the_words_of_the_quickstart_are_held_out_as_it_says() -> None:
    """No question is asked in training, no new word either; a reference is never in its own question."""
    data = ROOT / "examples" / "data"
    rows = {file: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in data.glob("*.jsonl")}
    asked = {one["prompt"] for records in rows.values() for one in records if "prompt" in one}
    held_out = [one for file, records in rows.items() for one in records if "reference" in one]
    assert (len(asked), len(held_out)) == (480, 200)
    trained = {re.findall(r"'(.+)'", question)[0] for question in asked}
    new = [json.loads(line) for line in (data / "new-words.held-out.jsonl").read_text("utf-8").splitlines()]
    assert not trained & {re.findall(r"'(.+)'", one["messages"][0]["content"])[0] for one in new}
    for one in held_out:
        question, answer = (message["content"] for message in one["messages"])
        assert question not in asked
        assert answer in one["reference"]
        assert not any(contains({"answer": question, "reference": right}) for right in one["reference"])
