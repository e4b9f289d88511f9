"""Many cases in one test, and fewer combinations of them than all."""

import inspect
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from hypothesis import settings

ALL = os.environ.get("FUSECHAT_TESTS") == "all"  # `make test-all`
FEW = settings(max_examples=150 if ALL else 25)  # for laws that are tried with many tokenizers, or on large arrays


def each(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `pytest.mark.parametrize`, in one item: every case is tried, and those that fail are named. Each has an empty `tmp_path`
    of its own, and what it changed by `monkeypatch` is as before for the next."""
    keys, cases = [name.strip() for name in names.split(",")], list(cases)

    def around(test: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(test).parameters

        def every(subtests: Any, **fixtures: Any) -> None:
            directory, patch = fixtures.get("tmp_path"), fixtures.get("monkeypatch")
            for number, values in enumerate(cases):
                case = dict(zip(keys, [values] if len(keys) == 1 else values, strict=True))
                told = {key: getattr(value, "__name__", value) for key, value in case.items()}
                with subtests.test(**told), ExitStack() as stack:
                    if directory:
                        case["tmp_path"] = directory / str(number)
                        case["tmp_path"].mkdir()
                    if patch:
                        case["monkeypatch"] = stack.enter_context(patch.context())
                    test(**{**fixtures, **case}, **({"subtests": subtests} if "subtests" in own else {}))

        inner = [one for name, one in own.items() if name not in keys and name != "subtests"]
        every.__name__, every.__doc__, every.__module__ = test.__name__, test.__doc__, test.__module__
        first = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        every.__signature__ = inspect.Signature([first, *inner])  # type: ignore[attr-defined]
        return every

    return around


def pairwise(*choices: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    """Combinations in which any two choices meet in all their values; by `make test-all` every combination."""
    everything = list(itertools.product(*choices))
    if ALL:
        return everything
    pairs = {combination: set(itertools.combinations(enumerate(combination), 2)) for combination in everything}
    missing, found = set().union(*pairs.values()), []
    while missing:
        found.append(max(everything, key=lambda combination: len(pairs[combination] & missing)))
        missing -= pairs[found[-1]]
    return found
