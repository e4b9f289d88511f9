"""Private names of libraries: all in one module, and said in a line where a new version no longer has one."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

import fusechat
from fusechat.errors import FuseChatError
from fusechat.models import library_internals
from fusechat.models.library_internals import NAMES, SamplerHooks, gone

SOURCES = Path(fusechat.__file__).parent
PUBLIC = {"_exit"}  # of os: documented, for all its name


def test_the_installed_versions_have_all_of_them() -> None:
    lines = "\n".join(gone())
    assert not lines, f"{lines}\nSee {library_internals.__file__}: find a public way, or the name's successor."


def test_a_name_that_is_gone_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Trainer, "_get_train_sampler")
    (line,) = gone()
    assert line.startswith(
        f"transformers {transformers.__version__} has no Trainer._get_train_sampler, which FuseChat needs"
    )
    with pytest.raises(FuseChatError, match="install an older version of transformers"):
        type("Late", (SamplerHooks, transformers.Trainer), {})


def private(tree: ast.AST) -> Iterator[str]:
    """Names with one leading underscore that are read from an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_"):
                yield str(name.value)


def own(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives its own functions, classes, fields and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id in ("self", "cls") else []


def test_no_other_module_uses_one() -> None:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES.rglob("*.py")}
    here = Path(library_internals.__file__)
    known = {name for file, tree in trees.items() if file != here for name in own(tree)} | PUBLIC
    for file, tree in trees.items():
        strange = {name for name in private(tree) if name not in known}
        if file == here:
            assert strange == {path.rpartition(".")[2] for path in NAMES}, "every one is listed, with its reason"
        else:
            assert not strange, f"{file}: {', '.join(strange)}: belongs to a library; see {here}"


def test_what_is_ours_has_no_name_of_the_librarys() -> None:
    """A subclass that sets or defines a private name of its base changes the base without a word."""
    sources = "".join(inspect.getsource(module) for module in (transformers.trainer, transformers.training_args))
    theirs = set(re.findall(r"\b(?:self|def|cls)[. ](_[a-z]\w*)", sources))
    for name in ("trainer.py", "training.py"):
        ours = set(own(ast.parse((SOURCES / "fuse" / name).read_text(encoding="utf-8"))))
        assert not (found := theirs & ours), f"{name}: {', '.join(found)}: see {library_internals.__file__}"
