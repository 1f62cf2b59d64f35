"""Publishing: what a commit holds, and that the published adapter loads again, against a small Hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import make_base, shake
from safetensors.torch import load, load_file

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_moextend import FILE, INDEX

REPO = "me/my-adapter"
PLAN = {1: [0], 3: [2, 5]}
CODE = {path.name for path in Path(sys.modules["modeling_moextend"].__file__).parent.glob("*_moextend.py")}


class Hub:
    """One model repository: branches of commits, each a whole tree (path -> content)."""

    def __init__(self):
        self.exists, self.private, self.objects = False, None, {}
        self.commits, self.branches = [("0" * 40, {})], {"main": 0}
        self.messages, self.requests, self.operations = [], [], []

    def tree(self, revision="main"):
        shas = {sha: number for number, (sha, _) in enumerate(self.commits)}
        return self.commits[self.branches[revision] if revision in self.branches else shas[revision]]

    def commit(self, revision, lines):
        files = dict(self.tree(revision)[1])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.messages.append(value["summary"])
                continue
            self.operations.append((key, value["path"]))
            if key == "deletedFile":
                del files[value["path"]]
            else:
                known = self.objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
                files[value["path"]] = known
        sha = f"{len(self.commits):040x}"
        self.commits.append((sha, files))
        self.branches[revision] = len(self.commits) - 1
        return sha


class Handler(BaseHTTPRequestHandler):
    """As much of the Hub's API as huggingface_hub needs to create, list, upload, commit and download."""

    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, content=None, **headers):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code):
        self.answer({"error": code}, status=404, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self):
        hub, path = self.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        url = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            existed, hub.exists = hub.exists, True
            asked = json.loads(body)  # the word depends on the version of huggingface_hub
            hub.private = hub.private or asked.get("private") is True or asked.get("visibility") == "private"
            return self.answer({"url": f"{url}/{REPO}", "name": REPO}, status=409 if existed else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path[5:]
            hub.objects[path[5:]] = body
            return self.answer({})
        if not hub.exists or REPO not in path:
            return self.missing("RepoNotFound")
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"actions": {"upload": {"href": f"{url}/lfs/{one['oid']}"}}} for one in objects]
            found = [one | action for one, action in zip(objects, actions, strict=True)]
            return self.answer({"transfer": "basic", "objects": found})
        rest = path.split(REPO)[1].strip("/")
        action, _, place = rest.partition("/")
        if action == "branch":
            hub.branches.setdefault(place, hub.branches["main"])
            return self.answer({})
        revision = place.split("/")[0] or "main"
        if revision not in hub.branches and revision not in [sha for sha, _ in hub.commits]:
            return self.missing("RevisionNotFound")
        sha, files = hub.tree(revision)
        if action == "resolve":
            name = place.split("/", 1)[1]
            if name not in files:
                return self.missing("EntryNotFound")
            etag = hashlib.sha256(files[name]).hexdigest()
            return self.answer(content=files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)
        if action == "preupload":
            modes = [(one["path"], one["path"].endswith(".safetensors")) for one in json.loads(body)["files"]]
            found = [{"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False} for p, big in modes]
            return self.answer({"files": found})
        if action == "commit":
            new = hub.commit(revision, [json.loads(line) for line in body.splitlines()])
            return self.answer({"success": True, "commitUrl": f"{url}/{REPO}/commit/{new}", "commitOid": new})
        entries = [{"type": "file", "path": p, "oid": "0" * 40, "size": len(c)} for p, c in sorted(files.items())]
        if action == "tree":
            return self.answer(entries)
        assert action in ("", "revision"), self.path
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        return self.answer({"_id": "0", "id": REPO, "modelId": REPO, "sha": sha, "siblings": siblings, "tags": []})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


@pytest.fixture
def server():
    hub = Hub()
    handler = type("OneHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Base and adapter in folders, what the model answers, and files that must not leave this machine."""
    root = tmp_path_factory.mktemp("local")
    make_base().save_pretrained(root / "base")
    model = shake(MoExtendForCausalLM.from_base(str(root / "base"), PLAN, paper=True)).eval()
    model.save_pretrained(root / "adapter")
    with torch.no_grad():
        return root, model(input_ids=torch.arange(3, 13)[None]).logits


def run(server, root, script, *, package, cache):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    if package:
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    start = f"import torch\nfrom pathlib import Path\nroot, repo = Path({str(root)!r}), {REPO!r}\n"
    command = [sys.executable, "-P", "-c", start + script]
    child = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


def parts(content):
    """Header and data of a safetensors file; the header's entries are in no fixed order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


PUSH = """
from modeling_moextend import MoExtendForCausalLM
model = MoExtendForCausalLM.from_pretrained(root / "adapter")
model.push_to_hub(repo, private=True, commit_message="A first adapter")
model.push_to_hub(repo, max_shard_size="20KB")
model.push_to_hub(repo)
model.push_to_hub(repo, revision="other", adapter_dtype="float16")
folder = root / "training"
for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "my_token.txt", ".env", "model.safetensors",
             "checkpoint-5/config.json", "checkpoint-5/tokenizer.json", "checkpoint-5/moextend_adapter.safetensors",
             "checkpoint-5/modeling_moextend.py", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "processor_config.json", "preprocessor_config.json", "README.md", "moextend_adapter.safetensors.ab.tmp"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}" if name.endswith("json") else name)
model.save_pretrained(folder, push_to_hub=True, repo_id=repo, revision="trained")
"""

PULL = """
import sys
sys.modules["modeling_moextend"] = None  # installed or not, importing the package fails here
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained(repo, trust_remote_code=True).model_type == "moextend"
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
ids = torch.arange(3, 13)[None]
print(model(input_ids=ids).logits.tolist())
half = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision="other")
print(half.push_to_hub(repo, revision="again").commit_message)
"""


def test_publish_and_load(server, adapter, tmp_path):
    root, expected = adapter
    run(server, root, PUSH, package=True, cache=tmp_path)
    assert server.private, "as asked for when the repository was made"
    assert server.messages[0] == "A first adapter"
    trees = [files for _, files in server.commits[1:]]
    assert len(trees) == 5, "one commit a push"

    first = trees[0]
    assert set(first) == {"config.json", FILE, "README.md"} | CODE
    assert parts(first[FILE]) == parts((root / "adapter" / FILE).read_bytes())
    assert first["config.json"] == (root / "adapter" / "config.json").read_bytes()
    card = first["README.md"].decode()
    assert REPO in card and "library_name: transformers" in card and str(root) not in card
    assert re.search(r"size of the adapter \| .*bytes", card)

    sharded = trees[1]
    assert INDEX in sharded and FILE not in sharded, "the single file would be a stale adapter beside the index"
    assert sum(name.startswith("moextend_adapter-") for name in sharded) > 1
    assert set(trees[2]) == set(first), "shards and index are gone again"
    assert not [path for key, path in server.operations[len(first) :] if path == "README.md" and key == "file"][1:], (
        "a card that the repository has is left alone"
    )

    assert set(server.tree("other")[1]) == set(first)
    trained = set(server.tree("trained")[1])
    given = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    given |= {"processor_config.json", "preprocessor_config.json"}
    assert trained == {"config.json", FILE} | CODE | given
    assert server.tree("trained")[1]["README.md"] == b"README.md", "the folder's own card"

    lines = run(server, root, PULL, package=False, cache=tmp_path).splitlines()
    assert torch.equal(torch.tensor(json.loads(lines[0])), expected)
    assert lines[1] == "Upload MoExtend adapter"
    again = load(server.tree("again")[1][FILE])  # pushed by remote code: float16 in, the base's float32 out
    ours = load_file(root / "adapter" / FILE)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name].half().float()) for name in ours)


def test_unknown_options_are_refused():
    model = MoExtendForCausalLM.from_base(make_base(), PLAN)
    with pytest.raises(TypeError, match="unexpected keyword argument 'safe_serialisation'"):
        model.push_to_hub(REPO, safe_serialisation=True)
