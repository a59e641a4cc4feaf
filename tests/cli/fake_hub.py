"""The few endpoints of the Hub that an upload calls, on a local port, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories in memory.

    Attributes:
        files: repository -> name -> content. stored: content of large files by SHA-256. commits: how many there were.
        calls: how often each endpoint was called. tokens: the Authorization headers seen.
        faults: endpoint -> what its next calls do: an HTTP status, "drop" (close the connection in the middle of the
            request), or "lose" (do it, and close the connection before the answer).
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: dict[str, list[Any]] = {}
        self.calls: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.commits = 0
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repo = f"{body['organization']}/{body['name']}"
        known = repo in self.files
        self.files.setdefault(repo, {})
        self.private.setdefault(repo, body.get("visibility") == "private")
        return 409 if known else 200, {"url": f"{self.url}/{repo}"}

    def info(self, repo: str) -> tuple[int, dict[str, Any]]:
        return 200, {"id": repo, "sha": "0" * 40, "private": self.private[repo], "tags": [], "siblings": []}

    def preupload(self, repo: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"files": [self._mode(repo, file["path"]) for file in body["files"]]}

    def _mode(self, repo: str, path: str) -> dict[str, Any]:
        large = path.endswith(".safetensors")
        content = self.files[repo].get(path)
        plain = b"" if content is None else b"blob %d\0" % len(content) + content
        oid = hashlib.sha256(content or b"").hexdigest() if large else hashlib.sha1(plain).hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                "oid": None if content is None else oid}  # fmt: skip

    def batch(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        objects = [dict(item) for item in body["objects"]]
        for item in objects:
            if item["oid"] not in self.stored:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, oid: str, content: bytes) -> tuple[int, dict[str, Any]]:
        assert hashlib.sha256(content).hexdigest() == oid
        self.stored[oid] = content
        return 200, {}

    def commit(self, repo: str, lines: bytes) -> tuple[int, dict[str, Any]]:
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.stored[value["oid"]]
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{self.commits:040d}", "commitOid": f"{self.commits:040d}"}


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def _route(self) -> tuple[str, str]:
        """The endpoint that is called, and the repository or object it is called on."""
        path = self.path.partition("?")[0]
        if path.startswith("/lfs/"):
            return "put", path.removeprefix("/lfs/")
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch", path[1:].partition(".git/")[0]
        for name in ("preupload", "commit"):
            if f"/{name}/" in path:
                return name, path.removeprefix("/api/models/").partition(f"/{name}/")[0]
        known = {"/api/repos/create": "create", "/api/validate-yaml": "validate"}
        return known.get(path, "info"), path.removeprefix("/api/models/").partition("/revision/")[0]

    def _answer(self) -> None:
        hub, (name, target) = self.owner, self._route()
        hub.calls[name] += 1
        hub.tokens.add(self.headers["Authorization"])
        fault = hub.faults[name].pop(0) if hub.faults.get(name) else None
        if fault == "drop":
            self.rfile.read(1)
            return self._hang_up()
        body = self._body()
        if isinstance(fault, int):
            return self._send(fault, {"error": "injected"})
        parsed = json.loads(body) if body and name not in ("put", "commit") else {}
        answers = {
            "create": lambda: hub.create(parsed),
            "validate": lambda: (200, {"errors": [], "warnings": []}),
            "info": lambda: hub.info(target),
            "preupload": lambda: hub.preupload(target, parsed),
            "batch": lambda: hub.batch(parsed),
            "put": lambda: hub.put(target, body),
            "commit": lambda: hub.commit(target, body),
        }
        status, answer = answers[name]()
        if fault == "lose":
            return self._hang_up()
        return self._send(status, answer)

    do_GET = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
