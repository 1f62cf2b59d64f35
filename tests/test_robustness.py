"""Adapters as strangers hand them on, and saves that go wrong: what loads is whole, all else is one clear error."""

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PAPER, batch, make_base, shake
from hostile import (
    CHANGES,
    FILE,
    INDEX,
    Folder,
    any_of,
    change_reader,
    change_values,
    changed_by,
    changed_folders,
    packed,
    unpacked,
    write_out,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from loading_server import ADAPTERS, MEGABYTES, SECONDS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM, adapter_file_moextend
from modeling_moextend.validation_moextend import ENTRIES

HERE = Path(__file__).parent
# What a clear error names: a file of the folder, an entry of the config, a tensor, or whose checkpoint it is about.
WORDS = (
    "moextend_adapter",
    "checksum in its header",
    "can't be an entry",
    "base",
    "encoder",
    "missing: ",
    "shape: ",
    "unexpected: ",
    "The processor of ",
)
NAMED = re.compile("|".join((*WORDS, *ENTRIES, *MoExtendConfig().to_dict())))


class Server:
    """`loading_server.py` at work; see there."""

    def __init__(self, root):
        self.root, self.canary = root, root / "canary"
        paths = f"{HERE.parent}{os.pathsep}{HERE}"
        environment = os.environ | {"PYTHONPATH": paths, "HF_HOME": str(root / "home"), "CANARY": str(self.canary)}
        # It forks for each load, and a fork has none of its parent's threads to compute with.
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        (root / "work").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "loading_server.py"), str(root)],
            env=environment,
            cwd=root / "work",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(root / "log", "w"),
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n", (root / "log").read_text()[-3000:]
        self.folders = {name: self.in_memory(root / name) for name in ADAPTERS}

    @staticmethod
    def in_memory(folder):
        return Folder({path.name: path.read_bytes() for path in sorted(folder.iterdir())})

    def load(self, adapter, folder, by_name=False, reader=False):
        request = {"adapter": adapter, "folder": str(folder), "by_name": by_name, "reader": reader}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("robust")
    server = Server(root)
    shutil.copytree(root / "paper", root / "elsewhere")
    (root / "secret").mkdir()
    (root / "secret" / "config.json").write_text('{"secret": 1}')
    make_coded_base(root)
    yield server
    server.close()


def make_coded_base(root):
    """A base that would run code of its own, where the working directory says."""
    coded = root / "work" / "coded"
    shutil.copytree(root / "base", coded)
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "coded", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text("import pathlib, os\npathlib.Path(os.environ['CANARY']).touch()\n")


def may_be_opened(path, server, folder, by_name):
    """Whether a load may open `path`: the folder, and base and encoder where it was to find them itself."""
    path = Path(path)
    if not by_name or path.is_relative_to(folder):
        return path.is_relative_to(folder)
    if re.fullmatch(r"/proc/\d+/mounts", str(path)):  # transformers asks how fast the base's disk is
        return True
    places = ("base", "encoder", "home", "work/coded", "secret", "copy")  # where a config says that the base lies
    return any(path.is_relative_to(server.root / place) for place in places)


def complaint(answer, server, folder, by_name):
    """What is wrong with the answer of a load, or `None`."""
    strays = [path for path in answer.get("opened", ()) if not may_be_opened(path, server, folder, by_name)]
    if strays or answer.get("forbidden") or server.canary.exists():
        return f"opened {strays}, did {answer.get('forbidden')}, ran code: {server.canary.exists()}"
    if answer.get("megabytes", 0) > MEGABYTES or answer.get("seconds", 0) > SECONDS:
        return f"took {answer['megabytes']:.0f} MB and {answer['seconds']:.1f} s"
    if answer.get("imported"):
        return f"imported {answer['imported']}"
    if answer["outcome"] == "equal":
        return None
    if answer["outcome"] != "error":
        return "is neither equal nor an error"
    if not answer["ours"] or answer["type"] not in ("ValueError", "OSError"):
        return "is no error of ours"
    if not NAMED.search(answer["message"]) or not all(line.isprintable() for line in answer["message"].split("\n")):
        return "does not say what is wrong"
    return None


