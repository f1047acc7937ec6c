"""The part of the Hub's HTTP interface that an upload and a download use, over a folder; for tests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: Repository -> path -> content, the same in every branch.
        branches: Branches of every repository.
        log: Method and path of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches = {"main"}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._download(with_body=True)

    def do_HEAD(self) -> None:
        self._download(with_body=False)

    def do_PUT(self) -> None:
        self.server.log.append(f"PUT {self.path}")
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        self.server.log.append(f"POST {self.path}")
        body = self._body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "user", asked["name"])))
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/.+/branch/([^/]+)", self.path):
            self.server.branches.add(match[1])
            self._answer({})
        elif re.search("/(preupload|commit)/", self.path) and self.path.split("/")[-1] not in self.server.branches:
            error = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self._answer({"error": "Invalid rev id"}, 404, error)
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                | {"shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            self._answer({"transfer": "basic", "objects": [self._upload_of(item) for item in wanted]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", self.path):
            self._commit(match[1], [json.loads(line) for line in body.decode().splitlines() if line])
        else:
            self._answer({"error": f"unknown: {self.path}"}, 404)

    def _upload_of(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.endpoint}/objects/{item['oid']}"
        return {**item, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.endpoint}/{name}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _download(self, with_body: bool) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?(?:\?.*)?", self.path):
            if match[1] in self.server.repositories:
                names = [{"rfilename": name} for name in self.server.repositories[match[1]]]
                return self._answer({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": names})
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        match = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", self.path)
        if match is None:
            return self._answer({"error": f"unknown: {self.path}"}, 404)
        files = self.server.repositories.get(match[1])
        if files is None:
            return self._answer({}, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if match[2] not in files:
            return self._answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        content = files[match[2]]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content if with_body else b"", {"ETag": tag, "X-Repo-Commit": COMMIT}, len(content))
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, answer: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        given = {"Content-Type": "application/json", "X-Repo-Commit": COMMIT, **(headers or {})}
        self._send(status, b"" if self.command == "HEAD" else content, given, len(content))

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
