"""A Hub for tests on the loopback interface, which implements the requests that the real client makes."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hub_faults import Faults
from hub_store import FIRST as COMMIT
from hub_store import LARGE, Blob, Repository, Store

KINDS = ("model", "dataset", "space")
XET_EXPIRES = 2**33  # seconds since 1970


@dataclass
class State:
    """The state of a server. A test may change it between requests."""

    store: Store
    faults: Faults = field(default_factory=Faults)
    leaks: list[str] = field(default_factory=list)  # paths of requests with a token in the URL or the body
    endpoint: str = ""
    xet: str | None = None  # the URL that the Hub gives for Xet storage; None: the plain protocol


class _Hub(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"
    # Send header and body in one packet. In two packets, the second waits 40 ms for the acknowledgment of the
    # first.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path, _, self.query = self.path.partition("?")
        path = unquote(path)
        fault = self.state.faults.of(f"{self.command} {path}")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(4)
            self.close_connection = True
            return
        self.body, self.lost, self.cut = self._read(), False, fault == "cut"
        content = self.path.encode() + self.body
        if any(token.encode() in content for token in self.state.store.accounts):
            self.state.leaks.append(path)
        if fault == "page":
            self._send(b"<html>Bad Gateway</html>", 502, {"Content-Type": "text/html"})
            return
        if isinstance(fault, int):
            self._refuse(fault, "", "requested by the test", self.state.faults.headers)
            return
        self.lost = fault == "lose"
        if path.startswith("/api/"):
            self._api(path.removeprefix("/api/").split("/"))
        elif path.startswith("/upload/"):
            self.state.store.large[path.removeprefix("/upload/")] = self.body
            # The URL is signed, so the client must not send its token to the storage.
            assert "Authorization" not in self.headers
            self._send(b"")
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(path)
        else:
            parts = path.removeprefix("/").split("/")
            kind = parts.pop(0).removesuffix("s") if parts[0] in ("datasets", "spaces") else "model"
            owner, name, _, revision, *file = parts
            self._file(kind, f"{owner}/{name}", revision, "/".join(file))

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _account(self) -> Mapping[str, Any] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.state.store.accounts.get(token)

    def _owns(self, name: str) -> bool:
        account = self._account()
        if account is None:
            return False
        owners = {account["name"]} | {o["name"] for o in account["orgs"] if o["roleInOrg"] != "read"}
        return name.split("/")[0] in owners and account["auth"]["accessToken"]["role"] != "read"

    def _api(self, parts: list[str]) -> None:
        if parts == ["whoami-v2"]:
            account = self._account()
            if account is None:
                self._refuse(401, "", "Invalid credentials in Authorization header")
            else:
                self._json(account)
        elif parts == ["repos", "create"]:
            self._create(json.loads(self.body))
        elif parts == ["validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        else:
            kind, name = parts[0].removesuffix("s"), "/".join(parts[1:3])
            repository = self.state.store.repositories.get((kind, name))
            if repository is None or (repository.private and not self._owns(name)):
                self._refuse(404, "RepoNotFound", "Repository not found")
            else:
                self._repository(repository, parts[3:])

    def _repository(self, repository: Repository, rest: list[str]) -> None:
        action, revision = [*rest, "info", "main"][:2] if len(rest) < 2 else rest[:2]
        if action == "auth-check":
            allowed = len(rest) == 1 or self._owns(repository.name)
            self._json({}) if allowed else self._refuse(403, "", "no right to write")
            return
        found = repository.at("main" if not rest else revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif action in ("preupload", "commit") and not self._owns(repository.name):
            self._refuse(403, "", "no right to write")
        elif action in ("xet-read-token", "xet-write-token"):
            content = {"casUrl": self.state.xet, "accessToken": "xet", "exp": XET_EXPIRES}
            headers = {
                "X-Xet-Cas-Url": str(self.state.xet),
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(XET_EXPIRES),
                "Content-Type": "application/json",
            }
            self._send(json.dumps(content).encode(), headers=headers)
        elif action == "preupload":
            self._preupload(repository)
        elif action == "commit":
            self._commit(repository)
        elif action == "tree":
            self._json([_entry(path, blob) for path, blob in found[1].items()])
        else:
            files = [{"rfilename": path} for path in found[1]]
            info = {"id": repository.name, "sha": found[0], "private": repository.private, "siblings": files}
            self._json(info)

    def _create(self, request: Mapping[str, Any]) -> None:
        account = self._account()
        name = f"{request['organization'] or (account or {}).get('name')}/{request['name']}"
        kind = request.get("type", "model")
        if not self._owns(name):
            self._refuse(403, "", f"no right to create a {kind} under that name")
        elif (kind, name) in self.state.store.repositories:
            self._json({"error": "You already created this repo", "url": self._url(name)}, 409)
        else:
            private = request.get("visibility") == "private"
            self.state.store.add(Repository.new(name, private=private, kind=kind))
            self._json({"url": self._url(name), "name": name})

    def _preupload(self, repository: Repository) -> None:
        answers = []
        for file in json.loads(self.body)["files"]:
            existing = repository.tree.get(file["path"])
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({} if existing is None else {"oid": existing.etag}))
        self._json({"files": answers})

    def _batch(self, path: str) -> None:
        if not self._owns(path.removeprefix("/").removesuffix(".git/info/lfs/objects/batch")):
            self._refuse(403, "", "no right to write")
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            # Another host, because the Hub's storage is on another host, too.
            host = self.state.endpoint.replace("127.0.0.1", "localhost")
            url = f"{host}/upload/{wanted['oid']}?X-Signature=secret"
            exists = wanted["oid"] in self.state.store.large
            objects.append(wanted | ({} if exists else {"actions": {"upload": {"href": url}}}))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository) -> None:
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repository.head):
            self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        tree = dict(repository.tree)
        for operation in operations:
            self.state.store.apply(tree, operation)
        commit = repository.commit(tree)
        self._json({"commitUrl": f"{self._url(repository.name)}/commit/{commit}", "commitOid": commit})

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        repository = self.state.store.repositories.get((kind, name))
        if repository is None or (repository.private and not self._owns(name)):
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repository.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif (found := repository.at(revision)) is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif file not in found[1]:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found[0]})
        else:
            blob = found[1][file]
            headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": found[0]}
            if blob.large and self.state.xet is not None:
                headers["X-Xet-Hash"] = blob.sha256
                headers["X-Xet-Refresh-Route"] = (
                    f"{self.state.endpoint}/api/models/{name}/xet-read-token/{found[0]}"
                )
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(blob.content) - 1}/{len(blob.content)}"
            self._send(blob.content[start:], 206 if start else 200, headers)

    def _url(self, name: str) -> str:
        return f"{self.state.endpoint}/{name}"

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
            self.close_connection |= self.cut

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        own = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(json.dumps({"error": message}).encode(), status, own | dict(headers or {}))


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


@contextmanager
def serving(store: Store) -> Iterator[State]:
    """Serves the store as a Hub. Pushes change the store."""
    state = State(store)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"state": state}))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    # A short poll interval, because shutdown waits for it.
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub(repositories: dict[str, Path], gated: set[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serves folders by `owner/name`. Yields the endpoint and the growing list of requests."""
    store = Store()
    for name, folder in repositories.items():
        store.add(Repository.of_folder(name, folder, gated=name in gated))
    with serving(store) as state:
        yield state.endpoint, state.faults.requests


__all__ = ["COMMIT", "Faults", "Repository", "State", "Store", "hub", "serving"]
