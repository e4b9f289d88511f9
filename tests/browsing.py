"""Debian's Chromium without a window, spoken to over its pipe: pages at any width, light and dark, on paper, and what they log."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Chromium reads from file descriptor 3 and writes to 4.
_LAUNCH = (
    "import fcntl, os, sys; read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]);"
    "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def need_chromium() -> None:
    """Skips the test where there is none, which must not happen where every change is checked."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, "no chromium; make browser installs it"
        pytest.skip("no chromium here; make browser installs it")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator["Browser"]:
    """A browser with an empty profile; it ends with the block."""
    assert CHROMIUM is not None
    their_input, ours = os.pipe()
    answers, their_output = os.pipe()
    launch = [sys.executable, "-c", _LAUNCH, str(their_input), str(their_output), CHROMIUM, *_FLAGS]
    process = subprocess.Popen(
        [*launch, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_input, their_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input)
    os.close(their_output)
    try:
        found = Browser(ours, answers)
        yield found
        with contextlib.suppress(OSError, AssertionError):
            found.call("Browser.close")
    finally:
        os.close(ours)
        os.close(answers)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """One page. `said`: what was logged as a warning or an error since it was opened, by the page or about it."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.said: list[str] = []
        self.asked: list[str] = []  # addresses that the page wanted
        self.opened = False
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a report at a width, and waits until its plots are drawn or have failed."""
        self.said.clear()
        self.asked.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        ends = time.monotonic() + 60
        while self.run("document.documentElement?.dataset.plots || ''") == "":
            assert time.monotonic() < ends, f"the page does not get ready: {self.said}"
            time.sleep(0.1)

    def run(self, expression: str) -> Any:
        """The value of an expression in the page, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Moves the mouse to the middle of an element."""
        place = self.run(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = element.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for shift in (3, 0):  # some listen to movement only
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + shift, y=place[1])

    def screenshot(self, *, whole: bool = True) -> bytes:
        """PNG of the whole page, or of what is in view."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(
            self.call("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.7)["data"]
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.said.append(told["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("warning", "error", "assert"):
            self.said.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif kind == "Runtime.exceptionThrown":
            self.said.append(json.dumps(told["exceptionDetails"]))
        elif kind == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.back], [], [], 90)[0], "the browser does not answer"
            chunk = os.read(self.back, 1 << 20)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))
