"""A Hub on this machine for tests: the calls that huggingface_hub makes to push and to load models, kept in memory.

Repositories have an owner, commits and branches, and may be private; large files are uploaded apart. A commit is there
as a whole or not at all, and it may name a large file only once that is uploaded. `fault(url, step, times)` has the
next calls of a step answered by an error.

The client reads its address when it is imported, so it runs in processes of their own, with `environment()`.
"""

import base64
import hashlib
import json
import os
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}  # token -> user
STEPS = ("create", "preupload", "batch", "upload", "verify", "commit", "resolve")
LARGE = (".safetensors", ".bin", ".png")
EVER = 10**9


class Refused(Exception):
    """An answer that is an error: status, the code by which the client picks its exception, and more for it to read."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What its ETag says: of a large file the SHA-256, of another one git's SHA-1."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """One repository: its commits, oldest first, and the branches that point to them."""

    owner: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        """A new commit with `files` as its whole tree."""
        name = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.refs[branch] = name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """Commit and files of a branch or a commit."""
        name = self.refs.get(revision, revision)
        if name not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name, self.commits[name]


class LoopbackHub:
    """A Hub on a free port of 127.0.0.1, from `with` to the end of its block."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, int] = {}
        self.calls: list[str] = []  # method, path and status, to look at when a test fails
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True  # those of clients that keep their connections open do not hold the end up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose client talks to this Hub, with its cache in `home`."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | ({} if token is None else {"HF_TOKEN": token})


def fault(url: str, step: str, times: int = EVER) -> None:
    """Have the next `times` calls of `step` of the Hub at `url` answered by status 500; 0 mends it."""
    _ask(f"{url}/loopback/faults", {step: times})


def faults_left(url: str) -> dict[str, int]:
    """How many calls of each step are still to be answered by an error."""
    return _ask(f"{url}/loopback/faults", {})


