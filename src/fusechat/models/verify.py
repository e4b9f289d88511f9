"""Answers judged by a verifier, in processes of its own that may take some seconds for an answer.

The verifier is a command, which is started for each answer, or `module:function`, whose process goes on. Either is told of an
answer by a line of JSON on stdin and says what it makes of it by JSON on stdout: true, false or a number. This file is run in the
process of a function: `python -m fusechat.models.verify MODULE:FUNCTION`.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusechat.errors import DataError, RecipeError
from fusechat.models import verifiers
from fusechat.run.cache import known_digest
from fusechat.run.progress import Advance
from fusechat.run.usage import cores

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_START = 120.0  # seconds for a function's process to import it
_SHOWN = 120  # characters of what is no judgement


def needs_reference(verifier: str | Sequence[str]) -> bool:
    """Whether it is one of those that come with FuseChat, which judge by the record's own answer."""
    return verifier in verifiers.NAMES


def code_of(verifier: str | Sequence[str]) -> list[str]:
    """Digests of the files that are known to make up a verifier."""
    target = _function(verifier)
    if target is None:
        words = [Path(word) for word in _words(verifier)]
        return [known_digest(word) for word in words if word.is_file()]
    module = target.partition(":")[0]
    here = Path(*module.split(".")).with_suffix(".py")  # its process looks there first
    with suppress(ImportError, ValueError):
        spec = None if here.is_file() else find_spec(module)
        file = here if spec is None else Path(spec.origin or "")
        return [known_digest(file)] if file.is_file() else []
    return []


def cannot_start(verifier: str | Sequence[str], key: str) -> str | None:
    """Why it cannot be run, with the recipe's `key`; None if it can."""
    target = _function(verifier)
    if target is None:
        word = _words(verifier)[0]
        return None if shutil.which(word) else f"{key}: {word}: no such command"
    if not needs_reference(verifier):
        try:
            _Process(target, key).close()
        except RecipeError as error:
            return str(error)
    return None


def verify(
    asked: Iterable[tuple[Mapping[str, Any], str]],
    verifier: str | Sequence[str],
    *,
    key: str,
    seconds: float,
    advance: Advance,
) -> list[float]:
    """What the verifier makes of each answer, true being 1. `asked`: what it is told, and where the prompt stands; `key`: where the
    recipe names the verifier. Raises DataError naming the prompt where it raises, hangs or says something else; RecipeError where
    it cannot be run."""
    with _open(verifier, key, seconds) as ask, ThreadPoolExecutor(cores()) as pool:

        def one(told: tuple[Mapping[str, Any], str]) -> float:
            request, where = told
            try:
                return ask(json.dumps(request, ensure_ascii=True) + "\n")
            except _FailedError as error:
                raise DataError(f"{where}: verifier {_shown(verifier)}: {error}") from None
            finally:
                advance()

        return list(pool.map(one, asked))


class _FailedError(Exception):
    """What a verifier did instead of judging."""


@contextmanager
def _open(verifier: str | Sequence[str], key: str, seconds: float) -> Iterator[Callable[[str], float]]:
    """What asks the verifier, from several threads at once."""
    target = _function(verifier)
    if target is None:
        yield lambda line: _by_command(_words(verifier), key, line, seconds)
        return
    here, processes = threading.local(), list[_Process]()

    def ask(line: str) -> float:
        if not hasattr(here, "process"):
            here.process = _Process(target, key)
            processes.append(here.process)
        return here.process.ask(line, seconds)

    try:
        yield ask
    finally:
        for process in processes:
            process.close()


def _function(verifier: str | Sequence[str]) -> str | None:
    """`module:function`, None for a command."""
    if needs_reference(verifier):
        return f"{verifiers.__name__}:{verifier}"
    return verifier if isinstance(verifier, str) and _FUNCTION.fullmatch(verifier) else None


def _words(verifier: str | Sequence[str]) -> list[str]:
    return shlex.split(verifier) if isinstance(verifier, str) else list(verifier)


def _shown(verifier: str | Sequence[str]) -> str:
    return verifier if isinstance(verifier, str) else shlex.join(verifier)


def _by_command(words: list[str], key: str, line: str, seconds: float) -> float:
    try:
        process = subprocess.Popen(words, **_PIPES)
    except OSError as error:
        raise RecipeError(f"{key}: {words[0]}: cannot be run ({error.strerror})") from None
    try:
        out, err = process.communicate(line, timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.communicate()
        raise _FailedError(_late(seconds)) from None
    if process.returncode:
        last = (err.strip().splitlines() or ["it says nothing"])[-1]
        raise _FailedError(f"ended with status {process.returncode}: {last[:_SHOWN]}")
    try:
        found = json.loads(out)
    except ValueError:
        found = None
    return _judgement(found, repr(" ".join(out.split())))


class _Process:
    """A function in a process of its own."""

    def __init__(self, target: str, key: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", __name__, target], **(_PIPES | {"stderr": None}))
        ready = self._say("", _START)
        if ready.get("ready") is not True:
            self.close()
            raise RecipeError(f"{key}: {target}: {ready.get('error', 'its process ended')}")

    def ask(self, line: str, seconds: float) -> float:
        found = self._say(line, seconds)
        if "error" in found:
            raise _FailedError(found["error"])
        return _judgement(found.get("judgement"), found["said"])

    def _say(self, line: str, seconds: float) -> dict[str, Any]:
        """The answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(self._process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(line)
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            return {"error": _late(seconds)}
        return dict(json.loads(answer)) if answer else {"error": "its process ended"}

    def close(self) -> None:
        _kill(self._process)
        self._process.communicate()


_PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
    "encoding": "utf-8",
    "errors": "replace",
    "start_new_session": True,  # so that what it starts ends with it
}


def _kill(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _late(seconds: float) -> str:
    return f"says nothing within {seconds:g} s"


def _judgement(found: Any, said: str) -> float:
    """A number; `said` is shown of what is none."""
    if not isinstance(found, bool | int | float) or not math.isfinite(found):
        raise _FailedError(f"gave {said[:_SHOWN]}, not true, false or a number")
    return float(found)


def _serve(target: str) -> None:
    """A line of JSON for each on stdin, whatever the function prints, which goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**told: Any) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    module, _, name = target.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # a module of the user's may raise anything
        return say(error=f"cannot be imported ({type(error).__name__}: {error})")
    say(ready=True)
    for line in sys.stdin:
        try:
            found = function(json.loads(line))
            found = found.item() if hasattr(found, "item") else found  # of NumPy
            told = {"said": repr(found)} | ({"judgement": found} if isinstance(found, bool | int | float) else {})
        except Exception as error:
            told = {"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:_SHOWN]}"}
        say(**told)
    return None


if __name__ == "__main__":
    _serve(sys.argv[1])
