"""A small Hugging Face Hub on loopback, for tests.

It answers the unmodified `huggingface_hub` client (`HF_ENDPOINT` set to its address, `HF_HUB_DISABLE_XET=1`): repositories
with branches, pull requests and commits, LFS uploads, model cards that it refuses, downloads; and it fails on demand as the
Hub and the network in between do. Statuses, codes and messages are the Hub's own where a client gets to see them.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "llama3.1", "llama3.2", "gemma", "unknown", "other"}
SAID = {
    401: "Invalid username or password.",
    403: "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.",
    404: "Repository not found",
    412: "A commit has happened since. Please refresh and try again.",
    429: "We had to rate limit you.",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit. The bytes of an LFS file are the very object in `Hub.objects`, and git holds a pointer to them."""

    data: bytes
    lfs: bool

    @cached_property
    def oid(self) -> str:
        """The content's name in ETags and to `preupload`: its SHA-256 if it is in LFS, else git's name of it."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_blob(self.data)

    def listed(self, blob: str, sha256: str) -> dict[str, Any]:
        """What listings say of it. Endpoints differ in the keys of the git blob's name and of the LFS object's."""
        if not self.lfs:
            return {"size": len(self.data), blob: self.oid}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.data)}\n".encode()
        lfs = {sha256: self.oid, "size": len(self.data), "pointerSize": len(pointer)}
        return {"size": len(self.data), blob: git_blob(pointer), "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    """A model repository. It begins with one commit, on `main`, that holds `.gitattributes`."""

    objects: dict[str, bytes]  # the Hub's
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name → commit
    pull_requests: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" → commit
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
        self.branches["main"] = self.add("initial commit", None, {".gitattributes": attributes})

    def add(self, title: str, parent: str | None, files: dict[str, File]) -> str:
        """A commit that no branch points to yet."""
        tree = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(repr((len(self.commits), title, parent, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, files)
        return oid

    def commit(self, revision: str = "main") -> Commit:
        """Raises KeyError where there is none."""
        return self.commits[(self.branches | self.pull_requests).get(revision, revision)]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.commit(revision).files.items()}

    def push(self, files: Mapping[str, bytes | None], branch: str = "main", title: str = "Someone else's commit") -> str:
        """A commit without a client; None deletes."""
        there = self.commit(branch)
        new = {path: File(data, in_lfs(path, len(data), data[:512])) for path, data in files.items() if data is not None}
        self.objects.update({file.oid: file.data for file in new.values() if file.lfs})
        kept = {path: file for path, file in there.files.items() if path not in files}
        self.branches[branch] = self.add(title, there.oid, kept | new)
        return self.branches[branch]


def in_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub asks for LFS: for much content, or binary as far as `sample` shows, which may end within a character."""
    try:
        text = "\0" not in codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        text = False
    return path.endswith(".safetensors") or size > 10_000_000 or not text