def load_changed(server, examples, tmp_path, folders=changed_folders, adapters=None):
    """Loads `examples` changed `folders`; returns what came of them, (change, outcome) -> number."""
    counts, numbers = Counter(), iter(range(10**9))

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def load_one(data):
        adapter = any_of(data.draw, adapters or sorted(ADAPTERS))
        done, files = data.draw(folders(server.folders[adapter]))
        by_name = "name_base" in done or data.draw(st.integers(0, 3)) == 0
        folder = tmp_path / str(next(numbers))
        write_out(files, folder)
        answer = server.load(adapter, folder, by_name, reader="change_reader" in done)
        wrong = complaint(answer, server, folder, by_name)
        assert wrong is None, f"{done} of {adapter} (by_name={by_name}) in {folder} {wrong}: {answer}"
        counts.update((change, answer["outcome"]) for change in done)
        counts["examples"] += 1
        shutil.rmtree(folder)

    load_one()
    return counts


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_changed_folder_loads_bit_equal_or_gives_one_clear_error(server, examples, tmp_path):
    counts = load_changed(server, examples, tmp_path)
    assert counts["examples"] >= examples
    drawn = {change: counts[change, "error"] + counts[change, "equal"] for change in CHANGES}
    often = [change for change, number in drawn.items() if number >= examples / 100]
    assert len(often) >= len(CHANGES) * (1 if examples >= 2000 else 0.75), drawn  # what few examples are is chance
    assert min(sum(n for key, n in counts.items() if outcome in key) for outcome in ("error", "equal")) > examples / 20


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_other_values_load_as_they_are_and_a_damaged_processor_gives_one_clear_error(server, examples, tmp_path):
    """What no checksum tells of: NaN, infinity and others, every checksum right; the files beside the adapter."""
    counts = load_changed(server, examples, tmp_path, partial(changed_by, change_values))
    assert counts["change_values", "equal"] == examples, counts
    counts = load_changed(server, examples, tmp_path, partial(changed_by, change_reader), ["eyes"])
    assert min(counts["change_reader", outcome] for outcome in ("error", "equal")) >= examples / 10, counts


# ---------------------------------------------------------------- one by one: what is said


def set_config(folder, **entries):
    """Other entries in the config of the header, whose own checksum is made right again."""
    header, data = unpacked((folder / FILE).read_bytes())
    metadata = header["__metadata__"]
    del metadata["header_checksum"]
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | entries)
    metadata["header_checksum"] = adapter_file_moextend.header_checksum(metadata)
    (folder / FILE).write_bytes(packed(header, data))


def link_out(folder):
    shutil.move(folder / FILE, folder.parent / "elsewhere.safetensors")
    (folder / FILE).symlink_to("../elsewhere.safetensors")


def pipe(folder):
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def twice(folder):
    header, data = unpacked((folder / FILE).read_bytes())
    metadata = header["__metadata__"]
    del metadata["header_checksum"]
    metadata["config"] = metadata["config"].replace('"scope":', '"scope": "gate", "scope":')
    (folder / FILE).write_bytes(packed(header, data))


def other_dtype(folder):
    tensors = load_file(folder / FILE)
    tensors["layers.1.router.weight"] = tensors["layers.1.router.weight"].to(torch.int32)
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / FILE, metadata)


