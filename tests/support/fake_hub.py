"""A Hub on a loopback port: serves the directories `models/OWNER/NAME` and `datasets/OWNER/NAME`, and takes uploads.

A branch DEV of a repository is the directory `NAME@DEV` beside it.

It speaks what huggingface_hub 1 and 2 say over HTTP: reading, creating a repository, large files as LFS objects,
commits. Uploading clients need HF_HUB_DISABLE_XET=1: where hf_xet is installed they otherwise send large files to
another service in a protocol of its own, whatever this server answers.
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants

USER = "me"  # whom all tokens belong to
KINDS = ("models", "datasets")
LARGE = (".parquet", ".safetensors", ".bin", ".pt", ".arrow", ".wav", ".flac")
LARGE_BYTES = 5_000_000
LICENSES = ("apache-2.0", "mit", "cc-by-sa-4.0", "other", "unknown")  # of those that the Hub knows


@dataclass
class Failure:
    """Something that goes wrong with the next `times` requests whose "METHOD /path" contains `pattern`, a regex.

    Args:
        status: of the answer; None: the connection is cut, instead of an answer.
        late: it goes wrong when the request has had its effect; of the answer, half gets through.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    late: bool = False


class Commit(NamedTuple):
    """What one commit changed."""

    message: str
    written: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass
class FakeHub:
    """The server's state. Files lie in `root`; everything else lives as long as the server."""

    root: Path
    tokens: dict[str, str] = field(default_factory=dict)  # token: "read" or "write"
    endpoint: str = ""
    served: list[str] = field(default_factory=list)  # files sent, by their names in their repositories
    requests: list[str] = field(default_factory=list)  # as "PUT /path 200", or "PUT /path cut"
    failures: list[Failure] = field(default_factory=list)
    private: set[str] = field(default_factory=set)  # as "datasets/me/name", like the keys of `commits`
    commits: dict[str, list[Commit]] = field(default_factory=dict)
    awaited: dict[str, str] = field(default_factory=dict)  # paths that take an object: its SHA-256
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    def name(self, repo: Path) -> str:
        return repo.relative_to(self.root).as_posix()

    def head(self, repo: Path) -> str:
        """The id of the last commit."""
        return hashlib.sha1(f"{self.name(repo)} {len(self.commits.get(self.name(repo), ()))}".encode()).hexdigest()

    def failure(self, request: str) -> Failure | None:
        """What is to go wrong with this request, counted down."""
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and re.search(failure.pattern, request):
                    failure.times -= 1
                    return failure
        return None


class Refused(Exception):
    """Becomes an answer with the Hub's error headers."""

    def __init__(self, status: int, message: str, code: str | None = None, content: dict | None = None):
        super().__init__(message)
        self.status = status
        self.content = json.dumps({"error": message, **(content or {})}).encode()
        self.headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code is not None:
            self.headers["X-Error-Code"] = code


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str, size: int) -> bool:
    return size > 0 and (name.endswith(LARGE) or size > LARGE_BYTES)


def file_id(name: str, content: bytes) -> str:
    """The SHA-256 of a large file, the id that git would give to a small one."""
    return hashlib.sha256(content).hexdigest() if is_large(name, len(content)) else git_sha(content)


class Reply(NamedTuple):
    content: bytes
    headers: dict[str, str]
    status: int = 200


