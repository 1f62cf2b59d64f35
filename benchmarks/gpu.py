"""What only a GPU can tell: bit-equality there, CUDA graphs, waits, speed and memory at a real size. One command.

    python benchmarks/gpu.py                          # about 8 minutes on one GPU with 40 GB: results/gpu.json
    python benchmarks/gpu.py --parts guarantees use   # some of it
    python benchmarks/gpu.py --tiny --output my.json  # the same code with small models, on a CPU too
    python benchmarks/gpu.py --collect wheels         # for a machine without a network: all it needs but torch
    pip install --no-index --no-deps wheels/*.whl     # ... and how it gets there

Random bases in bfloat16: S as Mixtral (8 experts, 2 selected), F as Qwen3-MoE (128 experts, 8 selected), 8 GB each.

    guarantees  bit for bit: base tensors after training (1), adapter off and a closed gate (2), an unused adapter (3),
                save and load (4), a run that was stopped (8); in float32 and bfloat16, with every implementation of
                experts and attention
    use         prompt and decoding in tokens a second: base, adapter, inference form, native model of as many experts,
                and compiled with CUDA graphs and a static cache; how often a step waits for the GPU
    train       tokens a second, peak memory, share of the GPU's operations (`--peak-tflops`): new experts with and
                without a gate, LoRA, full fine-tuning
    quantised   new experts in float32 over a 4-bit base (bitsandbytes): a step, and bit-equality with the adapter off
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import requires, version
from pathlib import Path
from statistics import median
from typing import Any

import speed
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn
from transformers import PreTrainedModel, StaticCache

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.tools.hashes import base_tensors_hash
from modeling_moextend.training.planning import plan_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
SIZES = {"S": {"layers": 20, "hidden": 2048}, "F": {"layers": 20, "hidden": 1024, "num_experts": 128}}
TINY = {"S": {"layers": 2, "hidden": 64}, "F": {"layers": 2, "hidden": 64, "num_experts": 16}}
PACKAGES = ("transformers", "accelerate", "peft")
Measures = dict[str, Any]


def make_base(size: str, tiny: bool, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with torch.device(DEVICE):
        return speed.make_base(size, **(TINY if tiny else SIZES)[size], dtype=dtype)


def ids_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, speed.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------- guarantees


def guarantees(args: argparse.Namespace) -> Measures:
    """{size, dtype, implementations: {guarantee: whether it held, or why it could not be asked}}"""
    found: Measures = {}
    kinds = [(one, "sdpa") for one in IMPLEMENTATIONS] + [("grouped_mm", one) for one in ATTENTIONS if one != "sdpa"]
    for size in args.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for experts, attention in kinds:
                name = f"{size}, {str(dtype).removeprefix('torch.')}, {experts}, {attention}"
                base = make_base(size, True, dtype)
                try:
                    base.set_attn_implementation(attention)
                except (ImportError, ValueError) as error:
                    found[name] = {"left out": str(error).splitlines()[0]}
                    continue
                base.set_experts_implementation(experts)
                try:
                    found[name] = {guarantee: held(base) for guarantee, held in HELD.items()}
                except RuntimeError as error:  # a kernel that this GPU or dtype lacks
                    found[name] = {"left out": str(error).splitlines()[0]}
                print(f"  {name}: {found[name]}", flush=True)
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids_of(2, 24)).logits


def trained(
    model: MoExtendForCausalLM, steps: int, optimizer: torch.optim.Optimizer | None = None, first: int = 0
) -> torch.optim.Optimizer:
    """`steps` steps of AdamW: -> the optimizer."""
    parameters = list(model.set_trainable().values())
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(first, first + steps):
        ids = ids_of(2, 24, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def base_stays(base: PreTrainedModel) -> bool:
    model = speed.extended(base, speed.Adapter("all"))
    before = base_tensors_hash(model)
    trained(model, 3)
    return base_tensors_hash(model) == before


def off_is_the_base(base: PreTrainedModel) -> bool:
    model = speed.extended(base, speed.Adapter("all"))
    trained(model, 2)
    with model.disable_adapter():
        return torch.equal(logits(model), logits(base))


def closed_is_the_base(base: PreTrainedModel) -> bool:
    model = speed.extended(base, speed.Adapter("all", routing="closed"))
    plain = torch.equal(logits(model), logits(base))
    model.fuse()
    return plain and torch.equal(logits(model), logits(base))


def unused_is_not_there(base: PreTrainedModel) -> bool:
    """Beside an adapter whose gate is closed, another gives what it gives alone."""
    model = speed.extended(base, speed.Adapter("all"))
    trained(model, 2)
    alone = logits(model)
    model.add_adapter("closed", speed.plan_of(base, "all", 2), **speed.ROUTINGS["closed"])
    model.adapters["closed"].config.trained_on, model.adapters["closed"].depends_on = [], set()
    model.set_adapter(["default", "closed"], inference_mode=True)
    return torch.equal(logits(model), alone)


def loaded_is_saved(base: PreTrainedModel) -> bool:
    model = speed.extended(base, speed.Adapter("all"))
    trained(model, 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, adapter_dtype=torch.float32)  # in which new experts train, over bfloat16 too
        again = MoExtendForCausalLM.from_pretrained(folder, base=speed.shared_copy(base))
    return torch.equal(logits(model), logits(again))


def resumed_is_undisturbed(base: PreTrainedModel) -> bool:
    """Two steps, saved, loaded, and two more are four."""
    whole, half = (speed.extended(base, speed.Adapter("all")) for _ in range(2))
    trained(whole, 4)
    state = copy.deepcopy(trained(half, 2).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        half.save_pretrained(folder, adapter_dtype=torch.float32)
        again = MoExtendForCausalLM.from_pretrained(folder, base=speed.shared_copy(base))
    optimizer = torch.optim.AdamW(list(again.set_trainable().values()), lr=1e-2)
    optimizer.load_state_dict(state)
    trained(again, 2, optimizer, first=2)
    one, other = whole.adapter_tensors(), again.adapter_tensors()
    return all(torch.equal(tensor.float(), other[name].float()) for name, tensor in one.items())


HELD = {
    "1 base stays": base_stays,
    "2 adapter off": off_is_the_base,
    "2 closed gate": closed_is_the_base,
    "3 unused adapter": unused_is_not_there,
    "4 saved and loaded": loaded_is_saved,
    "8 stopped and resumed": resumed_is_undisturbed,
}


# ---------------------------------------------------------------- use


def use(args: argparse.Namespace) -> Measures:
    found: Measures = {}
    for size in args.sizes:
        forget()
        base, results = make_base(size, args.tiny), found.setdefault(size, {})
        off = speed.extended(base, speed.Adapter("all"))
        variants: dict[str, Callable[[], Any]] = {"base": lambda base=base: base, "adapter off": lambda off=off: off}
        for routing in ("exclusive", "compete", "closed", "open"):
            for form in ("", ", fused"):
                variants[f"{routing}{form}"] = lambda routing=routing, form=form, base=base: fused(base, routing, form)
        variants["native"] = lambda base=base: speed.native(base, speed.NEW)
        for name, make in variants.items():
            forget()
            model = make()
            with model.disable_adapter() if name == "adapter off" else contextlib.nullcontext():
                results[name] = answering(model, args) | {"waits": waits(model)}
            print(f"  {size}, {name}: {results[name]}", flush=True)
        for name, routing in (("base", None), ("exclusive, fused", "exclusive")):
            forget()
            model = base if routing is None else fused(base, routing, ", fused")
            results[f"{name}, compiled"] = compiled(model, args)
            print(f"  {size}, {name}, compiled: {results[f'{name}, compiled']}", flush=True)
        del base, off, variants, model
    return found


def fused(base: PreTrainedModel, routing: str, form: str) -> MoExtendForCausalLM:
    model = speed.extended(base, speed.Adapter("all", routing=routing))
    if form:
        model.fuse()
    return model


@torch.no_grad()
def answering(model: nn.Module, args: argparse.Namespace) -> Measures:
    """Tokens a second of a prompt and of decoding, medians of calls."""
    length, calls = (32, 4) if args.tiny else (2048, 24)
    prompt, seconds = ids_of(1, length), []
    for _ in range(4):
        start = now()
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        seconds.append(now() - start)
    found = {"prompt": length / median(seconds[1:])}
    for rows in (1, 8):
        cache, token, seconds = None, ids_of(rows, 16), []
        for _ in range(calls + 4):
            start = now()
            cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
            seconds.append(now() - start)
            token = ids_of(rows, 1)
        found[f"decode {rows}"] = rows / median(seconds[4:])
    return found


@torch.no_grad()
def waits(model: nn.Module) -> int | None:
    """How often a step of decoding waits for the GPU, by CUDA's own count; `None` on a CPU."""
    if DEVICE != "cuda":
        return None
    cache = model(input_ids=ids_of(1, 16), use_cache=True).past_key_values
    token = ids_of(1, 1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(input_ids=token, past_key_values=cache, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@torch.no_grad()
def compiled(model: PreTrainedModel, args: argparse.Namespace) -> Measures:
    """Decoding one row with a static cache, whole in one graph and by CUDA graphs; and how many of its tokens are
    those that it gives uncompiled (a compiled model rounds otherwise)."""
    steps = 8 if args.tiny else 32
    tokens, seconds = {}, []
    for way in ("plain", "compiled"):
        step = model.forward
        if way == "compiled":
            torch._dynamo.reset()
            step = torch.compile(step, fullgraph=True, mode="reduce-overhead" if DEVICE == "cuda" else "default")
        cache = StaticCache(config=model.config, max_cache_len=16 + steps)
        token = ids_of(1, 16)
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens[way] = [token]
        for place in range(16, 15 + steps):
            position = torch.full((1, 1), place, device=DEVICE)
            start = now()
            output = step(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)
            token = output.logits[:, -1:].argmax(-1).clone()
            if way == "compiled":
                seconds.append(now() - start)
            tokens[way].append(token)
    same = torch.cat(tokens["plain"]) == torch.cat(tokens["compiled"])
    return {"decode 1": 1 / median(seconds[steps // 2 :]), "share of the same tokens": same.float().mean().item()}


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace) -> Measures:
    found: Measures = {}
    rows, length = (2, 32) if args.tiny else (2, 2048)
    for size in args.sizes:
        results, ids = found.setdefault(size, {}), ids_of(rows, length)
        flops = flops_of(size, args, length, rows)
        for name, make in TRAINED.items():
            forget()
            base = make_base(size, args.tiny)
            before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
            try:
                model, parameters = make(base)
                steps = [one_step(model, parameters, ids) for _ in range(5)]
            except torch.OutOfMemoryError as error:
                results[name] = {"left out": str(error).splitlines()[0]}
                continue
            finally:
                model = parameters = None
            seconds = median(steps[2:])
            results[name] = {"tokens a second": rows * length / seconds, "step": seconds}
            if DEVICE == "cuda":
                results[name]["peak beyond the base, GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            method = name.partition(",")[0]
            if method in flops:
                results[name]["share of peak"] = flops[method] / seconds / (args.peak_tflops * 1e12)
            print(f"  {size}, {name}: {results[name]}", flush=True)
            del base
    return found


def flops_of(size: str, args: argparse.Namespace, length: int, rows: int) -> dict[str, float]:
    """Operations of a step, as `moextend plan` counts them."""
    with torch.device("meta"):
        base = speed.make_base(size, **(TINY if args.tiny else SIZES)[size], dtype=torch.bfloat16)
    plan = plan_training(
        base, new_experts=speed.NEW, scope="all", sequence=length, batch=rows, checkpointing=False
    )  # the upper half
    return {name: method["flops"] for name, method in plan["methods"].items()}


def one_step(model: nn.Module, parameters: list[nn.Parameter], ids: torch.Tensor) -> float:
    model.train()
    start = now()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=DEVICE == "cuda")
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return now() - start


def new_experts(routing: str) -> Callable[[PreTrainedModel], tuple[nn.Module, list[nn.Parameter]]]:
    def make(base):
        model = speed.extended(base, speed.Adapter("upper", routing=routing))
        parameters = list(model.set_trainable().values())
        for parameter in parameters:  # as the trainer keeps them
            parameter.data = parameter.data.float()
        return model, parameters

    return make


def lora(base: PreTrainedModel) -> tuple[nn.Module, list[nn.Parameter]]:
    model = speed.with_lora(base)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def full(base: PreTrainedModel) -> tuple[nn.Module, list[nn.Parameter]]:
    return base.requires_grad_(True), list(base.parameters())


TRAINED = {
    "MoExtend, exclusive": new_experts("exclusive"),
    "MoExtend, compete": new_experts("compete"),
    "MoExtend, gate open, deltas": new_experts("open"),
    "MoExtend, gate closed": new_experts("closed"),
    "LoRA, attention and experts": lora,
    "full fine-tuning, in bfloat16": full,
}


# ---------------------------------------------------------------- 4-bit


def quantised(args: argparse.Namespace) -> Measures:
    try:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        version("bitsandbytes")
    except Exception as error:
        return {"left out": repr(error)}
    with tempfile.TemporaryDirectory() as folder:
        make_base("S", True).save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        try:
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=DEVICE)
            before = logits(base)
            model = MoExtendForCausalLM.from_base(base, {1: [0, 1]}, **speed.ROUTINGS["exclusive"])
            trained(model, 2)
            with model.disable_adapter():
                return {"trains": True, "adapter off is the base": torch.equal(logits(model), before)}
        except (ValueError, RuntimeError, ImportError) as error:
            return {"refused": str(error).splitlines()[0]}


# ---------------------------------------------------------------- the command


def collect(folder: Path) -> None:
    """Wheels of what this needs beside torch, for Linux and Python 3.12, in the versions that are installed here."""
    there = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "extra": ""}
    wanted, seen = list(PACKAGES), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name == "torch" or name in seen:
            continue
        seen.add(name)
        needs = map(Requirement, requires(name) or ())
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate(there)]
    pins = [f"{name}=={version(name)}" for name in sorted(seen)]
    target = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, *target, *pins], check=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(pins)} packages, {size / 2**20:.0f} MiB: there, pip install --no-index --no-deps {folder}/*.whl")


PARTS = {"guarantees": guarantees, "use": use, "train": train, "quantised": quantised}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tiny", action="store_true", help="small models: does everything run? No speed")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bfloat16; default: an H100's")
    parser.add_argument("--output", type=Path, default=speed.RESULTS / "gpu.json")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only download wheels to FOLDER")
    args = parser.parse_args(arguments)
    if not args.collect and not args.tiny and DEVICE == "cpu":
        parser.error("there is no GPU here: try the script with --tiny --output <file>, or --collect what it needs")
    return args


def main() -> None:
    args = parse()
    if args.collect:
        collect(args.collect)
        return
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", *PACKAGES)}
    results = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    results |= {"device": card, "versions": packages, "tiny": args.tiny}
    for part in args.parts:
        print(part, flush=True)
        start = now()
        with deterministic() if part == "guarantees" else contextlib.nullcontext():
            results["parts"][part] = PARTS[part](args)
        results["parts"][part]["seconds"] = round(now() - start, 1)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