def listing(files: Mapping[str, File]) -> list[dict[str, Any]]:
    """Every file and folder, in the form of `tree` and `paths-info`."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if parent.name}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": git_blob(path.encode())} for path in folders]
    entries += [{"type": "file", "path": path, **file.listed("oid", "oid")} for path, file in files.items()]
    return sorted(entries, key=lambda entry: entry["path"])


def card_errors(card: str) -> list[str]:
    """What the Hub finds wrong in a card's metadata: each of the two keys looked at holds one string or a list of them."""
    front = re.match(r"---\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)

    def values(key: str) -> list[str]:
        text = re.sub(r"(^|\s)#.*", "", front[1]) if front else ""
        found = re.search(rf"^{key}:(.*(?:\n\s*- .*)*)", text, re.MULTILINE)
        words = (word.strip(" -'\"\r") for word in re.split(r"[\n,\[\]]", found[1] if found else ""))
        return [word for word in words if word]

    wrong = [model for model in values("base_model") if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII)]
    errors = [f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.' for name in wrong]
    return errors + ([] if LICENSES.issuperset(values("license")) else [f'"license" must be one of {sorted(LICENSES)}'])


@dataclass
class Request:
    method: str
    path: str  # as it came: quoted, with the query
    headers: dict[str, str]  # keys in lower case
    body: bytes = b""  # not kept of LFS content
    length: int = 0  # bytes of the body that were read
    status: int = 0  # 0: no answer, or not yet


class Answer(Exception):
    """Returned, or raised to refuse. The body is bytes, or what becomes JSON."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        self.status, self.body, self.headers = status, body, headers


def refusal(status: int, error: str = "", code: str = "", **headers: str) -> Answer:
    error = error or SAID.get(status) or HTTPStatus(status).phrase
    return Answer(status, {"error": error}, **{"X-Error-Message": error, "X-Error-Code": code, **headers})


@dataclass
class Fault:
    method: str
    pattern: str
    times: int = 1
    answer: Answer | None = None  # instead of the Hub's own
    cut: int | None = None
    lost: bool = False
    delay: float = 0.0

    def due(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.pattern, path))


class Hub:
    """The server, while it is entered. What it keeps may be read and changed between requests."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {})  # token → user
        self.repos: dict[str, Repo] = {}  # "user/name" → model
        self.datasets: set[str] = set()
        self.objects: dict[str, bytes] = {}  # LFS content by SHA-256
        self.granted: dict[str, int] = {}  # sizes of the LFS uploads that were asked for
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """A new repository, its `files` in a second commit."""
        repo = self.repos[name] = Repo(self.objects, private)
        if files:
            repo.push(files)
        return repo

    # What is to go wrong with the next `times` requests whose method matches one regular expression as a whole, and whose
    # path, quoted and with its query, matches another anywhere.

    def fail(
        self, method: str, pattern: str, status: int, *, times: int = 1, headers: dict | None = None, body: dict | None = None
    ) -> None:  # fmt: skip
        """They do nothing and get this answer; `Retry-After` or `RateLimit` among `headers` makes the client wait."""
        answer = refusal(status, (body or {}).get("error", ""), "RepoNotFound" if status == 404 else "", **(headers or {}))
        answer.body = body or answer.body
        self.faults.append(Fault(method, pattern, times, answer))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Of uploads (PUT, POST), `after` bytes of the body are read; then the connection is reset."""
        self.faults.append(Fault("PUT|POST", pattern, times, cut=after))

    def lose(self, method: str, pattern: str, times: int = 1) -> None:
        """They are done; but instead of the answer there comes a reset."""
        self.faults.append(Fault(method, pattern, times, lost=True))

    def slow(self, method: str, pattern: str, seconds: float, times: int = 1) -> None:
        """They are done at once and answered later."""
        self.faults.append(Fault(method, pattern, times, delay=seconds))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed is no news
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def serve(self) -> None:
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if fault.due(self.command, self.path)), Fault("", ""))
            fault.times -= 1
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length if fault.cut is None else min(fault.cut, length))
        request.length = len(self.body)
        if fault.cut is not None or len(self.body) < length:
            return self.hang_up()
        if not self.path.startswith("/lfs/"):
            request.body = self.body
        with self.hub.lock:  # one request at a time: a commit is checked and made, or not, as one step
            answer = fault.answer or self.answer()
        if fault.lost:
            return self.hang_up()
        time.sleep(fault.delay)
        request.status = answer.status
        return self.send(answer)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = serve

    def hang_up(self) -> None:
        """A reset at once, as when a machine or a proxy in between goes away."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()

    def send(self, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        body = answer.body if raw else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if raw else "application/json"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            if value:
                self.send_header(name, " ".join(value.split()).encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> Answer:
        path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        try:
            if token and self.user is None:
                raise refusal(401, "Invalid credentials in Authorization header")
            answer = self.route([unquote(part) for part in path.split("/")[1:]])
            return answer if isinstance(answer, Answer) else Answer(200, answer)
        except Answer as answer:
            return answer
        except Exception:  # for whoever reads what the client raises; after a 500 it would first try again for long
            return Answer(501, {"error": traceback.format_exc()})

    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, name: str, write: bool = False) -> Repo:
        repo, owned = self.hub.repos.get(name), name.partition("/")[0] == self.user
        if repo is None or (repo.private and not owned):  # strangers do not learn which
            # Without the code, the client takes a 401 for this over https only.
            raise refusal(404 if self.user else 401, SAID[404], "RepoNotFound")
        if write and self.user is None:
            raise refusal(401)
        if write and not owned and "create_pr" not in self.query:
            raise refusal(403)
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.commit(revision)
        except KeyError:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def route(self, path: list[str]) -> Any:
        """The answer, or the body of a good one."""
        match self.command, path:
            case "GET", ["api", "whoami-v2"] if self.user:
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
                return {"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}
            case "POST", ["api", "repos", "create"] if self.user:
                return self.create(**self.json())
            case _, ["api", "whoami-v2"] | ["api", "repos", "create"]:
                raise refusal(401)
            case "POST", ["api", "validate-yaml"]:
                errors = card_errors(self.json()["content"])
                return Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})
            case "GET", ["api", "datasets", *rest] if (name := "/".join(rest).split("/revision/")[0]) in self.hub.datasets:
                return {"id": name, "sha": git_blob(name.encode()), "private": False, "siblings": []}
            case "POST", [user, name, "info", "lfs", "objects", "batch"]:
                self.repo(f"{user}/{name.removesuffix('.git')}", write=True)
                return self.lfs_batch()
            case "PUT", ["lfs", oid]:
                return self.lfs_put(oid)
            case "HEAD" | "GET", [user, name, "resolve", revision, *file]:
                return self.resolve(self.commit_of(self.repo(f"{user}/{name}"), revision), "/".join(file))
            case method, ["api", "models", user, name, *rest]:
                repo = self.repo(f"{user}/{name}", write=method != "GET" and rest[0] != "paths-info")
                return self.model(f"{user}/{name}", repo, rest)
            case _, ["api", "models" | "datasets", *_] | [_, "resolve", *_]:
                return self.repo("")
        raise NotImplementedError(f"{self.command} {self.path}")

    def model(self, name: str, repo: Repo, path: list[str]) -> Any:
        match self.command, path:
            case "GET", [] | ["revision", _]:
                return self.info(name, repo, self.commit_of(repo, path[1] if path else "main"))
            case "PUT", ["settings"]:
                repo.private = self.json().get("visibility", "private" if repo.private else "public") == "private"
                return {}
            case "GET", ["refs"]:
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
                pulls = [{"name": n, "ref": n, "targetCommit": oid} for n, oid in repo.pull_requests.items()]
                asked = {"pullRequests": pulls} if "include_prs" in self.query else {}
                return {"branches": branches, "converts": [], "tags": [], **asked}
            case "POST", ["branch", branch]:
                if branch.startswith("refs/"):
                    raise refusal(400, f"Invalid reference for a branch: {branch}")
                if branch in repo.branches:
                    raise refusal(409, "Reference already exists")
                repo.branches[branch] = self.commit_of(repo, self.json().get("startingPoint", "main")).oid
                return {}
            case "DELETE", ["branch", branch]:
                if branch == "main":
                    raise refusal(403, "Cannot delete refs/heads/main")
                if repo.branches.pop(branch, None) is None:
                    raise refusal(404, "Reference does not exist", "RevisionNotFound")
                return {}
            case "POST", ["preupload", revision]:
                return self.preupload(self.commit_of(repo, revision).files)
            case "POST", ["commit", revision]:
                return self.commit(name, repo, revision)
            case "POST", ["paths-info", revision]:
                paths = parse_qs(self.body.decode()).get("paths", [])
                return [entry for entry in listing(self.commit_of(repo, revision).files) if entry["path"] in paths]
            case "GET", ["tree", revision, *folder]:
                prefix = "/".join([*folder, ""])
                inside = [e for e in listing(self.commit_of(repo, revision).files) if e["path"].startswith(prefix)]
                if folder and not inside:
                    raise refusal(404, f"{prefix} does not exist", "EntryNotFound")
                whole = self.query.get("recursive") == "true"
                return [entry for entry in inside if whole or "/" not in entry["path"].removeprefix(prefix)]
        raise NotImplementedError(f"{self.command} {self.path}")

    def create(self, name: str, organization: str | None = None, visibility: str = "public", **other: Any) -> Any:
        if other.get("type", "model") != "model":
            raise NotImplementedError(other["type"])
        if organization not in (None, self.user):
            raise refusal(403, f'You don\'t have the rights to create a model under the namespace "{organization}"')
        full = f"{self.user}/{name}"
        answer = {"url": f"{self.hub.url}/{full}", "name": full}
        if full in self.hub.repos:  # with `exist_ok` the client goes on with the url in this answer
            raise Answer(409, {"error": "You already created this model repo", **answer})
        self.hub.add(full, private=visibility == "private")
        return answer

    def info(self, name: str, repo: Repo, commit: Commit) -> Any:
        blobs = "blobs" in self.query
        siblings = [{"rfilename": p, **(f.listed("blobId", "sha256") if blobs else {})} for p, f in commit.files.items()]
        answer = {"id": name, "modelId": name, "author": name.partition("/")[0], "sha": commit.oid, "private": repo.private}
        return {**answer, "gated": False, "disabled": False, "tags": [], "siblings": siblings}

    def preupload(self, there: Mapping[str, File]) -> Any:
        """Which way each file is to go. A file whose `oid` is what the client has itself, it leaves out of its commit."""
        files = []
        for file in self.json()["files"]:
            lfs = in_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            known = {"oid": there[file["path"]].oid} if file["path"] in there else {}
            files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        return {"files": files}

    def lfs_batch(self) -> Any:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in self.json()["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:  # else nothing is left to do
                self.hub.granted[wanted["oid"]] = wanted["size"]
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        """The store behind the Hub. The client shows it no token; an address that was given out is enough."""
        if oid not in self.hub.granted:
            raise refusal(403, "AccessDenied")
        if len(self.body) != self.hub.granted[oid] or hashlib.sha256(self.body).hexdigest() != oid:
            raise refusal(400, "BadDigest")
        self.hub.objects[oid] = self.body
        return b""

    def commit(self, name: str, repo: Repo, revision: str) -> Any:
        head = self.commit_of(repo, revision)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        parent = header["value"].get("parentCommit")
        refs = repo.pull_requests if revision in repo.pull_requests else repo.branches
        pull: dict[str, str] = {}
        if "create_pr" in self.query:  # it begins at the parent, which need not be the branch's last commit
            head = self.commit_of(repo, parent or revision)
            number = len(repo.pull_requests) + 1
            refs, revision = repo.pull_requests, f"refs/pr/{number}"
            pull["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        elif revision not in refs:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        elif parent and parent != head.oid:
            raise refusal(412)
        files = dict(head.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        card = files.get("README.md")
        if card and card != head.files.get("README.md") and (errors := card_errors(card.data.decode())):
            raise refusal(400, "\n".join(errors))
        refs[revision] = oid = repo.add(header["value"]["summary"], head.oid, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", **pull}

    def apply(self, operation: str, value: dict[str, Any], files: dict[str, File]) -> None:
        """One line of a commit."""
        path = value["path"]
        match operation:
            case "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile":
                if value["oid"] not in self.hub.objects:
                    said = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise refusal(400, f"{said} Offending file: - {path}")
                files[path] = File(self.hub.objects[value["oid"]], lfs=True)
            case "deletedFile" | "deletedFolder":
                folder = path.rstrip("/") + "/"
                gone = [file for file in files if (file == path if operation == "deletedFile" else file.startswith(folder))]
                if not gone:
                    raise refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                for file in gone:
                    del files[file]
            case _:
                raise NotImplementedError(operation)

    def resolve(self, commit: Commit, path: str) -> Any:
        headers = {"X-Repo-Commit": commit.oid}  # without the file too: the client remembers that there is none
        if path not in commit.files:
            raise refusal(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        size = len(file.data)
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(size)} if file.lfs else {}
        if not (part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return Answer(200, file.data, **headers)
        start, stop = int(part[1]), min(size, int(part[2] or size) + 1)
        if start >= stop:
            raise refusal(416, **{"Content-Range": f"bytes */{size}"})
        return Answer(206, file.data[start:stop], **headers, **{"Content-Range": f"bytes {start}-{stop - 1}/{size}"})
