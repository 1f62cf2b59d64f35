"""A Hugging Face Hub on this machine: as much of its HTTP API as publishing and loading models takes, for tests.

    with running_hub() as hub:
        hub.add("org/base", folder)
        ...  # processes with hub.environment(home) talk to it through the real huggingface_hub

Repositories are content-addressed and their commits never change: a commit is a tree (path -> sha256 of its content),
a branch names a commit. Large files go the way of Git LFS: batch, upload, commit by their sha256; they are downloaded
from another host than the Hub's (a redirect to a signed address which refuses the Hub's token, as storage does). Xet,
a binary protocol with a compiled client, is not spoken here: `HF_HUB_DISABLE_XET=1` makes huggingface_hub take LFS.

`hub.fail("PUT /lfs/", "500")` makes requests fail: see `Hub.fail`. `hub.requests` is the log: (method, path, user).
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".png")  # what the Hub's .gitattributes sends to LFS, of what tests have
LICENSES = {"apache-2.0", "mit", "llama3", "gemma", "cc-by-4.0", "other"}  # some of those that the Hub knows
TASKS = {"text-generation", "image-text-to-text", "audio-text-to-text", "any-to-any"}
REPO_NAME = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")


@dataclass
class Repo:
    """A model repository. `commits`: sha -> (message, {path: sha256}); `refs`: branch or pull request -> sha."""

    name: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    history: list = field(default_factory=list)  # (ref, sha), in order

    def resolve(self, revision):
        """The commit that a branch, a pull request or a sha names, or `None`."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """Everything the server knows."""

    def __init__(self):
        self.repos, self.blobs, self.tokens = {}, {}, {"hf_me": "me", "hf_stranger": "stranger"}
        self.requests, self.failures, self.url, self.lock = [], [], None, threading.RLock()

    # ------------------------------------------------------------ for tests

    def environment(self, home):
        """Variables of a process for which this is the Hub, with `home` for its caches and no token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add(self, name, folder, private=False, revision="main"):
        """Commits all files of a folder; returns the commit."""
        repo = self.repos.setdefault(name, Repo(name, private))
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.commit(repo, revision, "added", contents)

    def files(self, name, revision="main"):
        """{path: content} of a revision."""
        repo = self.repos[name]
        return {path: self.blobs[oid] for path, oid in repo.commits[repo.resolve(revision)][1].items()}

    def fail(self, request, how, times=1):
        """Lets the next `times` requests fail whose "METHOD /path" begins with `request`.

        `how`: a status like "500", or "drop" to close the connection in the middle of the request's body.
        """
        self.failures.append([request, how, times])

    # ------------------------------------------------------------ for the handler

    def failure(self, request):
        with self.lock:
            for rule in self.failures:
                if request.startswith(rule[0]) and rule[2]:
                    rule[2] -= 1
                    return rule[1]
        return None

    def store(self, content):
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid

    def create(self, name, private):
        """A new repository, as the Hub makes it: one commit with .gitattributes."""
        repo = self.repos[name] = Repo(name, private)
        self.commit(repo, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repo, ref, message, added, deleted=()):
        """One more commit on `ref`. `added`: path -> content, or sha256 of a stored one."""
        parent = repo.refs.get(ref)
        tree = dict(repo.commits[parent][1]) if parent else {}
        for path in deleted:
            del tree[path]
        tree |= {path: self.store(one) if isinstance(one, bytes) else one for path, one in added.items()}
        sha = hashlib.sha1(json.dumps([repo.name, parent, message, tree]).encode()).hexdigest()
        repo.commits[sha] = (message, tree)
        repo.refs[ref] = sha
        repo.history.append((ref, sha))
        return sha


def git_blob(content):
    """What git calls a content: the ETag of a regular file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_problems(text):
    """What is wrong with the metadata of a README.md, as /api/validate-yaml says it. The Hub checks more than this."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return []
    data = yaml.safe_load(match.group(1))
    wrong = []
    for key, names in (("base_model", data.get("base_model")), ("datasets", data.get("datasets"))):
        names = [names] if isinstance(names, str) else names or []
        wrong += [f'"{key}" with value "{name}" is not valid' for name in names if not REPO_NAME.match(name)]
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" is not valid')
    if data.get("license") not in (None, *LICENSES):
        wrong.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not data.get("license_name"):
        wrong.append('"license_name" is required with "license: other"')
    if data.get("pipeline_tag") not in (None, *TASKS):
        wrong.append('"pipeline_tag" is not valid')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (model["name"] and result["task"]["type"] and {"type", "name"} <= result["dataset"].keys()):
                wrong.append('"model-index" is not valid')
            if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                wrong.append('"model-index" has a metric without type or value')
    return wrong


