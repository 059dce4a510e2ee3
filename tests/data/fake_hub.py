"""A Hub on a loopback port, serving the directories `models/OWNER/NAME` and `datasets/OWNER/NAME`."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    served: list[str]

    def do_GET(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo = self.root / kind / "/".join(parts[:2])
        if "gated" in repo.name:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if len(parts) < 2 or not repo.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        action, *rest = parts[2:] or ["info"]
        if rest and rest[0] not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self._api(repo, action, "/".join(rest[1:]))
        return self._resolve(repo, "/".join(rest[1:]))

    do_HEAD = do_POST = do_GET

    def _api(self, repo: Path, action: str, below: str):
        if action in ("info", "revision"):
            files = [{"rfilename": path.relative_to(repo).as_posix()} for path in repo.rglob("*") if path.is_file()]
            return self._json({"id": "/".join(repo.parts[-2:]), "sha": COMMIT, "siblings": files, "tags": []})
        if action == "tree":
            if not (repo / below).is_dir():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = (repo / below).rglob("*") if recursive else (repo / below).iterdir()
            return self._json([self._entry(repo, path) for path in sorted(found)])
        if action == "paths-info":
            form = self._body.decode()
            paths = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
            paths = [paths] if isinstance(paths, str) else paths
            return self._json([self._entry(repo, repo / path) for path in paths if (repo / path).exists()])
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _resolve(self, repo: Path, name: str):
        if not (repo / name).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (repo / name).read_bytes()
        if self.command == "GET":
            self.served.append(name)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    @staticmethod
    def _entry(repo: Path, path: Path) -> dict:
        name = path.relative_to(repo).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {
            "type": "file",
            "path": name,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`. Yields the endpoint and the list of the files sent so far."""
    served: list[str] = []
    handler = type("RepoHandler", (Handler,), {"root": root, "served": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", served
        finally:
            server.shutdown()