def reply(content: Any) -> Reply:
    return Reply(json.dumps(content).encode(), {"Content-Type": "application/json"})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    body: bytes

    def answer(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        failure = self.hub.failure(request)
        cut = failure is not None and failure.status is None
        answer = None
        if failure is None or failure.late:
            self.body = self._read_body()
            try:
                with self.hub.lock:
                    answer = self._route()
            except Refused as error:
                answer = Reply(error.content, error.headers, error.status)
        elif not cut:
            self._read_body()  # or the connection couldn't be used for the next request
        if failure is not None and not cut:
            answer = Reply(b"<html>out of order</html>", {"Content-Type": "text/html"}, failure.status)
        self.hub.requests.append(f"{request} {'cut' if cut else answer.status}")
        if answer is not None:
            self._send(answer, cut)
        if cut:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client may have left
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # ---- where a request goes ----

    def _route(self) -> Reply:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if url.path in self.hub.awaited:
            return self._store(self.hub.awaited[url.path])
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if api and parts == ["whoami-v2"]:
            return self._whoami()
        if api and parts == ["validate-yaml"]:
            return self._validate(json.loads(self.body)["content"])
        if api and parts == ["repos", "create"]:
            return self._create(json.loads(self.body))
        kind = parts.pop(0) if parts[0] in KINDS else "models"
        if len(parts) < 2:
            raise Refused(404, "Repository not found", "RepoNotFound")
        owner, name, action, *rest = [*parts, "info"] if len(parts) == 2 else parts
        repo = self._repo(kind, owner, name.removesuffix(".git"))
        if name.endswith(".git") and [action, *rest] == ["info", "lfs", "objects", "batch"]:
            return self._batch(repo, json.loads(self.body))
        if rest and rest[0] not in ("main", self.hub.head(repo)):
            repo = repo.with_name(f"{repo.name}@{rest[0]}")
            if not repo.is_dir():
                raise Refused(404, f"Invalid rev id: {rest[0]}", "RevisionNotFound")
        below = "/".join(rest[1:])
        if not api:
            return self._resolve(repo, below)
        if action == "preupload":
            return self._preupload(repo, json.loads(self.body))
        if action == "commit":
            return self._commit(repo, [json.loads(line) for line in self.body.splitlines()])
        return self._read(repo, action, below)

    def _role(self) -> str | None:
        """What the request's token may do; None without one."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _repo(self, kind: str, owner: str, name: str) -> Path:
        """Its directory, if it's there for the one who asks."""
        repo = self.hub.root / kind / owner / name
        role = self._role()
        if "gated" in name:
            raise Refused(403, "Access to it is restricted", "GatedRepo")
        hidden = self.hub.name(repo) in self.hub.private and (role is None or owner != USER)
        if hidden or not repo.is_dir():
            # what a stranger may not see looks like what isn't there
            status, message = (401, "Invalid username or password.") if role is None else (404, "Repository not found")
            raise Refused(status, message, "RepoNotFound")
        return repo

    def _check_may_write(self, kind: str, owner: str) -> None:
        role = self._role()
        if role is None:
            raise Refused(401, "Invalid username or password.")
        if role != "write" or owner != USER:
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')

    # ---- reading ----

    def _whoami(self) -> Reply:
        if (role := self._role()) is None:
            raise Refused(401, "Invalid username or password.")
        return reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _read(self, repo: Path, action: str, below: str) -> Reply:
        if action in ("info", "revision"):
            files = [path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()]
            info = {"id": "/".join(repo.parts[-2:]), "sha": self.hub.head(repo), "tags": []}
            info["private"] = self.hub.name(repo) in self.hub.private
            return reply(info | {"siblings": [{"rfilename": name} for name in sorted(files)]})
        if action == "tree":
            if not (repo / below).is_dir():
                raise Refused(404, f"{below} does not exist", "EntryNotFound")
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = (repo / below).rglob("*") if recursive else (repo / below).iterdir()
            return reply([self._entry(repo, path) for path in sorted(found)])
        if action == "paths-info":
            form = self.body.decode()
            paths = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
            paths = [paths] if isinstance(paths, str) else paths
            return reply([self._entry(repo, repo / path) for path in paths if (repo / path).exists()])
        raise Refused(404, "Not found", "EntryNotFound")

    def _resolve(self, repo: Path, name: str) -> Reply:
        headers = {"X-Repo-Commit": self.hub.head(repo)}
        if not (repo / name).is_file():
            refused = Refused(404, "Entry not found", "EntryNotFound")
            return Reply(refused.content, refused.headers | headers, 404)
        content = (repo / name).read_bytes()
        if self.command == "GET":
            self.hub.served.append(name)
        headers |= {"ETag": f'"{file_id(name, content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Reply(content, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start > end:
            return Reply(b"", headers | {"Content-Range": f"bytes */{len(content)}"}, 416)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Reply(content[start : end + 1], headers, 206)

    def _entry(self, repo: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(repo).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        content = path.read_bytes()
        entry = {"type": "file", "path": name, "oid": git_sha(content), "size": len(content)}
        if is_large(name, len(content)):
            entry["lfs"] = {"oid": file_id(name, content), "size": len(content), "pointerSize": 134}
        return entry

    # ---- writing ----

    def _create(self, wish: dict[str, Any]) -> Reply:
        kind, owner = f"{wish.get('type', 'model')}s", wish.get("organization") or USER
        self._check_may_write(kind, owner)
        name = f"{kind}/{owner}/{wish['name']}"
        url = f"{self.hub.endpoint}/{name.removeprefix('models/')}"
        repo = self.hub.root / name
        if repo.exists():
            raise Refused(409, f"You already created this {kind[:-1]} repo", content={"url": url})
        repo.mkdir(parents=True)
        (repo / ".gitattributes").write_text("".join(f"*{end} filter=lfs -text\n" for end in LARGE))
        if wish.get("visibility") == "private" or wish.get("private"):
            self.hub.private.add(name)
        return reply({"url": url, "name": f"{owner}/{wish['name']}"})

    def _validate(self, card: str) -> Reply:
        license = yaml.safe_load(card.split("---\n")[1]).get("license", LICENSES[0])
        if license not in LICENSES:
            message = f'"license" must be one of [{", ".join(LICENSES)}]'
            raise Refused(400, message, content={"errors": [{"message": message}], "warnings": []})
        return reply({"errors": [], "warnings": []})

    def _preupload(self, repo: Path, wish: dict[str, Any]) -> Reply:
        """For every file whether it comes as an LFS object or within the commit, and what is there already."""
        self._check_may_write(repo.parts[-3], repo.parts[-2])
        files = []
        for name, size in ((file["path"], file["size"]) for file in wish["files"]):
            mode = "lfs" if is_large(name, size) else "regular"
            oid = file_id(name, (repo / name).read_bytes()) if (repo / name).is_file() else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return reply({"files": files})

    def _batch(self, repo: Path, wish: dict[str, Any]) -> Reply:
        """Where to put each LFS object; nothing for one that is there."""
        self._check_may_write(repo.parts[-3], repo.parts[-2])
        found = []
        for item in wish["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.objects / item["oid"]).is_file():
                # the path is the permission: the client sends no token there
                path = f"/objects/{'/'.join(repo.parts[-2:])}/{secrets.token_hex(8)}"
                self.hub.awaited[path] = item["oid"]
                entry["actions"] = {"upload": {"href": self.hub.endpoint + path}}
            found.append(entry)
        return reply({"transfer": "basic", "objects": found})

    def _store(self, oid: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The object is not the one that was announced")
        self.hub.objects.mkdir(exist_ok=True)
        (self.hub.objects / oid).write_bytes(self.body)
        return Reply(b"", {})

    def _commit(self, repo: Path, lines: list[dict[str, Any]]) -> Reply:
        """All of it or, if any part can't be, nothing."""
        self._check_may_write(repo.parts[-3], repo.parts[-2])
        header = lines[0]["value"]
        if header.get("parentCommit", self.hub.head(repo)) != self.hub.head(repo):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        written, deleted = {}, []
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if ".." in PurePosixPath(value["path"]).parts:
                raise Refused(400, f"Invalid path {value['path']}")
            if key == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                stored = self.hub.objects / value["oid"]
                if not stored.is_file():
                    raise Refused(400, f"{value['path']}: its LFS object was never uploaded")
                written[value["path"]] = stored.read_bytes()
            elif key in ("deletedFile", "deletedFolder"):
                if not (repo / value["path"]).exists():
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                deleted.append(value["path"])
            else:
                raise Refused(400, f"Unknown operation {key}")
        for path in deleted:
            shutil.rmtree(repo / path) if (repo / path).is_dir() else (repo / path).unlink()
        for path, content in written.items():
            (repo / path).parent.mkdir(parents=True, exist_ok=True)
            (repo / path).write_bytes(content)
        name = self.hub.name(repo)
        self.hub.commits.setdefault(name, []).append(Commit(header["summary"], tuple(written), tuple(deleted)))
        head = self.hub.head(repo)
        url = f"{self.hub.endpoint}/{name.removeprefix('models/')}/commit/{head}"
        return reply({"success": True, "commitOid": head, "commitUrl": url, "hookOutput": ""})

    # ---- HTTP ----

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Reply, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[: len(answer.content) // 2] if cut else answer.content)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve_hub(root: Path, tokens: dict[str, str] | None = None) -> Iterator[FakeHub]:
    """Serve `root`, where uploads with one of the `tokens`, `{token: "read" or "write"}`, end up too."""
    hub = FakeHub(root, dict(tokens or {}))
    handler = type("RepoHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


@contextlib.contextmanager
def hub_of_this_process(root: Path, tokens: dict[str, str], monkeypatch: Any) -> Iterator[FakeHub]:
    """`serve_hub` for the libraries of this process, as far as they don't read the endpoint when they are imported."""
    with serve_hub(root, tokens) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


@contextlib.contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`. Yields the endpoint and the list of the files sent so far."""
    with serve_hub(root) as hub:
        yield hub.endpoint, hub.served
