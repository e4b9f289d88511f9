"""A stand-in for the model hub on the loopback: serves directories as repositories, and notes which files were asked for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Repositories are `root`/OWNER/NAME, or `root`/NAME. The address, and OWNER/NAME/FILE of every file that was fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            where, _, rest = path.removeprefix("api/models/").partition("/resolve/")
            name = where.partition("/revision/")[0].partition("/tree/")[0]
            repository = root / name
            if not repository.is_dir():
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif not rest:
                files = sorted(file for file in repository.rglob("*") if file.is_file())
                names = [str(file.relative_to(repository)) for file in files]
                found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                tree = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"}
                    for name, file in zip(names, files, strict=True)
                ]
                self.answer(200, json.dumps(tree if "/tree/" in where else found).encode())
            else:
                file = repository / rest.partition("/")[2]
                data = file.read_bytes()
                if self.command == "GET":
                    fetched.append(str(file.relative_to(root)))
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.answer(200, data, {"ETag": tag, "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
