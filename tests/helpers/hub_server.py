"""A small Hub on the loopback interface: what `huggingface_hub` needs to create, write and read model repositories."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_loopback"
USER = "tester"


@dataclass
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def oid(self) -> str:
        """As git names a blob, or LFS a file."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        listing = json.dumps([len(self.messages), *sorted((name, file.oid) for name, file in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


@dataclass
class Fault:
    """The next `count` requests whose method and path match `pattern` fail."""

    pattern: str
    action: str  # "500", or "cut": the connection breaks in the middle of the body
    count: int = 1


class LoopbackHub(ThreadingHTTPServer):
    """Use as a context manager; `url` is its `HF_ENDPOINT`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients may hang up

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        files = repository.commits[repository.branches.get(revision, revision)]
        return {name: file.content for name, file in files.items()}

    def take_fault(self, request: str) -> str | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.pattern, request):
                    fault.count -= 1
                    return fault.action
        return None


class _Problem(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.path_only = urlsplit(self.path).path
        fault = self.server.take_fault(f"{self.command} {self.path_only}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and self.command != "GET":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        if fault == "500":
            return self.reply(500, b"out of order")
        self.cut_reply = fault == "cut"
        try:
            for method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, self.path_only)
                if match and self.command in method.split("|"):
                    with self.server.lock:
                        arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                        if arguments.pop("kind", None) == "spaces":
                            arguments["repo"] = f"spaces/{arguments['repo']}"
                        answer = getattr(self, name)(**arguments)
                    return answer()
            raise _Problem(404, f"no such endpoint: {self.command} {self.path}")
        except _Problem as problem:
            headers = {"X-Error-Message": problem.message}
            if problem.code is not None:
                headers["X-Error-Code"] = problem.code
            self.reply(problem.status, json.dumps({"error": problem.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "cut_reply", False):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def json(self, content, status: int = 200):
        return lambda: self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    # What the endpoints have in common

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def authenticate(self):
        if not self.has_token:
            raise _Problem(401, "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        if "Authorization" in self.headers and not self.has_token:
            raise _Problem(401, "Invalid credentials in Authorization header")
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.has_token):
            raise _Problem(404 if self.has_token else 401, "Repository not found", "RepoNotFound")
        return repository

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.repository(repo)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # Endpoints

    def whoami(self):
        self.authenticate()
        return self.json({"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []})

    def create(self):
        self.authenticate()
        settings = json.loads(self.body)
        name = f"{settings.get('organization') or USER}/{settings['name']}"
        if settings.get("type") == "space":
            if settings.get("sdk") != "static":
                raise _Problem(400, "a Space needs an SDK")
            return self.create_space(name)
        if name in self.server.repositories:
            answer = {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            return self.json(answer, 409)
        if not name.startswith(f"{USER}/"):
            raise _Problem(403, "You don't have the rights to create a model under this namespace")
        repository = self.server.repositories[name] = Repository(settings.get("visibility") == "private")
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
        return self.json({"url": f"{self.server.url}/{name}", "name": name})

    def create_space(self, name: str):
        status = 409 if f"spaces/{name}" in self.server.repositories else 200
        if status == 200:
            space = self.server.repositories[f"spaces/{name}"] = Repository(False)
            space.commit("main", {".gitattributes": File(b"")}, "initial commit")
        return self.json({"url": f"{self.server.url}/spaces/{name}", "name": name}, status)

    def validate(self):
        content = json.loads(self.body)["content"]
        errors = [{"message": message} for message in metadata_problems(content)]
        return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo, revision):
        self.authenticate()
        repository = self.repository(repo)
        if revision in repository.branches:
            raise _Problem(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        return self.json({})

    def preupload(self, repo, revision):
        self.authenticate()
        _, files = self.revision(repo, revision)
        answer = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if asked["path"].endswith(".safetensors") else "regular"
            old = files.get(asked["path"])
            row = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
            answer.append({**row, "oid": old.oid} if old else row)
        return self.json({"files": answer})

    def batch(self, repo):
        self.authenticate()
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.server.uploads:
                asked["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            objects.append(asked)
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Problem(400, "the content is not what was announced")
        self.server.uploads[oid] = self.body
        return self.json({})

    def commit(self, repo, revision):
        self.authenticate()
        _, files = self.revision(repo, revision)
        if revision not in self.repository(repo).branches:
            raise _Problem(400, "a commit needs a branch")
        files, message = dict(files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.uploads:
                    raise _Problem(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.server.uploads[value["oid"]], is_lfs=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Problem(400, f"unknown operation {item['key']}")
        sha = self.repository(repo).commit(revision, files, message)
        return self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, repo, revision="main"):
        sha, files = self.revision(repo, revision)
        names = [{"rfilename": name} for name in sorted(files)]
        private = self.repository(repo).private
        return self.json({"id": repo, "modelId": repo, "sha": sha, "private": private, "tags": [], "siblings": names})

    def tree(self, repo, revision, folder=None):
        _, files = self.revision(repo, revision)
        rows = []
        for name, file in sorted(files.items()):
            row = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
            if file.is_lfs:
                row["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
            rows.append(row)
        if folder:
            raise _Problem(404, f"{folder} does not exist", "EntryNotFound")
        return self.json(rows)

    def resolve(self, repo, revision, name):
        if self.repository(repo).gated:
            raise _Problem(403 if self.has_token else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        sha, files = self.revision(repo, revision)
        headers = {"X-Repo-Commit": sha}
        if name not in files:
            return lambda: self.reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        file = files[name]
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, total = int(match[1]), len(file.content)
            end = int(match[2]) if match[2] else total - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
            return lambda: self.reply(206, file.content[start : end + 1], headers)
        return lambda: self.reply(200, file.content, {**headers, "Content-Length": str(len(file.content))})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_KIND = "(?P<kind>models|spaces)"
_ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<revision>.+)", "branch"),
    ("POST", f"/api/{_KIND}/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", f"/api/{_KIND}/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET|HEAD", f"/spaces/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
    ("GET|HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
]


def metadata_problems(card: str) -> list[str]:
    """What the Hub would not accept of a card's metadata, as far as its documentation says."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    if match is None:
        return ["there is no metadata"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    problems = []
    for name, kind in {"library_name": str, "pipeline_tag": str, "license": str, "base_model": str}.items():
        if name in metadata and not isinstance(metadata[name], kind):
            problems.append(f"`{name}` must be a string")
    for name in ("tags", "datasets", "language"):
        values = metadata.get(name, [])
        if not isinstance(values, (list, str)) or not all(isinstance(value, str) for value in values):
            problems.append(f"`{name}` must be strings")
    if not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "other")):
        problems.append("`license` must be an identifier")
    for model in metadata.get("model-index", []):
        if not isinstance(model.get("name"), str):
            problems.append("`model-index` needs a name")
        for result in model["results"]:
            if not {"type"} <= result["task"].keys() or not {"type", "name"} <= result["dataset"].keys():
                problems.append("a result needs the type of its task, and type and name of its dataset")
            if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                problems.append("a metric needs a type and a value")
    return problems
