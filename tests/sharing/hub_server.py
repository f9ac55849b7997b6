"""A stand-in for the Hub's API on loopback: repositories, revisions, downloads and commits.

Of the real one it keeps what `huggingface_hub` asks for: `model_info`, the tree of a revision, HEAD
and GET of a file with its ETag and commit, creating a repository, and a commit of base64 files. It
notes every request, so that a test sees what was asked, and with which token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Repository:
    """Commits, oldest first: id -> path -> content. `main` is the newest."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files to the newest state as a new commit."""
        before = next(reversed(self.commits.values()), {})
        number = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[number] = {**before, **files}
        return number

    def find(self, revision: str) -> str | None:
        """A commit by its id, or the newest for `main`."""
        newest = next(reversed(self.commits), None)
        return newest if revision == "main" else revision if revision in self.commits else None


class HubServer:
    """Start with `with`; `url` is what HF_ENDPOINT says."""

    def __init__(self, token: str) -> None:
        self.token = token  # without it: no private repository, no writing
        self.repositories: dict[str, Repository] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []  # method, path, authorization
        self.messages: list[str] = []  # of commits
        self.failure: int | None = None  # answer everything with this status
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Route one request."""
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        authorization = request.headers.get("Authorization", "")
        path = unquote(request.path.partition("?")[0])
        self.requests.append((request.command, path, authorization))
        may = authorization == f"Bearer {self.token}"
        if self.failure is not None:
            _send(request, self.failure, {"error": "made to fail"})
        elif path == "/api/repos/create":
            self._create(request, json.loads(body), may)
        elif path == "/api/validate-yaml":
            _send(request, 200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            if not may:
                _send(request, 401, {"error": "token"})
            elif found[2] == "preupload":
                how = {"uploadMode": "regular", "shouldIgnore": False}
                files = [{"path": f["path"], **how} for f in json.loads(body)["files"]]
                _send(request, 200, {"files": files})
            else:
                self._commit(request, found[1], body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._read(request, found[1], found[2] or "main", may, None)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._read(request, found[1], found[2], may, "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._read(request, found[1], found[2], may, found[3])
        else:
            _send(request, 404, {"error": f"no such route: {path}"})

    def _create(self, request: BaseHTTPRequestHandler, wanted: dict, may: bool) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not may:
            _send(request, 401, {"error": "token"})
            return
        known = name in self.repositories
        self.repositories.setdefault(name, Repository())
        if wanted.get("visibility") == "private":
            self.private.add(name)
        _send(request, 409 if known else 200, {"url": f"{self.url}/{name}", "id": name})

    def _commit(self, request: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        number = self.repositories[name].commit(files)
        url = f"{self.url}/{name}/commit/{number}"
        _send(request, 200, {"commitUrl": url, "commitOid": number, "success": True})

    def _read(
        self,
        request: BaseHTTPRequestHandler,
        name: str,
        revision: str,
        may: bool,
        file: str | None,
    ) -> None:
        """Facts of a revision (file None), its tree (""), or a file."""
        if name not in self.repositories or (name in self.private and not may):
            _send(request, 404, {"error": "repository"}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.repositories[name].find(revision)
        if commit is None:
            _send(request, 404, {"error": "revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.repositories[name].commits[commit]
        if file is None:
            siblings = [{"rfilename": path} for path in files]
            _send(request, 200, {"id": name, "sha": commit, "siblings": siblings, "tags": []})
        elif file == "":
            tree = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in files.items()
            ]
            _send(request, 200, tree)
        elif file not in files:
            _send(request, 404, {"error": "entry"}, {"X-Error-Code": "EntryNotFound"})
        else:
            etag = hashlib.sha1(files[file]).hexdigest()
            _send(request, 200, files[file], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: object,
    headers: dict[str, str] | None = None,
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