class Handler(BaseHTTPRequestHandler):
    """Finds what a request is about, then answers it."""

    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def handle_request(self):
        address = urlsplit(self.path)
        self.place, self.query = unquote(address.path), parse_qs(address.query)
        self.user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        self.hub.requests.append((self.command, self.place, self.user))
        length, how = int(self.headers.get("Content-Length", 0)), self.hub.failure(f"{self.command} {self.place}")
        if how == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.close()
        self.body = self.rfile.read(length)
        if how is not None:
            return self.say({"error": "out of order"}, int(how))
        with self.hub.lock:
            return self.route()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def say(self, value=None, status=200, content=None, **headers):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code, status=404, **headers):
        self.say({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def route(self):
        place = self.place
        if place == "/api/repos/create":
            return self.create()
        if place == "/api/validate-yaml":
            wrong = card_problems(json.loads(self.body)["content"])
            return self.say({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)
        if place == "/api/whoami-v2":
            return self.say({"name": self.user, "type": "user", "orgs": []}, 200 if self.user else 401)
        if place.startswith("/lfs/"):
            return self.receive(place.removeprefix("/lfs/"))
        if place.startswith("/storage/"):
            return self.send_blob(place.removeprefix("/storage/"))
        match = (
            re.match(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<action>batch)$", place)
            or re.match(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<action>[\w\-]+)(?:/(?P<rest>.*))?)?$", place)
            or re.match(r"/(?P<repo>[^/]+/[^/]+)/(?P<action>resolve)/(?P<rest>.*)$", place)
        )
        repo = self.hub.repos.get(match["repo"]) if match else None
        if repo is None or repo.private and self.user != "me":
            return self.missing("RepoNotFound", 404 if self.user else 401)
        if self.command in ("POST", "PUT") and match["action"] != "paths-info" and self.user != "me":
            return self.say({"error": "no right to write"}, 403 if self.user else 401)
        rest = (match.groupdict().get("rest") or "").strip("/")
        return getattr(self, f"do_{match['action'] or 'info'}".replace("-", "_"))(repo, rest)

    def revision(self, repo, rest):
        """(commit, what follows the revision in the path); answers by itself where there is none: (None, None)."""
        first, _, path = rest.partition("/")
        if rest.startswith("refs/pr/"):
            first, path = "/".join(rest.split("/")[:3]), "/".join(rest.split("/")[3:])
        sha = repo.resolve(first or "main")
        if sha is None:
            self.missing("RevisionNotFound")
        return sha, path

    # ------------------------------------------------------------ reading

    def do_info(self, repo, rest):
        sha, _ = self.revision(repo, rest)
        if sha is None:
            return
        tree = repo.commits[sha][1]
        card = self.hub.blobs[tree["README.md"]].decode() if "README.md" in tree else ""
        header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        info = {"_id": "0", "id": repo.name, "modelId": repo.name, "sha": sha, "private": repo.private, "tags": []}
        info["cardData"] = yaml.safe_load(header.group(1)) if header else {}
        self.say({**info, "siblings": [{"rfilename": path} for path in sorted(tree)]})

    do_revision = do_info

    def do_tree(self, repo, rest):
        sha, folder = self.revision(repo, rest)
        if sha is None:
            return
        entries = []
        for path, oid in sorted(repo.commits[sha][1].items()):
            content = self.hub.blobs[oid]
            if path.startswith(f"{folder}/" if folder else ""):
                lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if path.endswith(LFS) else {}
                entries.append({"type": "file", "path": path, "oid": git_blob(content), "size": len(content), **lfs})
        self.say(entries)

    def do_refs(self, repo, rest):
        names = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.refs.items()]
        self.say({"branches": names, "tags": [], "converts": []})

    def do_commits(self, repo, rest):
        sha, _ = self.revision(repo, rest)
        if sha is None:
            return
        ref = rest or "main"
        found = [one for name, one in repo.history if name == ref]
        date = "2024-01-01T00:00:00.000Z"
        self.say(
            [{"id": s, "title": repo.commits[s][0], "message": "", "authors": [], "date": date} for s in found[::-1]]
        )

    def do_resolve(self, repo, rest):
        sha, path = self.revision(repo, rest)
        if sha is None:
            return
        oid = repo.commits[sha][1].get(path)
        if oid is None:
            return self.missing("EntryNotFound", X_Repo_Commit=sha)
        content = self.hub.blobs[oid]
        if not path.endswith(LFS):
            return self.say(content=content, ETag=f'"{git_blob(content)}"', X_Repo_Commit=sha)
        storage = f"http://localhost:{self.server.server_port}/storage/{oid}?signature=1"
        linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content), "Location": storage}
        self.say({}, 302, X_Repo_Commit=sha, **linked)

    def send_blob(self, oid):
        """Storage: another host, which knows signatures but not the Hub's tokens."""
        if "Authorization" in self.headers or self.query.get("signature") != ["1"]:
            return self.say({"error": "only one way to say who you are"}, 400)
        content = self.hub.blobs[oid]
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin is None:
            return self.say(content=content, ETag=f'"{oid}"')
        start = int(begin.group(1))
        self.say(content=content[start:], status=206, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")

    # ------------------------------------------------------------ writing

    def create(self):
        asked = json.loads(self.body)
        if self.user is None:
            return self.missing("Unauthorized", 401)
        owner = asked.get("organization") or self.user
        if owner != self.user:
            return self.say({"error": f"no right to create models under {owner}"}, 403)
        name = f"{owner}/{asked['name']}"
        existed = name in self.hub.repos
        if not existed:  # the word for it depends on the version of huggingface_hub
            self.hub.create(name, asked.get("private") is True or asked.get("visibility") == "private")
        self.say({"url": f"{self.hub.url}/{name}", "name": name}, 409 if existed else 200)

    def do_branch(self, repo, name):
        if name in repo.refs:
            return self.say({"error": "Reference already exists"}, 409)
        repo.refs[name] = repo.refs[json.loads(self.body or b"{}").get("startingPoint", "main")]
        self.say({})

    def do_preupload(self, repo, rest):
        sha, _ = self.revision(repo, rest)
        if sha is None:
            return
        answers = []
        for one in json.loads(self.body)["files"]:
            oid, large = repo.commits[sha][1].get(one["path"]), one["path"].endswith(LFS)
            known = oid if large or oid is None else git_blob(self.hub.blobs[oid])
            answer = {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": known})
        self.say({"files": answers})

    def do_batch(self, repo, rest):
        answers = []
        for one in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            answers.append(one if one["oid"] in self.hub.blobs else one | upload)
        self.say({"transfer": "basic", "objects": answers})

    def receive(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.say({"error": "another content than announced"}, 422)
        self.hub.store(self.body)
        self.say({})

    def do_commit(self, repo, ref):
        """All of it or nothing: every line is looked at before the tree changes."""
        lines = [json.loads(line) for line in self.body.splitlines()]
        tree = repo.commits[repo.resolve(ref)][1] if repo.resolve(ref) else None
        if tree is None:
            return self.missing("RevisionNotFound")
        added, deleted, message = {}, [], ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "deletedFile" and value["path"] in tree:
                deleted.append(value["path"])
            elif line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.blobs:
                added[value["path"]] = value["oid"]
            else:
                return self.say({"error": f"not possible: {line['key']} {value['path']}"}, 400)
        request = None
        if self.query.get("create_pr"):
            request = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
            repo.refs[request] = repo.resolve(ref)
        sha = self.hub.commit(repo, request or ref, message, added, deleted)
        answer = {"success": True, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{sha}", "commitOid": sha}
        number = request and request.rpartition("/")[2]
        self.say(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo.name}/discussions/{number}"} if request else {}))


@contextlib.contextmanager
def running_hub():
    """A `Hub` that answers on a port of this machine until the block ends (`hub.stop()`: until then)."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    hub.stop = stop
    try:
        yield hub
    finally:
        stop()
