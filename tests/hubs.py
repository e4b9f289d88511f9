"""A stand-in for the hub on the loopback: repositories of files, each at one commit that a test may move."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


@dataclass
class Hub:
    """`commits`: repository (`org/name`, of a data set `datasets/org/name`) → its newest commit; `files`: where its files are."""

    commits: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    url: str = ""


@contextmanager
def served() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            kind = parts[1] if parts[0] == "api" else parts[0]
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3] if kind == "datasets" else parts[:2])
            name = f"datasets/{name}" if kind == "datasets" else name
            if name not in hub.files:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
                return
            commit, directory = hub.commits[name], hub.files[name]
            found = sorted(file for file in directory.iterdir() if file.is_file())
            if parts[0] == "api":
                entries = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in found
                ]
                about = {"id": name, "sha": commit, "siblings": [{"rfilename": file.name} for file in found]}
                body = json.dumps(entries if "tree" in parts else about).encode()
                self.answer(200, body, Content_Type="application/json")
            elif (directory / parts[-1]).is_file():
                data = (directory / parts[-1]).read_bytes()
                self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def cached(home: Path, repository: str, directory: Path, commit: str, *branches: str) -> Path:
    """A commit of a repository in the cache of the hub's client, as that lays it out; `branches` point to it."""
    kind, _, name = repository.rpartition("datasets/")
    folder = (
        home
        / "hub"
        / f"{'datasets' if kind or repository.startswith('datasets/') else 'models'}--{name.replace('/', '--')}"
    )
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        snapshot.mkdir(parents=True)
        for file in directory.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
    (folder / "refs").mkdir(exist_ok=True)
    for branch in branches:
        (folder / "refs" / branch).write_text(commit)
    return snapshot
