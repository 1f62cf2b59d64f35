"""How fast, and how large: ratios to the floor, to the base, to a native model with as many experts, and to LoRA.

    python benchmarks/speed.py                        # everything: an hour on one core; tables and a picture
    python benchmarks/speed.py --quick                # one size, fewer variants and rounds: 10 minutes
    python benchmarks/speed.py --parts infer --sizes F --threads 2

Random bases of two shapes: S as Mixtral (8 experts, 2 selected), F as Qwen3-MoE (64 experts, 8 selected), 8 layers of
hidden size 512, float32. All variants of a part share the base's memory, take turns round by round, and are compared
by the median over rounds of ratios within a round, in CPU seconds of this process. Memory and loading are measured in
processes of their own.

    train    a step of AdamW (rate 0, so that routing stays). Floor: the frozen base forward, backward down to the
             lowest extended layer's MoE output, the weight gradients of the pairs that new experts got, the optimiser.
    memory   peak beyond the loaded base, of two such steps
    infer    prefill 1 x 512, decoding one token for 1 and for 8 rows
    host     decoding with a base too small to compute: what is left is the host's work
    epochs   two epochs of the trainer, hidden states below the new experts kept (`prefix_cache`), beside two without
    half     a step over a bfloat16 base of 4 layers: new experts kept in float32, beside new experts kept in bfloat16
    load     from_pretrained of the base, and of an adapter on it: time and peak
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
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from modeling_moextend import MoExtendForCausalLM, MoExtendSFTConfig, MoExtendSFTTrainer
from modeling_moextend.evaluation.figures import COLOURS, MARKERS, WIDTH, new_figure, save, styled
from modeling_moextend.training.retention_text import LENGTH, LIKELIEST, PIECES_A_STEP, RetentionText, text_distance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
START, END = "<!-- python benchmarks/speed.py -->", "<!-- end -->"  # around the tables of docs/speed.md
PARTS = ("train", "memory", "epochs", "infer", "host", "half", "load")
LAYERS, VOCAB, NEW = 8, 4096, 4
clock = time.process_time
Times = dict[str, float]


class Adapter(NamedTuple):
    """New experts in some layers, with a routing."""

    where: str = "upper"
    new: int = NEW
    routing: str = "exclusive"
    rank: int | None = None


ROUTINGS = {
    "paper": {"paper": True},
    "compete": {"scope": "all", "selection": "compete", "calibration": "none"},
    "exclusive": {"scope": "all", "selection": "exclusive", "calibration": "none"},
    "closed": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": 1e9},
    "open": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": -1e9},
    "open, no deltas": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": -1e9}
    | {"deltas": ()},
}
SIZES = ("S: 8 experts", "F: 64 experts")
FULL, LORA, ROUTERS, TRAINER = "full fine-tuning", "LoRA, attention and experts", "routers only", "trainer, gate open"
PANELS = (  # of the picture: part, compared with, what of it, label, ticks
    ("train", FULL, "step", f"time of a training step / that of {FULL}", (0.35, 0.5, 0.7, 1, 1.4)),
    ("infer", "base", "decode 1", "time to decode one row / the base's", (0.7, 1, 2, 5, 10, 20, 50)),
)
TRAINED = {
    "upper, n = 1, paper": Adapter(new=1, routing="paper"),
    "upper, n = 4": Adapter(),
    "upper, n = 4, compete": Adapter(routing="compete"),
    "upper, n = 4, rank 32": Adapter(rank=32),
    "upper, n = 4, gate closed": Adapter(routing="closed"),
    "lower, n = 4": Adapter(where="lower"),
    "alternating, n = 4": Adapter(where="alternating"),
    "all, n = 4": Adapter(where="all"),
}
REMEMBERED = ("upper, n = 4", "upper, n = 4, rank 32", "all, n = 4")


# ---------------------------------------------------------------- models


def config_of(
    size: str, layers: int = LAYERS, hidden: int = 512, num_experts: int = 64
) -> MixtralConfig | Qwen3MoeConfig:
    heads = max(2, hidden // 64)
    shared = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": VOCAB, "num_attention_heads": heads}
    shared |= {"num_key_value_heads": heads // 2, "intermediate_size": 2 * hidden, "max_position_embeddings": 8192}
    if size == "S":
        return MixtralConfig(**shared, num_local_experts=8, num_experts_per_tok=2)
    own = {"moe_intermediate_size": hidden // 2, "num_experts": num_experts, "num_experts_per_tok": 8}
    own |= {"norm_topk_prob": True}
    return Qwen3MoeConfig(**shared, **own, head_dim=hidden // heads)


def make_base(
    size: str, layers: int = LAYERS, hidden: int = 512, dtype: torch.dtype = torch.float32, **shape: int
) -> PreTrainedModel:
    """A random base whose routers decide, in `dtype`, on torch's default device."""
    torch.manual_seed(0)
    config = config_of(size, layers, hidden, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False).eval()


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own over the memory of `base`."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()})


