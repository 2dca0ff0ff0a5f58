"""A hub of one's own on the loopback address: repositories with revisions, private ones, and a log of what was asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """repos: {id: {commit: folder}}. names: {(id, branch or tag): commit}. private: {id: token}. log: (path, token)."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    private: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, folder: Path, *names: str) -> str:
        """Puts a folder up as one revision; `names` point to it. Returns its commit."""
        commit = hashlib.sha1(f"{repo}{folder}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = folder
        self.names |= {(repo, name): commit for name in names}
        return commit

    def asked(self, part: str) -> list[str]:
        """The paths of requests that hold `part`."""
        return [path for path, _ in self.log if part in path]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.hub.log.append((path, token))
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if repo not in self.hub.repos or self.hub.private.get(repo, token) != token:
            return self._send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        wanted = rest[1] if len(rest) > 1 else "main"
        commit = self.hub.names.get((repo, wanted), wanted)
        folder = self.hub.repos[repo].get(commit)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [str(p.relative_to(folder)) for p in files]
        if api and rest[0] == "tree":
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for n, p in zip(names, files, strict=True)
            ]
            return self._send(200, json.dumps(entries).encode(), {}, body)
        if api:
            info = {"id": repo, "sha": commit, "private": False, "siblings": [{"rfilename": n} for n in names]}
            return self._send(200, json.dumps(info).encode(), {}, body)
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub, empty at first."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
