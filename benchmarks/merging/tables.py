"""The figures of all methods as Markdown tables."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from merging.reference import Difference
from merging.running import Run

MERGEKIT, FUSECHAT = "mergekit", "FuseChat"
NOTHING = "–"
GIGABYTE = 1e9


@dataclass
class Result:
    """`runs`: tool → its fastest run. `inside`: seconds that FuseChat counts itself, starting up not among them. `reading` and
    `writing`: seconds for the bytes alone. `first`: seconds of a merge of small models with nothing compiled, and again."""

    case: str
    random: bool
    runs: dict[str, Run]
    inside: float
    reading: float
    writing: float
    differences: dict[str, Difference]
    first: tuple[float, float] | None

    @property
    def bytes_once(self) -> float:
        return self.reading + self.writing


Column = tuple[str, Callable[[Result], str]]


def tables(results: list[Result], tools: list[str]) -> Iterator[str]:
    """Time and memory, exactness, and where it was measured the first call; no column for a tool that did not run."""
    yield table("Time and memory", list(time_and_memory(tools)), results)
    yield table("Difference from float64", list(exactness(tools)), results)
    if any(result.first for result in results):
        yield table("FuseChat's first call, on small models", list(first_call()), results)


def table(title: str, columns: list[Column], results: list[Result]) -> str:
    columns = [("method", lambda result: result.case), *columns]
    rows = [[heading for heading, _ in columns], ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(result) for _, cell in columns] for result in results]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in rows)])


def time_and_memory(tools: list[str]) -> Iterator[Column]:
    for tool in tools:
        yield f"{tool}, s", of_run(tool, lambda _, run: f"{run.seconds:.2f}")
    if MERGEKIT in tools:
        yield "times as fast", ratio(lambda run: run.seconds)
    yield "without starting up, s", lambda result: f"{result.inside:.2f}"
    yield "bytes read and written once, s", lambda result: f"{result.reading:.2f} + {result.writing:.2f}"
    for tool in tools:
        yield f"{tool} to bytes once", of_run(tool, lambda result, run: f"{run.seconds / result.bytes_once:.1f}")
    for tool in tools:
        yield f"{tool}, peak GB", of_run(tool, lambda _, run: f"{run.memory / GIGABYTE:.2f}")
    if MERGEKIT in tools:
        yield "times less memory", ratio(lambda run: run.memory)


def exactness(tools: list[str]) -> Iterator[Column]:
    figures: dict[str, Callable[[Difference], str]] = {
        "largest difference": lambda found: f"{found.largest:.3e}",
        "beyond rounding": lambda found: f"{max(found.beyond, 0):.1e}",
        "share not the nearest bfloat16": lambda found: share(found.not_nearest, found.elements),
        "share that float32's rounding does not explain": lambda found: share(found.unexplained, found.elements),
    }
    for heading, text in figures.items():
        for tool in tools:
            yield f"{tool}: {heading}", of_difference(tool, text)


def first_call() -> Iterator[Column]:
    yield "nothing compiled before, s", lambda result: f"{result.first[0]:.1f}" if result.first else NOTHING
    yield "again, s", lambda result: f"{result.first[1]:.1f}" if result.first else NOTHING


def of_run(tool: str, text: Callable[[Result, Run], str]) -> Callable[[Result], str]:
    return lambda result: text(result, result.runs[tool]) if tool in result.runs else NOTHING


def ratio(figure: Callable[[Run], float]) -> Callable[[Result], str]:
    """mergekit's figure to FuseChat's."""
    return of_run(MERGEKIT, lambda result, run: f"{figure(run) / figure(result.runs[FUSECHAT]):.1f}")


def of_difference(tool: str, text: Callable[[Difference], str]) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        if result.random and tool == MERGEKIT:
            return "random"  # its masks are not ours
        return text(result.differences[tool]) if tool in result.differences else NOTHING

    return cell


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1e}" if part else "0"
