"""A small Hub on the loopback interface: what huggingface_hub's client asks for to create, upload and download a model.

Repositories are dictionaries in memory. Files of `lfs_bytes` and more go the LFS way (batch, PUT, verify), others come
with the commit. `failures` makes a route answer with an error; `requests` remembers what was asked.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One repository: its files by revision, and how many commits it has seen."""

    private: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.revisions["main" if revision == self.sha else revision] if self.knows(revision) else None

    def knows(self, revision: str) -> bool:
        return revision == self.sha or revision in self.revisions


class Hub:
    """The server and what it holds; a context manager that serves in threads while it is open."""

    def __init__(self, token: str, lfs_bytes: int = 100_000):
        self.token, self.lfs_bytes = token, lfs_bytes
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        # (method, pattern of the path) -> (status, body)
        self.failures: dict[tuple[str, str], tuple[int, dict]] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class BoundHandler(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, pattern: str) -> list[tuple[str, str]]:
        return [request for request in self.requests if re.search(pattern, request[1])]


class Handler(BaseHTTPRequestHandler):
    """Finds the route for a path in ROUTES and calls the method of that name."""

    server_hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "create_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        hub.requests.append((self.command, path))
        for (method, pattern), (status, answer) in hub.failures.items():
            if method == self.command and re.search(pattern, path):
                return self.answer(status, answer)
        for method, pattern, name in self.ROUTES:
            # Matched as it was sent: unquoted, the revision refs%2Fpr%2F1 would look like folders.
            found = re.fullmatch(pattern, urlsplit(self.path).path)
            if method == self.command and found:
                groups = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                # Uploads of LFS objects go to an address that is secret enough by itself.
                if name not in ("lfs_upload", "validate_yaml", "resolve", "info") and not self._authorised():
                    return self.answer(401, {"error": "Invalid username or password."})
                if "repo" in groups and groups["repo"] not in hub.repositories:
                    return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, name)(**groups)
        return self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server_hub.token}"

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: dict | list | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------ uploading

    def create_repository(self) -> None:
        wanted, hub = json.loads(self.body), self.server_hub
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name in hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
        hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return self.answer(200, {"url": f"{hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def who_am_i(self) -> None:
        self.answer(200, {"name": "user", "type": "user", "orgs": []})

    def create_branch(self, repo: str, revision: str) -> None:
        revisions = self.server_hub.repositories[repo].revisions
        if revision in revisions:
            return self.answer(409, {"error": f"Reference already exists: {revision}"})
        revisions[revision] = dict(revisions["main"])
        return self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        limit = self.server_hub.lfs_bytes
        self.answer(200, {"files": [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= limit else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, repo: str) -> None:
        hub = self.server_hub
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.objects:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
                entry["actions"]["verify"] = {"href": f"{hub.url}/lfs/verify"}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content does not have that digest"})
        self.server_hub.objects[oid] = self.body
        return self.answer(200, {})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        found = self.server_hub.objects.get(wanted["oid"])
        self.answer(200 if found is not None and len(found) == wanted["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        hub, repository = self.server_hub, self.server_hub.repositories[repo]
        files = repository.files(revision)
        if files is None:
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        repository.commits.append(lines[0]["value"])
        url = f"{hub.url}/{repo}/commit/{repository.sha}"
        return self.answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    # ------------------------------------------------------------------------------------------ downloading

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self.server_hub.repositories[repo]
        names = [{"rfilename": name} for name in sorted(repository.files(revision) or ())]
        answer = {"id": repo, "modelId": repo, "sha": repository.sha, "private": repository.private, "siblings": names}
        card = (repository.files(revision) or {}).get("README.md", b"").decode()
        if match := re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL):
            import yaml

            answer["cardData"] = yaml.safe_load(match.group(1))
        self.answer(200, {**answer, "tags": []})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        files = self.server_hub.repositories[repo].files(revision) or {}
        names = [name for name in sorted(files) if name.startswith(folder.strip("/"))]
        entries = [
            {"type": "file", "path": n, "size": len(files[n]), "oid": hashlib.sha1(files[n]).hexdigest()} for n in names
        ]
        self.answer(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self.server_hub.repositories[repo]
        commit = {"X-Repo-Commit": repository.sha}
        files = repository.files(revision)
        if files is None:
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        content, headers = files[path], {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', **commit}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(206, content[start : end + 1], headers)
        return self.answer(200, content, {"Accept-Ranges": "bytes", **headers})

    def log_message(self, *arguments) -> None:
        """Silence: requests are in `Hub.requests`."""
