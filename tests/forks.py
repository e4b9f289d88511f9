"""Commands in processes of their own, forked from one that has imported everything: a second each, instead of the eight that the
imports take. What libraries read of the environment while they are imported is the server's; where that matters, see
`runs.fusechat`."""

import atexit
import contextlib
import functools
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any


class Command:
    """`fusechat` with arguments, or a script, under way; what is used of it is what `subprocess.Popen` has. `session`: in a process
    group of its own; `limits`: by `resource.RLIMIT_…`."""

    def __init__(
        self,
        *arguments: str | Path,
        script: Path | str = "",
        session: bool = False,
        limits: dict[int, int] | None = None,
        **environment: str,
    ) -> None:
        self._place = tempfile.TemporaryDirectory()
        self._status = Path(self._place.name) / "status"
        self._files = {name: f"{self._place.name}/{name}" for name in ("stdout", "stderr")}
        for file in self._files.values():
            Path(file).touch()
        asked = {
            "arguments": [str(argument) for argument in arguments],
            "script": str(script),
            "session": session,
            "limits": list((limits or {}).items()),
            "directory": os.getcwd(),
            "environment": os.environ | environment,
            "status": str(self._status),
            **self._files,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked).encode() + b"\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.stderr = Path(self._files["stderr"]).open()  # noqa: SIM115
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(Path(self._files["stderr"]).read_text())
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """stdout and stderr, all of them."""
        self.wait(timeout)
        self.stderr.close()
        return tuple(Path(self._files[name]).read_text() for name in ("stdout", "stderr"))  # type: ignore[return-value]

    def ended(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` has it."""
        stdout, stderr = self.communicate(timeout)
        return subprocess.CompletedProcess([], self.returncode or 0, stdout, stderr)


def ranks(number: int, *arguments: str | Path, **options: Any) -> list[Command]:
    """The command in so many processes, by the environment that `torchrun` gives each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    size = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **size}
    return [Command(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **place, **options) for rank in range(number)]


def together(number: int, *arguments: str | Path, **options: Any) -> str:
    """As `ranks`, to its end, which is a good one; what they say on stderr, all of them. Where one fails the others are killed."""
    every = ranks(number, *arguments, **options)
    while None in (found := [one.poll() for one in every]):
        time.sleep(0.01)
        if any(found):
            time.sleep(1)
            for one in every:
                if one.poll() is None:
                    one.kill()
    said = "".join(one.communicate()[1] for one in every)
    assert not any(found), said
    return said


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.communicate)  # which it ends by, and all that it forked
    return server


def serve() -> None:
    import numba  # noqa: F401
    import transformers.trainer  # noqa: F401
    from rich import console, table  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import fusechat.commands.evaluate_models
    import fusechat.fuse.trainer
    import fusechat.merge.standalone
    import fusechat.models.generator
    import fusechat.pipeline
    import fusechat.report.page  # noqa: F401

    gc.freeze()  # what is imported is looked through by none of the commands
    running: dict[int, str] = {}
    text = b""
    while True:
        if select.select([0], [], [], 0.01 if running else None)[0]:
            if not (more := os.read(0, 1 << 16)):
                break
            text += more
            if text.endswith(b"\n"):
                asked, text = json.loads(text), b""
                pid = os.fork()
                if not pid:
                    _become(asked)
                running[pid] = asked["status"]
                os.write(1, f"{pid}\n".encode())
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                file = Path(running.pop(pid))
                if file.parent.is_dir():
                    file.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(status)))
                    file.with_suffix(".partial").rename(file)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _become(asked: dict[str, Any]) -> None:
    """The command, in this process, which never returns."""
    status = 1
    try:
        if asked["session"]:
            os.setsid()
        for file, name in ((0, os.devnull), (1, asked["stdout"]), (2, asked["stderr"])):
            os.dup2(os.open(name, os.O_RDONLY if file == 0 else os.O_WRONLY | os.O_APPEND), file)
        for kind, limit in asked["limits"]:
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        # What a shell begins in the background does not hear Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(asked["directory"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = [asked["script"] or "fusechat", *asked["arguments"]]
        if asked["script"]:
            runpy.run_path(asked["script"], run_name="__main__")
        else:
            from fusechat.commands.cli import main

            main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()  # as an interpreter ends, without the second that taking it apart takes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