def _ask(url: str, content: dict) -> Any:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(url, data=json.dumps(content).encode()), timeout=10) as answer:
        return json.loads(answer.read())


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 60

    def handle_any(self) -> None:
        """One request: read whole, so that the connection can be used again, and answered by `answer`."""
        body = self._read_body()
        self.address = urlsplit(self.path)
        self.parts = [unquote(part) for part in self.address.path.split("/") if part]
        status, headers, content = 200, {}, b""
        try:
            with self.hub.lock:
                content = self.answer(body)
            if isinstance(content, tuple):
                headers, content = content
        except Refused as error:
            status = error.status
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            content = {"error": str(error), **error.more}
        if not isinstance(content, bytes):
            headers, content = {"Content-Type": "application/json", **headers}, json.dumps(content).encode()
        self.hub.calls.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        """Silent: `LoopbackHub.calls` has it."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    @property
    def user(self) -> str | None:
        """Who asks, by the token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[header.removeprefix("Bearer ")]

    def repo(self, write: bool = False) -> Repo:
        """The repository `owner/name` that the path goes on with, if whoever asks may see it."""
        repo = self.hub.repos.get("/".join(self.parts[:2]))
        if repo is None or (repo.private and self.user != repo.owner):
            raise Refused(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if write and self.user != repo.owner:
            raise Refused(401 if self.user is None else 403, "You have no right to write here")
        self.repo_id, self.parts = "/".join(self.parts[:2]), self.parts[2:]
        return repo

    def step(self, name: str) -> None:
        """Raises where a fault is set for the step `name`."""
        left = self.hub.faults.get(name, 0)
        if left > 0:
            self.hub.faults[name] = left - 1
            raise Refused(500, f"loopback fault in {name}")

    def answer(self, body: bytes) -> Any:
        """What to send back: bytes, something for JSON, or headers and one of these."""
        for first, then in ROUTES:
            if self.parts[: len(first)] == list(first):
                self.parts = self.parts[len(first) :]
                return then(self, body)
        if len(self.parts) > 2 and self.parts[2] == "resolve":
            return self.resolve()
        if len(self.parts) > 1 and self.parts[1].endswith(".git"):
            self.parts[1] = self.parts[1].removesuffix(".git")
            return self.batch(json.loads(body))
        raise Refused(404, f"no such page: {self.path}")

    def set_faults(self, body: bytes) -> dict[str, int]:
        for step, times in json.loads(body).items():
            if step not in STEPS:
                raise Refused(400, f"no step {step!r}; there are {STEPS}")
            self.hub.faults[step] = times
        return self.hub.faults

    def whoami(self, _: bytes) -> dict:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def create(self, body: bytes) -> dict:
        self.step("create")
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        if self.user is None or owner != self.user:
            raise Refused(401 if self.user is None else 403, f"You may not create anything of {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(owner, bool(private))
        self.hub.repos[name].commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def validate(self, body: bytes) -> dict:
        """The block at the head of a card has to be a mapping in YAML."""
        content = json.loads(body)["content"]
        try:
            head = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(head, dict) else [{"message": "the metadata is no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return {"errors": errors, "warnings": []}

    def model(self, body: bytes) -> Any:
        """Everything below /api/models/<owner>/<name>."""
        verb = self.parts[2] if len(self.parts) > 2 else "revision"
        writes = verb in ("preupload", "commit", "branch")
        repo = self.repo(write=writes)
        revision = self.parts[1] if len(self.parts) > 1 else "main"
        if verb == "preupload":
            return self.preupload(repo, revision, json.loads(body))
        if verb == "commit":
            return self.commit(repo, revision, [json.loads(line) for line in body.splitlines() if line.strip()])
        if verb == "branch":
            return self.branch(repo, revision, json.loads(body or b"{}"))
        if verb == "revision":
            name, files = repo.at(revision)
            siblings = [{"rfilename": path, "size": len(blob.content)} for path, blob in sorted(files.items())]
            return {"id": self.repo_id, "modelId": self.repo_id, "sha": name, "private": repo.private} | {
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
            }
        if verb == "tree":
            return self.tree(repo.at(revision)[1], "/".join(self.parts[2:]))
        if verb == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": at} for name, at in repo.refs.items()
            ]
            return {"branches": branches, "tags": [], "converts": []}
        raise Refused(404, f"no such call: {self.path}")

    def preupload(self, repo: Repo, revision: str, asked: dict) -> dict:
        self.step("preupload")
        there = repo.at(revision)[1]
        answer = []
        for entry in asked["files"]:
            mode = "lfs" if entry["path"].endswith(LARGE) else "regular"
            old = there.get(entry["path"])
            answer.append(
                {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old.oid if old else None}
            )
        return {"files": answer}

    def batch(self, asked: dict) -> dict:
        self.step("batch")
        repo = self.repo(write=True)
        objects = []
        for entry in asked["objects"]:
            links = {
                action: {"href": f"{self.hub.url}/loopback/{action}/{self.repo_id}/{entry['oid']}"}
                for action in ("upload", "verify")
            }
            objects.append(dict(entry) | ({} if entry["oid"] in repo.uploaded else {"actions": links}))
        return {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes) -> bytes:
        """Like the store behind the Hub, it asks for no token: the link is the permission."""
        self.step("upload")
        repo, oid = self.hub.repos["/".join(self.parts[:2])], self.parts[2]
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"what was uploaded is not {oid}")
        repo.uploaded[oid] = body
        return b""

    def verify(self, body: bytes) -> bytes:
        self.step("verify")
        repo, asked = self.hub.repos["/".join(self.parts[:2])], json.loads(body)
        if len(repo.uploaded.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, f"{asked['oid']} is not here")
        return b""

    def commit(self, repo: Repo, branch: str, lines: list[dict]) -> dict:
        if branch not in repo.refs:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repo.at(branch)[1])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repo.uploaded:
                    raise Refused(422, f"{value['path']} points to {value['oid']}, which was not uploaded")
                files[value["path"]] = Blob(repo.uploaded[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise Refused(400, f"no operation {key!r}")
        self.step("commit")  # at the end: what was sent is known by then, and nothing of it may show
        name = repo.commit(branch, files)
        return {"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{self.repo_id}/commit/{name}"}

    def branch(self, repo: Repo, name: str, asked: dict) -> dict:
        if name in repo.refs:
            raise Refused(409, f"Reference {name} already exists")
        repo.refs[name] = repo.at(asked.get("startingPoint") or "main")[0]
        return {}

    def tree(self, files: dict[str, Blob], folder: str) -> list[dict]:
        """Files below `folder`, and without `recursive` its folders in place of what they hold."""
        recursive = parse_qs(self.address.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in sorted(files.items()) if path.startswith(start)}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries: dict[str, dict] = {}
        for path, blob in below.items():
            inner = path.removeprefix(start).split("/")
            if len(inner) > 1 and not recursive:
                entries[start + inner[0]] = {"type": "directory", "path": start + inner[0], "size": 0, "oid": "0" * 40}
                continue
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.is_large:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
            entries[path] = entry
        return list(entries.values())

    def resolve(self) -> tuple[dict[str, str], bytes]:
        self.step("resolve")
        repo = self.repo()
        name, files = repo.at(self.parts[1])
        path = "/".join(self.parts[2:])
        if path not in files:
            raise Refused(404, f"{path} is not in {self.repo_id}", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": name, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        if blob.is_large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return headers, blob.content


# The beginning of a path -> what answers. All else is a file of a repository, an upload of a large one, or not there.
ROUTES: list[tuple[tuple[str, ...], Callable[[_Handler, bytes], Any]]] = [
    (("loopback", "faults"), _Handler.set_faults),
    (("loopback", "upload"), _Handler.upload),
    (("loopback", "verify"), _Handler.verify),
    (("api", "whoami-v2"), _Handler.whoami),
    (("api", "repos", "create"), _Handler.create),
    (("api", "validate-yaml"), _Handler.validate),
    (("api", "models"), _Handler.model),
]
