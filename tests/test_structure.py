"""The rooms of the code: imports point down only, no stage imports another, no circle; files are short, public names few."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fusechat
import fusechat.align
import fusechat.fuse
import fusechat.merge
from fusechat.merge.methods import load_method, method_names
from fusechat.merge.parameters import Parameter

ROOT = Path(fusechat.__file__).parent
STAGES = ("generate", "prepare", "capture", "align", "fuse", "rounds", "merge", "evaluate")
FLOORS = (
    *(("__main__",), ("commands",), ("plan",), ("pipeline",), ("report",), ("show",), STAGES),
    *(("recipe",), ("models",), ("data",), ("run",), ("errors",)),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module(file: Path) -> str:
    return ".".join(part for part in file.relative_to(ROOT).with_suffix("").parts if part != "__init__")


MODULES = {module(file): file for file in ROOT.rglob("*.py")}


def imports(name: str) -> set[str]:
    """The modules of fusechat that a module imports anywhere in it, in functions and for types too; '' is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            if node.module and node.module.split(".")[0] == "fusechat":
                inner = node.module.removeprefix("fusechat").lstrip(".")
                below = (f"{inner}.{alias.name}".lstrip(".") for alias in node.names)
                found |= {one if one in MODULES else inner for one in below}
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.split(".")[0] == "fusechat"]
            found |= {one.removeprefix("fusechat").lstrip(".") for one in dotted}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("fusechat."):
            inner = node.value.removeprefix("fusechat.")
            found |= {inner} & set(MODULES)  # as a name for importlib
    return found


def test_every_module_is_in_a_room() -> None:
    for name in MODULES:
        assert not name or name.split(".")[0] in FLOOR, f"{name} is in no room"


def test_imports_point_down_and_no_stage_imports_another() -> None:
    for name in filter(None, MODULES):
        room = name.split(".")[0]
        for imported in filter(None, imports(name)):
            other = imported.split(".")[0]
            assert other == room or FLOOR[other] > FLOOR[room], f"{name} imports {imported}"


def test_the_package_itself_brings_the_errors_alone_and_no_module_takes_names_from_it() -> None:
    """What else it names is imported when it is first used, or by type checkers: so it may name what it likes."""
    brought = [node.module for node in ast.parse(MODULES[""].read_text()).body if isinstance(node, ast.ImportFrom)]
    assert brought == ["importlib", "typing", "fusechat.errors"]
    for name in filter(None, MODULES):
        for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "fusechat":
                taken = {alias.name for alias in node.names} - MODULES.keys() - {"__version__"}
                assert not taken, f"{name} imports {taken} from the package itself"


def test_no_circles() -> None:
    graph = {name: imports(name) - {name, ""} for name in filter(None, MODULES)}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_files_are_of_a_size_that_one_reads_in_a_sitting() -> None:
    for file in ROOT.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 300, file


def test_public_names() -> None:
    errors = (
        "DataError",
        "FuseChatError",
        "ModelError",
        "RecipeError",
        "StorageError",
        "TrainingError",
        "WorkdirError",
    )
    functions = ("load_recipe", "run_recipe", "plan_recipe", "merge_models", "align_text")
    values = ("Recipe", "Run", "TextAlignment", "align_starts", "fusion_loss", "token_spans")
    assert fusechat.__all__ == sorted([*errors, *functions, *values])
    assert all(callable(getattr(fusechat, name)) for name in fusechat.__all__)
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