def plan_of(base: PreTrainedModel, where: str, new: int) -> dict[int, list[int]]:
    layers = base.config.num_hidden_layers
    chosen = {"upper": range(layers // 2, layers), "lower": range(layers // 2), "alternating": range(1, layers, 2)}
    chosen["upper quarter"] = range(layers - layers // 4, layers)
    num_experts = base.model.layers[0].mlp.experts.num_experts
    return {layer: [(7 * n + 1) % num_experts for n in range(new)] for layer in chosen.get(where, range(layers))}


def extended(base: PreTrainedModel, adapter: Adapter) -> MoExtendForCausalLM:
    options = ROUTINGS[adapter.routing] | ({"expert_rank": adapter.rank} if adapter.rank else {})
    plan = plan_of(base, adapter.where, adapter.new)
    return MoExtendForCausalLM.from_base(shared_copy(base), plan, **options).eval()


def native(base: PreTrainedModel, new: int) -> PreTrainedModel:
    """The base's own architecture with E + n experts in every layer."""
    model = shared_copy(base)
    for layer, sources in plan_of(base, "all", new).items():
        block = model.model.layers[layer].mlp
        for name, parameter in list(block.experts.named_parameters()):
            stack = torch.cat([parameter, parameter[sources]])
            setattr(block.experts, name, nn.Parameter(stack, requires_grad=False))
        rows = torch.cat([block.gate.weight, block.gate.weight[sources]])
        block.gate.weight = nn.Parameter(rows, requires_grad=False)
        block.experts.num_experts = block.gate.num_experts = len(rows)
    return model


def with_lora(base: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    modules, stacks = ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(shared_copy(base), LoraConfig(r=16, target_modules=modules, target_parameters=stacks))


def three_adapters(base: PreTrainedModel) -> MoExtendForCausalLM:
    """Three adapters of their own that share every token."""
    model = extended(base, Adapter("all", routing="compete"))
    for name in ("b", "c"):
        model.add_adapter(name, plan_of(base, "all", NEW), **ROUTINGS["compete"])
        model.adapters[name].config.trained_on, model.adapters[name].depends_on = [], set()
    model.set_adapter(["default", "b", "c"], inference_mode=True)
    return model.eval()


# ---------------------------------------------------------------- measuring


def interleaved(variants: dict[str, Callable[[], Times]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{variant: {measure: [CPU seconds a round]}}, after a round that does not count."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for name, run in variants.items():
            times = run()
            if number:
                for measure, seconds in times.items():
                    found.setdefault(name, {}).setdefault(measure, []).append(seconds)
        print(f"  round {number} of {rounds}", flush=True)
    return found


def ratio(found: dict[str, dict[str, list[float]]], name: str, other: str, measure: str) -> tuple[float, float, float]:
    """(median, lowest, highest) over rounds of what `name` takes in relation to `other`."""
    pairs = zip(found[name][measure], found[other][measure], strict=True)
    ratios = sorted(one / reference for one, reference in pairs)
    return median(ratios), ratios[0], ratios[-1]


def stepper(model: nn.Module, trained: list[nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], Times]:
    """One training step; the optimiser is timed by its second step, when its states exist."""

    def run():
        model.train()
        start = clock()
        loss().backward()
        backward = clock() - start
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        optimizer.step()
        start = clock()
        optimizer.step()
        optimiser = clock() - start
        for parameter in trained:
            parameter.grad = None
        return {"step": backward + optimiser, "optimiser": optimiser}

    return run


# ---------------------------------------------------------------- parts


def train_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    base = make_base(size)
    ids = torch.randint(0, VOCAB, (4, 256), generator=torch.Generator().manual_seed(1))
    names = ("upper, n = 4", "upper, n = 4, rank 32") if args.quick else TRAINED
    variants, floors, gradients = {}, {}, {}
    for name in names:
        adapter = TRAINED[name]
        model = extended(base, adapter)
        trained = list(model.set_trainable().values())
        variants[name] = stepper(model, trained, plain_loss(model, ids))
        floors[name] = f"floor of {name}"
        pairs = routed_pairs(model, ids)
        variants[floors[name]] = floor_step(base, adapter, pairs, ids)
        gradients[name] = pairs
    model = extended(base, Adapter(routing="open"))
    variants[TRAINER] = stepper(model, list(model.set_trainable().values()), trainer_loss(model, ids))
    model = shared_copy(base).requires_grad_(True)
    variants[FULL] = stepper(model, list(model.parameters()), plain_loss(model, ids))
    model = shared_copy(base)
    routers = [p.requires_grad_(True) for name, p in model.named_parameters() if name.endswith("gate.weight")]
    variants[ROUTERS] = stepper(model, routers, plain_loss(model, ids))
    model = with_lora(base)
    variants[LORA] = stepper(model, [p for p in model.parameters() if p.requires_grad], plain_loss(model, ids))
    found = interleaved(variants, args.rounds)
    for name, floor in floors.items():  # its optimiser is that of the same tensors
        both = zip(found[floor]["step"], found[name]["optimiser"], strict=True)
        found[floor]["step"] = [rest + optimiser for rest, optimiser in both]
    return {"seconds": found, "floors": floors, "pairs": gradients}


def plain_loss(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def trainer_loss(model: MoExtendForCausalLM, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What `MoExtendSFTTrainer` adds up where deltas train: the task, the balance loss, and the retention loss on a
    piece of the base's own text beside every micro-batch."""
    shape = PIECES_A_STEP, LENGTH
    text, likely = torch.randint(0, VOCAB, shape), torch.randint(0, VOCAB, (*shape, LIKELIEST))
    known = torch.randn(*shape, LIKELIEST + 1).log_softmax(-1)
    retention = RetentionText(text, torch.ones_like(text), likely, known)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100

    def loss():
        with model.record_routing() as records:
            task = model(input_ids=ids, labels=labels, use_cache=False).loss
        return task + 0.001 * model.balance_loss(records) + text_distance(model, retention)

    return loss


@torch.no_grad()
def routed_pairs(model: MoExtendForCausalLM, ids: torch.Tensor) -> dict[int, int]:
    """Extended layer -> number of (token, slot) pairs that new experts got."""
    with model.record_routing() as records:
        model(input_ids=ids, use_cache=False)
    return {n: int((record.index >= record.num_base).sum()) for n, record in records.items() if record.num_new}


class Tap(nn.Module):
    """Adds a zero vector that asks for its gradient to an MoE block's output: there the backward pass ends."""

    def __init__(self, block: nn.Module, hidden_size: int):
        super().__init__()
        self.block, self.tap = block, nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block(hidden_states) + self.tap


def floor_step(
    base: PreTrainedModel, adapter: Adapter, pairs: dict[int, int], ids: torch.Tensor
) -> Callable[[], Times]:
    """The least that a step of an adapter can take, but for its optimiser."""
    model, plan = shared_copy(base), plan_of(base, adapter.where, adapter.new)
    if adapter.routing in ("exclusive", "open"):
        keep = min(base.config.num_experts_per_tok, adapter.new)
        for layer in plan:  # fewer slots are filled
            gate = model.model.layers[layer].mlp.gate
            gate.register_forward_hook(lambda _, args, output: (output[0], output[1][:, :keep], output[2][:, :keep]))
    lowest = model.model.layers[min(plan)]
    lowest.mlp = Tap(lowest.mlp, base.config.hidden_size)

    def run():
        start = clock()
        plain_loss(model, ids)().backward()
        lowest.mlp.tap.grad = None
        seconds = clock() - start
        return {
            "step": seconds + sum(weight_gradients(base, adapter.new, number) for number in pairs.values() if number)
        }

    return run


def weight_gradients(base: PreTrainedModel, new: int, pairs: int) -> float:
    """CPU seconds of one layer's weight gradients, its pairs spread evenly over the new experts."""
    experts = base.model.layers[0].mlp.experts
    rows, (_, wide, hidden), narrow = max(1, pairs // new), experts.gate_up_proj.shape, experts.down_proj.shape[2]
    products = [
        (torch.randn(wide, rows), torch.randn(rows, hidden)),
        (torch.randn(hidden, rows), torch.randn(rows, narrow)),
    ]
    outputs = [torch.empty(wide, hidden), torch.empty(hidden, narrow)]
    start = clock()
    for _ in range(new):
        for (left, right), output in zip(products, outputs, strict=True):
            torch.mm(left, right, out=output)
    return clock() - start


def memory_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    names = [FULL, LORA, *REMEMBERED[: 2 if args.quick else None]]
    return {name: in_own_process("memory", size, name)["peak"] for name in names}


def peak_of_training(size: str, name: str) -> dict[str, Any]:
    base, ids = make_base(size), torch.randint(0, VOCAB, (4, 256))
    gc.collect()
    with peak_memory() as found:
        if name == FULL:
            model = base.requires_grad_(True)
        else:
            model = with_lora(base) if name == LORA else extended(base, TRAINED[name])
        if isinstance(model, MoExtendForCausalLM):
            model.set_trainable()
        trained = [p for p in model.parameters() if p.requires_grad]
        step = stepper(model, trained, plain_loss(model, ids))
        for _ in range(2):
            step()
    return found


def epochs_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    base = make_base(size)
    ids = torch.randint(4, 60, (16, 256), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    variants = {
        f"{where}, {states}": epochs(extended(base, Adapter(where)), data, states == "kept")
        for where in ("upper", "upper quarter")
        for states in ("kept", "not")
    }
    return {"seconds": interleaved(variants, args.rounds)}


def epochs(model: MoExtendForCausalLM, data: Dataset, kept: bool) -> Callable[[], Times]:
    """Two epochs of four micro-batches, rate 0."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-moe")

    def run():
        with tempfile.TemporaryDirectory() as folder:
            settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "num_train_epochs": 2, "use_cpu": True}
            settings |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "bf16": False}
            settings |= {"disable_tqdm": True, "prefix_cache": f"{folder}/states" if kept else None}
            config = MoExtendSFTConfig(folder, **settings)
            watch = EpochClock()
            options = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [watch]}
            MoExtendSFTTrainer(model, config, **options).train()
        return dict(zip(("first", "second"), watch.seconds, strict=True))

    return run


class EpochClock(TrainerCallback):
    """CPU seconds an epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = clock()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(clock() - self.start)


def infer_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    base = make_base(size)
    return {"seconds": interleaved(used_variants(base, args.quick, prompts=True), args.rounds)}


def host_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    base = make_base(size, hidden=32)
    return {"seconds": interleaved(used_variants(base, args.quick, prompts=False), 2 * args.rounds)}


def used_variants(base: PreTrainedModel, quick: bool, prompts: bool) -> dict[str, Callable[[], Times]]:
    """Base, native model, LoRA, and adapters in all layers, as they are and in the inference form."""
    off = extended(base, Adapter("all", routing="compete"))
    variants = {"base": user(base, prompts), "native": user(native(base, NEW), prompts)}
    variants["adapter off"] = user(off, prompts, off.disable_adapter)
    if not quick:
        variants["LoRA, not merged"] = user(with_lora(base).eval(), prompts)
    for routing in ("compete", "exclusive", "closed", "open, no deltas", "open"):
        for form in ("", "fused"):
            if quick and routing.startswith("open"):
                continue
            model = extended(base, Adapter("all", routing=routing))
            if form:
                model.fuse()
            variants[", ".join(filter(None, (routing, form)))] = user(model, prompts)
    for form in () if quick else ("", "fused"):
        model = three_adapters(base)
        if form:
            model.fuse()
        variants[", ".join(filter(None, ("three adapters", form)))] = user(model, prompts)
    return variants


def user(
    model: nn.Module, prompts: bool, inside: Callable[[], Any] = contextlib.nullcontext, steps: int = 24
) -> Callable[[], Times]:
    """Prefill and decoding, the least disturbed of several calls."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, VOCAB, (1, 512), generator=generator)
    starts = {rows: torch.randint(0, VOCAB, (rows, 16), generator=generator) for rows in (1, 8)}

    def timed(**inputs):
        start = clock()
        output = model(**inputs)
        return clock() - start, output

    @torch.no_grad()
    def run():
        times = {}
        with inside():
            if prompts:
                options = {"input_ids": prompt, "use_cache": False, "logits_to_keep": 1}
                times["prefill"] = min(timed(**options)[0] for _ in range(2))
            for rows, ids in starts.items():
                _, output = timed(input_ids=ids, use_cache=True)
                cache, token, seconds = output.past_key_values, ids[:, :1], []
                for _ in range(steps):
                    seconds.append(timed(input_ids=token, past_key_values=cache, use_cache=True)[0])
                times[f"decode {rows}"] = min(seconds)
        return times

    return run


def half_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    base, variants = make_base(size, layers=4).to(torch.bfloat16), {}
    ids = torch.randint(0, VOCAB, (2, 256), generator=torch.Generator().manual_seed(1))
    for routing in ("compete", "exclusive"):
        for dtype in (torch.float32, torch.bfloat16):
            model = extended(base, Adapter(routing=routing))
            trained = list(model.set_trainable().values())
            for parameter in trained:
                parameter.data = parameter.data.to(dtype)
            variants[f"{routing}, {str(dtype).removeprefix('torch.')}"] = stepper(
                model, trained, plain_loss(model, ids)
            )
    return {"seconds": interleaved(variants, args.rounds)}


def load_part(size: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(size)
        base.save_pretrained(f"{folder}/base")
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        model = MoExtendForCausalLM.from_base(loaded, plan_of(base, "all", NEW), **ROUTINGS["exclusive"])
        model.save_pretrained(f"{folder}/adapter")
        sizes = {"base": sum(p.nbytes for p in base.parameters()), "adapter": model.adapter_bytes()}
        del base, loaded, model
        gc.collect()
        runs: dict[str, list[dict[str, Any]]] = {"base": [], "adapter": []}
        for _ in range(args.rounds):
            for name in runs:
                runs[name].append(in_own_process("load", size, f"{folder}/{name}"))
    return {"bytes": sizes, "runs": runs}


def load_once(folder: str) -> dict[str, Any]:
    auto_class = AutoModelForCausalLM if folder.endswith("base") else MoExtendForCausalLM
    start = clock()
    with peak_memory() as found:
        model = auto_class.from_pretrained(folder, dtype=torch.float32)
        for parameter in model.parameters():  # what is mapped is read
            parameter.sum()
    return {**found, "seconds": clock() - start}


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, Any]]:
    """Fills `peak`: bytes of this process beyond what it had at the start of the block."""
    Path("/proc/self/clear_refs").write_text("5")
    found, before = {}, status("VmRSS")
    yield found
    found["peak"] = status("VmHWM") - before


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_own_process(part: str, size: str, what: str) -> dict[str, Any]:
    """One measure of memory, by this script in a process that gives memory back to the system at once."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", part, size, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part} {size} {what} failed:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- what came out


def tables(results: dict[str, Any]) -> str:
    """Markdown: a table a part and size, medians of ratios with their spread."""
    parts = []
    for key, result in results["parts"].items():
        part, size = key.split("/")
        parts += [f"### {part}, {size}\n", *TABLES[part](result), ""]
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    note = f"`python benchmarks/speed.py`, {results['threads']} thread(s) of {results['processor']}, {packages}.\n"
    return "\n".join([note, *parts])


def train_table(result: dict[str, Any]) -> list[str]:
    found, lines = (
        result["seconds"],
        ["| step of | ms | / floor | / full fine-tuning | / LoRA |", "|---|---|---|---|---|"],
    )
    for name in found:
        if not name.startswith("floor of"):
            floor = result["floors"].get(name)
            cells = [shown(found, name, other, "step") if other else "" for other in (floor, FULL, LORA)]
            lines.append(f"| {name} | {1000 * median(found[name]['step']):.0f} | {' | '.join(cells)} |")
    return lines


def infer_table(result: dict[str, Any]) -> list[str]:
    found = result["seconds"]
    measures = list(next(iter(found.values())))
    columns = [f"{measure} / {other}" for measure in measures for other in ("base", "native")]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in found:
        cells = [shown(found, name, other, measure) for measure in measures for other in ("base", "native")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def memory_table(result: dict[str, Any]) -> list[str]:
    lines = ["| peak beyond the base | MiB | / full fine-tuning |", "|---|---|---|"]
    return lines + [f"| {name} | {peak / 2**20:.0f} | {peak / result[FULL]:.2f} |" for name, peak in result.items()]


def epochs_table(result: dict[str, Any]) -> list[str]:
    lines = ["| epoch with `prefix_cache` / without | first | second |", "|---|---|---|"]
    for where in ("upper", "upper quarter"):
        pair = f"{where}, kept", f"{where}, not"
        cells = [shown(result["seconds"], *pair, epoch) for epoch in ("first", "second")]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    return lines


def half_table(result: dict[str, Any]) -> list[str]:
    lines = ["| step, kept in float32 / kept in bfloat16 | |", "|---|---|"]
    for routing in ("compete", "exclusive"):
        pair = f"{routing}, float32", f"{routing}, bfloat16"
        lines.append(f"| {routing} | {shown(result['seconds'], *pair, 'step')} |")
    return lines


def load_table(result: dict[str, Any]) -> list[str]:
    lines = ["| loading | MiB on disk | CPU s | peak / bytes on disk |", "|---|---|---|---|"]
    for name, runs in result["runs"].items():
        size = result["bytes"]["base"] + (result["bytes"]["adapter"] if name == "adapter" else 0)
        seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "peak"))
        text = "base" if name == "base" else "base and adapter"
        lines.append(f"| {text} | {size / 2**20:.0f} | {seconds:.2f} | {peak / size:.2f} |")
    return lines


def shown(found: dict[str, Any], name: str, other: str, measure: str) -> str:
    middle, lowest, highest = ratio(found, name, other, measure)
    return "" if name == other else f"{middle:.2f} ({lowest:.2f} to {highest:.2f})"


@styled
def picture(results: dict[str, Any], path: Path) -> None:
    """A dot a variant and size: a training step beside full fine-tuning, decoding one row beside the base."""
    figure = new_figure(WIDTH, 7.4)
    panels = zip(figure.subplots(2, 1, height_ratios=(11, 15)), PANELS, strict=True)
    for axes, (part, other, measure, label, ticks) in panels:
        found = {size: results["parts"].get(f"{part}/{size}", {}).get("seconds", {}) for size in "SF"}
        names = [name for name in found["S"] or found["F"] if name != other and not name.startswith("floor of")]
        for number, seconds in enumerate(found.values()):
            shown = [(row, *ratio(seconds, name, other, measure)) for row, name in enumerate(names) if name in seconds]
            for row, middle, lowest, highest in shown:
                place, look = row + 0.4 * (number - 0.5), {"color": COLOURS[number], "zorder": 3}
                axes.plot([lowest, highest], [place, place], marker="", **look)
                axes.plot(middle, place, MARKERS[number], markersize=5.5, **look)
        axes.axvline(1.0, color="0.3", linewidth=1, linestyle=":", marker="")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        handles = [axes.plot([], [], MARKERS[n], color=COLOURS[n], label=text)[0] for n, text in enumerate(SIZES)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    save(figure, path)


MEASURES = {"train": train_part, "memory": memory_part, "infer": infer_part, "host": host_part}
MEASURES |= {"epochs": epochs_part, "half": half_part, "load": load_part}
TABLES = {"train": train_table, "memory": memory_table, "infer": infer_table, "host": infer_table}
TABLES |= {"epochs": epochs_table, "half": half_table, "load": load_table}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=("S", "F"), help="default: both")
    parser.add_argument("--rounds", type=int, help="that count; default 5, with --quick 3")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--quick", action="store_true", help="size S, the main variants: 10 minutes")
    parser.add_argument("--output", type=Path, help="default: results/speed.json beside this; with --quick outputs/")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.sizes = args.sizes or (["S"] if args.quick else ["S", "F"])
    args.rounds = args.rounds or (3 if args.quick else 5)
    default = Path("outputs/benchmarks/speed-quick.json") if args.quick else RESULTS / "speed.json"
    args.output = args.output or default
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        part, size, what = args.one
        print(json.dumps(peak_of_training(size, what) if part == "memory" else load_once(what)))
        return
    results = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    results |= {"versions": packages, "processor": platform.processor() or platform.machine(), "threads": args.threads}
    for part in args.parts:
        for size in args.sizes:
            print(f"{part}, size {size}", flush=True)
            results["parts"][f"{part}/{size}"] = MEASURES[part](size, args)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = tables(results)
    print(text)
    if args.output == RESULTS / "speed.json":
        picture(results, ROOT / "docs/images/speed.png")
        page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
        before, rest = page.split(START)
        page = f"{before}{START}\n{text}{END}{rest.split(END)[1]}"
        (ROOT / "docs/speed.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
