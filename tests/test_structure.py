"""The shape that DESIGN gives the code: dependencies point one way, public names are few."""

import ast
from pathlib import Path

import fusechat
import fusechat.align
import fusechat.fuse
import fusechat.merge
from fusechat.merge.methods import load_method, method_names
from fusechat.merge.parameters import Parameter

ROOT = Path(fusechat.__file__).parent
STAGES = ("prepare", "capture", "align", "fuse", "merge", "evaluate", "report")
KNOW_CONFIG = {"cli", "pipeline", "alignment", "evaluation", "recipe_file", "config", "settle"}
ALSO_KNOW_CONFIG = (".stage", "plan.command", "plan.before")


def imports(file: Path) -> set[str]:
    """The modules of fusechat that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fusechat":
            inner = node.module.removeprefix("fusechat").lstrip(".")
            found |= {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
    return found


def module(file: Path) -> str:
    return str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")


def test_dependencies_point_one_way() -> None:
    for file in ROOT.rglob("*.py"):
        here = module(file)
        package = here.split(".")[0]
        for imported in imports(file):
            target = imported.split(".")[0]
            if package == "core":
                assert target in ("core", "errors", "__version__"), f"{here} imports {imported}"
            elif package == "errors":
                raise AssertionError(f"errors imports {imported}")
            elif package in STAGES:
                allowed = {package, "core", "errors", "__version__"}
                allowed |= {"config"} if here.endswith(".stage") else set()
                allowed |= {"show"} if package == "report" else set()  # aligned text is drawn in one way
                assert target in allowed, f"{here} imports {imported}"
            if target == "config":
                assert package in KNOW_CONFIG or here.endswith(ALSO_KNOW_CONFIG), f"{here} knows the recipe"


def test_files_are_of_a_size_that_one_reads_in_a_sitting() -> None:
    for file in ROOT.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 300, file


def test_public_names() -> None:
    assert fusechat.align.__all__ == ["align_starts", "token_spans"]
    assert fusechat.fuse.__all__ == ["fusion_loss"]
    assert all(callable(getattr(fusechat.align, name)) for name in fusechat.align.__all__)
    assert callable(fusechat.fuse.fusion_loss)
    assert fusechat.merge.__all__ == ["merge"]
    assert callable(fusechat.merge.merge)


def test_a_merging_method_is_a_file_that_has_what_every_method_has_and_stands_in_the_docs() -> None:
    page = (ROOT.parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
    for name in method_names():
        method = load_method(name)
        assert callable(method.measure)
        assert callable(method.combine)
        assert all(isinstance(parameter, Parameter) for parameter in method.PARAMETERS)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{parameter.name}`" in row or "as `dare_linear`" in row for parameter in method.PARAMETERS), name
