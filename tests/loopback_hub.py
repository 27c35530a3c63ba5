"""A Hub on the loopback interface that serves folders as model repositories, read-only; for tests alone."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    repositories: dict[str, Path]
    gated: set[str]
    requested: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.requested.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            kind, revision = rest if len(rest) == 2 else ("revision", "main")
            self._api(f"{owner}/{name}", kind, revision, with_body)
        else:
            owner, name, _, _, *file = path.removeprefix("/").split("/")
            self._file(f"{owner}/{name}", "/".join(file), with_body)

    def _api(self, name: str, kind: str, revision: str, with_body: bool) -> None:
        if name not in self.repositories:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif kind == "tree":
            sizes = {file: (self.repositories[name] / file).stat().st_size for file in self._names(name)}
            tree = [
                {"type": "file", "path": file, "size": size, "oid": COMMIT} for file, size in sizes.items()
            ]
            self._send(json.dumps(tree).encode(), with_body)
        else:
            files = [{"rfilename": file} for file in self._names(name)]
            self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode(), with_body)

    def _file(self, name: str, file: str, with_body: bool) -> None:
        if name in self.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif file not in self._names(name):
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send((self.repositories[name] / file).read_bytes(), with_body)

    def _names(self, name: str) -> list[str]:
        folder = self.repositories[name]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def _send(self, content: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub(repositories: dict[str, Path], gated: set[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serves `owner/name` -> folder; gives the endpoint and the list of requests as they come."""
    requested: list[str] = []
    state = {"repositories": repositories, "gated": gated, "requested": requested}
    handler = type("Hub", (_Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
