"""vLLM's own server, started on a free port of loopback and ended again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START = 300.0  # seconds


@contextmanager
def vllm_serving(directory: Path, log: Path, *options: str, **environment: str) -> Iterator[str]:
    """Gives the URL of its interface. Its output goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(directory), "--dtype", "float32", "--enforce-eager", *options]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"} | environment,
            start_new_session=True,
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise AssertionError(f"vLLM's server ended: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"vLLM's server does not answer: {log.read_text()[-3000:]}")
