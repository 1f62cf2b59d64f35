"""A process that has imported everything and loads adapters in forked children: one request a line, one answer a line.

`python loading_server.py <root>` saves a base, an encoder and `ADAPTERS` under <root>, then answers requests

    {"folder": ..., "adapter": a name in ADAPTERS, "by_name": base and encoder from where the config says,
     "reader": whether its processor is loaded too}

with {"outcome": "equal", "different", "error", "hung" or "died", and what else a test wants to know}.
"""

import contextlib
import copy
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.modeling_utils
from conftest import PAPER, batch, make_base, make_encoder, shake
from test_processing_moextend import build_processor
from transformers.activations import ACT2FN

import modeling_moextend
from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor, adapter_file_moextend

PLAN = {1: [0], 3: [2, 5]}
ADAPTERS = {  # name -> (has an encoder, choices, max_shard_size)
    "paper": (False, PAPER, "50GB"),
    "gate": (False, {"gate_threshold": -1e9}, "20KB"),  # lets every token through
    "eyes": (True, {"scope": "modality", "selection": "compete", "calibration": "routed"}, "50GB"),
}
SECONDS = 5  # that a load may take, not counting what it waited for a processor that others had
PATIENCE = 60  # seconds until a load that does not end is killed
MEGABYTES = 256  # a load may take beside what the process had before; the largest adapter here has 0.1
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
MEANING = {  # entries that mean something without a tensor -> what a config without them means
    "scope": "all",
    "selection": "compete",
    "calibration": "all",
    "gate_threshold": 0.0,
    "encoder_select_layer": -2,
    "encoder_select_feature": "patch",
    "image_token_id": None,
}
seen = {"opened": [], "forbidden": [], "watching": False}


def record(path):
    if seen["watching"] and isinstance(path, (str, bytes, os.PathLike)):
        seen["opened"].append(os.path.realpath(os.fsdecode(path)))


def watch(event, args):
    """The audit hook of a child; audit hooks can't be taken off again."""
    if event == "open":
        record(args[0])
    elif seen["watching"] and event in FORBIDDEN:
        seen["forbidden"].append(event)


def recording(safe_open):
    """safetensors opens files without telling Python."""

    def opening(path, *args, **kwargs):
        record(path)
        return safe_open(path, *args, **kwargs)

    return opening


def inputs(with_images):
    given = batch()
    if with_images:
        given["input_ids"][0, 2:6] = 96
        given["pixel_values"] = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return given


def logits(model, with_images):
    """Logits, or what the model says instead (with another image token, say)."""
    try:
        with torch.no_grad():
            return model(**inputs(with_images), return_dict=True).logits
    except ValueError as error:
        return str(error)


def prepare(root):
    """Saves base, encoder and adapters; returns what loads need in memory."""
    make_base().save_pretrained(root / "base")
    make_encoder().save_pretrained(root / "encoder")
    ready = {"base": make_base(), "encoder": make_encoder(), "models": {}}
    for name, (has_encoder, choices, size) in ADAPTERS.items():
        torch.manual_seed(0)
        encoder = str(root / "encoder") if has_encoder else None
        model = shake(MoExtendForCausalLM.from_base(str(root / "base"), PLAN, encoder=encoder, **choices)).eval()
        model.save_pretrained(root / name, max_shard_size=size)
        if has_encoder:
            (root / name / "README.md").write_text("# An adapter")
            build_processor().save_pretrained(root / name)
            MoExtendProcessor.from_pretrained(root / name)
        ready["models"][name] = model
        for by_name in (True, False):  # warms up
            warm = dict(ready, base=copy.deepcopy(ready["base"]), encoder=copy.deepcopy(ready["encoder"]))
            loaded = load(root / name, name, by_name, warm)
            assert torch.equal(logits(loaded, has_encoder), logits(model, has_encoder))
            loaded.config.to_dict()
    with contextlib.suppress(OSError, ValueError):
        MoExtendForCausalLM.from_pretrained(root / "gate", base="someone/else")  # what comes with a failing download
    return ready