REFUSED = {
    "link": (link_out, f"{FILE} is a link to .*elsewhere.safetensors, outside the adapter's folder: put a copy"),
    "pipe": (pipe, "holds no MoExtend adapter"),
    "key twice": (twice, r"the config in its header can't be read: .*given twice: \['scope'\]"),
    "dtype": (other_dtype, "wrong dtype: layers.1.router.weight is 'I32'; allowed: F64, F32, BF16, F16"),
    "experts": (
        lambda folder: set_config(folder, extended_layers={"1": [0] * 10**5}),
        "extended_layers names 100000 experts, and there are tensors of 3",
    ),
    "width": (lambda folder: set_config(folder, calibration_hidden_size=10**12), "an integer from 1 to 4096"),
    "method": (lambda folder: set_config(folder, to_dict=1), "'to_dict' can't be an entry"),
    "own base": (
        lambda folder: set_config(folder, base_model_name_or_path=str(folder)),
        "can't be loaded: pass base=.*is extended already: it is an adapter",
    ),
    "no base": (
        lambda folder: set_config(folder, base_model_name_or_path="../secret"),
        "The adapter's base '../secret' can't be loaded: pass base=",
    ),
    "base with code": (
        lambda folder: set_config(folder, base_model_name_or_path="coded"),
        "The adapter's base 'coded' can't be loaded: pass base=.*trust_remote_code",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(server, name, tmp_path):
    change, message = REFUSED[name]
    write_out(server.folders["paper"], tmp_path / "adapter")
    change(tmp_path / "adapter")
    answer = server.load("paper", tmp_path / "adapter", by_name="base" in name)
    assert complaint(answer, server, tmp_path / "adapter", by_name="base" in name) is None, answer
    assert re.search(message, answer["message"], re.DOTALL), answer


def test_links_inside_the_folder_and_in_a_hub_cache_are_followed(server, tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "0123"
    write_out(server.folders["paper"], folder)
    for place in (folder / "real", tmp_path / "blobs" / "abcd"):
        shutil.move(folder / FILE, place)
        (folder / FILE).symlink_to(os.path.relpath(place, folder))
        assert server.load("paper", folder)["outcome"] == "equal"
        (folder / FILE).unlink()
        shutil.move(place, folder / FILE)


def test_a_file_says_nothing_about_implementations(server, tmp_path):
    """The name of an attention implementation may be a repository, whose code transformers would fetch and run."""
    write_out(server.folders["paper"], tmp_path / "adapter")
    set_config(tmp_path / "adapter", attn_implementation="kernels-community/x", experts_implementation="someone/x")
    assert server.load("paper", tmp_path / "adapter")["outcome"] == "equal"
    values = json.loads((tmp_path / "adapter" / "config.json").read_text())
    values |= {"attn_implementation": "kernels-community/x", "_attn_implementation_internal": "kernels-community/x"}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(values))
    for asked in (None, "eager"):
        options = {} if asked is None else {"attn_implementation": asked}
        assert AutoConfig.from_pretrained(tmp_path / "adapter", **options)._attn_implementation == asked


CONSENT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM
sys.modules["modeling_moextend"] = None  # installed or not, importing the package fails here
for folder in sys.argv[1:]:
    for auto in (AutoConfig, AutoModelForCausalLM):
        for options in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **options)
                print("loaded", file=sys.stderr)
            except Exception as error:
                print("refused" if "trust_remote_code" in str(error) else repr(error), file=sys.stderr)
"""


@pytest.mark.slow
def test_no_code_of_a_folder_runs_without_consent(server, tmp_path):
    """Where only transformers is there, in a process of its own: code replaced, and named elsewhere."""
    code = b"import pathlib, os\npathlib.Path(os.environ['CANARY']).touch()\n"
    classes = ["modeling_moextend.MoExtendForCausalLM", "custom.Custom", "someone/else--custom.Custom"]
    for number, name in enumerate(classes):
        files = {name: code if name.endswith(".py") else raw for name, raw in server.folders["paper"].items()}
        config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": name, "AutoModelForCausalLM": name}}
        files |= {"config.json": json.dumps(config).encode(), "custom.py": code, "__init__.py": code}
        write_out(files, tmp_path / str(number))
    command = [sys.executable, "-c", CONSENT, *(str(tmp_path / str(number)) for number in range(len(classes)))]
    environment = os.environ | {"CANARY": str(server.canary), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stderr.split()[-4 * len(classes) :] == ["refused"] * 4 * len(classes), done.stderr[-2000:]
    assert "loaded" not in done.stderr
    assert not server.canary.exists()


# ---------------------------------------------------------------- saves that go wrong


@pytest.fixture(scope="module")
def pair():
    """Two adapters of one base, of different plans: whatever a folder holds is one of them, or a mixture."""
    models = []
    for seed, plan in enumerate(({1: [0], 3: [2, 5]}, {0: [1], 3: [2, 5]})):
        torch.manual_seed(seed)
        models.append(shake(MoExtendForCausalLM.from_base(make_base(), plan, **PAPER), seed=seed).eval())
    return models


def which(folder, pair):
    """0 or 1: the adapter of `pair` that is in `folder`, down to the logits; anything else fails."""
    loaded = MoExtendForCausalLM.from_pretrained(folder, base=make_base())
    plans = [model.config.extended_layers for model in pair]
    assert loaded.config.extended_layers in plans
    found = plans.index(loaded.config.extended_layers)
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, pair[found](**batch()).logits)
    return found


def in_fork(work):
    """The process id of a fork that runs `work()` and ends; its exit code is 1 where that fails."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(pair, kills, tmp_path):
    chance, within, killed, results = random.Random(kills), 0.1, 0, Counter()
    for _ in range(10 * kills):
        if killed == kills:
            break
        folder = tmp_path / str(killed)
        sizes = [chance.choice(["20KB", "50GB"]) for _ in pair]
        pair[0].save_pretrained(folder, max_shard_size=sizes[0])
        child = in_fork(lambda folder=folder, size=sizes[1]: pair[1].save_pretrained(folder, max_shard_size=size))
        time.sleep(chance.uniform(0, within))
        os.kill(child, signal.SIGKILL)
        in_time = exit_code(child) == -signal.SIGKILL
        within *= 1.2 if in_time else 0.8  # seconds that a save takes: others use the machine as well
        killed += in_time
        results[which(folder, pair)] += 1
        pair[1].save_pretrained(folder, max_shard_size=sizes[1])
        assert which(folder, pair) == 1 and not unfinished(folder)
        shutil.rmtree(folder)
    assert killed == kills and results[0], (killed, results)


def unfinished(folder):
    """Names of files that no load would read and no save should leave."""
    indexed = set()
    if (folder / INDEX).exists():
        indexed = {INDEX, *json.loads((folder / INDEX).read_text())["weight_map"].values()}
    adapter = {path.name for path in folder.glob("moextend_adapter*")}
    return {path.name for path in folder.glob("*.tmp")} | (adapter - (indexed or {FILE}))


def fails_clearly(folder, model, size, reason):
    """Saving fails with our own words; the folder has the files that it had, byte for byte."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match=f"The adapter can't be saved to .*{reason}.*What was there before is untouched"):
        model.save_pretrained(folder, max_shard_size=size)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", ["20KB", "50GB"])
@pytest.mark.parametrize("most", [0, 1000, 20000])
def test_a_file_that_may_not_grow_leaves_the_old_adapter(pair, size, most, tmp_path):
    """A disk's quota, as it looks to a process: no file may get larger than `most` bytes."""
    pair[0].save_pretrained(tmp_path)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        fails_clearly(tmp_path, pair[1], size, "File too large|large")

    assert exit_code(in_fork(save)) == 0
    assert which(tmp_path, pair) == 0
    pair[1].save_pretrained(tmp_path, max_shard_size=size)
    assert which(tmp_path, pair) == 1


def mount_small_disk(folder, size):
    """A file system of `size` bytes in memory, seen by this process alone and gone with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = 0x00020000 | (0x10000000 if os.geteuid() else 0)  # of mounts; as another user, of users too
    calls = [
        libc.unshare(namespace),
        libc.mount(None, b"/", None, 1 << 14 | 1 << 18, None),  # recursive, private
        libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()),
    ]
    assert calls == [0, 0, 0], os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("size", ["20KB", "50GB"])
def test_a_full_disk_leaves_the_old_adapter(pair, size, tmp_path):
    pair[0].save_pretrained(tmp_path / "old")
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "old").iterdir())
    (tmp_path / "disk").mkdir()

    def save():
        mount_small_disk(tmp_path / "disk", 3 * used)
        folder, ballast = tmp_path / "disk" / "adapter", tmp_path / "disk" / "ballast"
        shutil.copytree(tmp_path / "old", folder)
        for left in (0, 4096, used // 4, used // 2, used - 8192):
            free = os.statvfs(folder).f_bavail * 4096
            ballast.write_bytes(bytes(free - left))
            fails_clearly(folder, pair[1], size, "No space left on device")
            assert which(folder, pair) == 0
            ballast.unlink()
        pair[1].save_pretrained(folder, max_shard_size=size)
        assert which(folder, pair) == 1 and not unfinished(folder)

    assert exit_code(in_fork(save)) == 0


@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_two_processes_saving_to_one_folder_never_mix(pair, rounds, tmp_path):
    """Each saves several times, in one file or in shards; a third reads all the while."""

    def save(model, seed):
        chance = random.Random(seed)
        for _ in range(3):
            model.save_pretrained(tmp_path, max_shard_size=chance.choice(["20KB", "50GB"]))

    pair[0].save_pretrained(tmp_path)
    results = Counter()
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)  # who starts last ends last on some machines, always
        savers = [in_fork(partial(save, pair[place], f"{number} {place}")) for place in order]
        while savers:
            which(tmp_path, pair)
            savers = [child for child in savers if not ended(child)]
        last = which(tmp_path, pair)
        results[last] += 1
        assert not unfinished(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["extended_layers"]
        assert saved == pair[last].config.to_dict()["extended_layers"]
    assert rounds < 10 or len(results) == 2, results


def ended(child):
    """Whether a fork has ended; it must not have failed."""
    done, status = os.waitpid(child, os.WNOHANG)
    assert not done or os.waitstatus_to_exitcode(status) == 0
    return bool(done)