def load(folder, name, by_name, ready):
    if by_name:
        return MoExtendForCausalLM.from_pretrained(folder)
    encoder = ready["encoder"] if ADAPTERS[name][0] else None
    return MoExtendForCausalLM.from_pretrained(folder, base=ready["base"], encoder=encoder)


def meant(model, stored):
    """`model`, with the tensors that a file holds, and those entries that its config may change without a tensor."""
    values = json.loads(stored.metadata["config"])
    for name, tensor in model.adapter_tensors().items():
        tensor.data.copy_(stored.tensors[name])
    for entry, default in MEANING.items():
        setattr(model.config, entry, values.get(entry, default))
    if model.projector is not None:
        model.projector.act = ACT2FN[values.get("projector_hidden_act", "gelu")]
    return model


def attempt(request, ready):
    """One load, in a child: its answer."""
    name, folder, modules = request["adapter"], request["folder"], set(sys.modules)
    has_encoder = ADAPTERS[name][0]
    sys.addaudithook(watch)
    begun, before, seen["watching"] = own_seconds(), own_megabytes(), True
    try:
        loaded, error = load(folder, name, request["by_name"], ready), None
        if request["reader"]:
            MoExtendProcessor.from_pretrained(folder)
    except BaseException as caught:
        loaded, error = None, caught
    seen["watching"] = False
    answer = {"seconds": own_seconds() - begun, "opened": seen["opened"], "forbidden": seen["forbidden"]}
    answer["imported"] = sorted(set(sys.modules) - modules)
    answer["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if error is not None:
        return answer | described(error)
    json.dumps(loaded.config.to_dict())  # can be saved again
    stored = adapter_file_moextend.read_adapter(folder)
    found, expected = logits(loaded, has_encoder), logits(meant(ready["models"][name], stored), has_encoder)
    if not isinstance(expected, str):
        found, expected = (torch.nan_to_num(one, nan=1e9).tolist() for one in (found, expected))
    equal = found == expected
    return answer | {"outcome": "equal" if equal else "different"}


def described(error):
    """What a test wants to know of an error: whether the line that raised it is ours, and what it says."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename)
    return {
        "outcome": "error",
        "type": type(error).__name__,
        "message": str(error),
        "ours": Path(modeling_moextend.__file__).parent in raised_in.parents,
        "line": f"{raised_in.name}:{trace.tb_lineno}",
    }


def limit_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 4 * MEGABYTES * 2**20  # of addresses, files mapped included
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def in_child(request, ready):
    """The answer of a forked child, which is killed after `PATIENCE`."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(receiver)
            limit_memory()
            answer = attempt(request, ready)
        except BaseException as error:
            answer = {"outcome": "died", "message": f"{type(error).__name__}: {error}"}
        with os.fdopen(sender, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(sender)
    text, end = b"", time.monotonic() + PATIENCE
    with os.fdopen(receiver, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0, end - time.monotonic()))[0] and (part := pipe.read(2**20)):
            text += part
    if not text:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"outcome": "hung" if os.WIFSIGNALED(status) else "died"}


def own_seconds():
    """The clock, without the time that this process was ready to run and others ran."""
    waited = int(Path("/proc/self/schedstat").read_text().split()[1])
    return time.monotonic() - waited / 1e9


def own_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def serve(root):
    transformers.modeling_utils.safe_open = recording(transformers.modeling_utils.safe_open)
    ready = prepare(root)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    requests = os.fdopen(os.dup(0), "r")
    for descriptor in (0, 1):  # children find nobody to ask for consent, and print nowhere
        os.dup2(nothing, descriptor)
    print("ready", file=answers)
    for line in requests:
        print(json.dumps(in_child(json.loads(line), ready)), file=answers)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
