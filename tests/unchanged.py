"""Is another checkout of this project, on this machine, the same to the bit? Hashes of what it computes and trains.

    python tests/unchanged.py --against ../another-checkout     # names every case that differs; exit code 1 if any
    python tests/unchanged.py --output hashes.json              # only writes this checkout's

For refactoring: the cases go through public names alone, so they run on older checkouts as well. Hashes are of one
machine and its libraries, so none are kept in the repository; what holds for ever is in test_old_adapters.py.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from conftest import batch, make_base, make_encoder, shake
from datasets import Dataset, disable_progress_bars
from families import FAMILIES, make_family
from transformers import AutoTokenizer, logging

from modeling_moextend import (
    MoExtendForCausalLM,
    MoExtendSFTConfig,
    MoExtendSFTTrainer,
    configuration_moextend,
    measure_router_shift,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "assets" / "tiny-moe")
IMAGE = 96  # the first id past the vocabulary of the random bases; an image has four features
PLAN = {0: [1, 4], 1: [2]}
ALONE = {"deltas": ()} if hasattr(configuration_moextend, "DELTAS") else {}  # 0.1.0 has no deltas
CHOICES = {
    "paper": {"paper": True},
    "routed": {"scope": "all", "selection": "compete", "calibration": "routed"},
    "compete": {"scope": "all", "selection": "compete", "calibration": "none"},
    "exclusive": {"scope": "all", "selection": "exclusive"},
    "gate": {"scope": "gate", **ALONE},
}
FORWARD = (
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "inkling",
    "gemma4",
    "jamba",
    "kolibri1",
)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_named(tensors):
    return {name: digest(tensor) for name, tensor in tensors.items()}


def extended(base, choice, plan=PLAN, **options):
    """`base` with shaken new experts; a gate that lets about half of the tokens through."""
    torch.manual_seed(3)
    return opened(shake(MoExtendForCausalLM.from_base(base, plan, **CHOICES.get(choice, {}), **options)))


def opened(model, name=None):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, tensor in model.adapter_tensors(name).items():
            if key.startswith("gate.fc2."):
                value = torch.randn(tensor.shape, generator=generator) if key.endswith("weight") else torch.zeros(1)
                tensor.copy_(value)
    return model


@torch.no_grad()
def outputs(model, **inputs):
    """Hashes of logits, router logits and balance loss of one pass."""
    found = model(**inputs, output_router_logits=True)
    return digest(found.logits, *(found.router_logits or ()), *([] if found.aux_loss is None else [found.aux_loss]))


def generated(model, inputs, **options):
    fixed = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 10**6}
    return model.generate(**inputs, **fixed, **options)[:, inputs["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------- passes


@case
def forward():
    """Families, choices, experts implementations; adapter on and off; with gradients and without."""
    found = {}
    for family in FORWARD:
        for implementation in ("eager", "grouped_mm"):
            for choice in CHOICES if family in ("mixtral", "deepseek_v3") else ("paper", "exclusive"):
                if family == "phimoe" and choice == "paper":
                    continue
                variant = "multimodal" if family == "gemma4" else None
                base = make_family(family, variant if FAMILIES[family].whole else None)
                base.set_experts_implementation(implementation)
                model = extended(base, choice)
                key = f"{family} {implementation} {choice}"
                found[key] = outputs(model, **batch())
                with model.disable_adapter():
                    found[f"{key}, off"] = outputs(model, **batch())
                model.zero_grad()
                model(**batch(), labels=batch()["input_ids"]).loss.backward()
                found[f"{key}, gradients"] = digest_named(
                    {name: t.grad for name, t in model.adapter_tensors().items() if t.grad is not None}
                )
    return found


@case
def half_precision():
    return {
        f"{family} {choice}": outputs(extended(make_base(family, torch.bfloat16), choice), **batch())
        for family in ("mixtral", "gpt_oss")
        for choice in CHOICES
    }


@case
def packed_and_cached():
    found = {}
    for choice in CHOICES:
        model = extended(make_base(), choice)
        ids = batch()["input_ids"][:1]
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
        found[f"{choice}, packed"] = outputs(model, input_ids=ids, position_ids=positions)
        found[f"{choice}, greedy"] = generated(model, batch())
        found[f"{choice}, beams"] = generated(model, batch(), num_beams=3, num_return_sequences=2)
        with torch.no_grad():
            first = model(**batch(1, 6), use_cache=True)
            more = model(input_ids=batch(1, 4, seed=2)["input_ids"], past_key_values=first.past_key_values)
        found[f"{choice}, continued"] = digest(more.logits)
    return found


@case
def images():
    found = {}
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, *[IMAGE] * 4, 8], [0, 0, 0, 0, 0, 0, 9, *[IMAGE] * 4, 10]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for scope in ("all", "modality", "gate"):
        for selection in ("compete", "exclusive"):
            model = extended(make_base(), "", scope=scope, selection=selection, encoder=make_encoder(), **ALONE)
            key = f"{scope} {selection}"
            found[key] = outputs(model, **inputs, pixel_values=pixels)
            found[f"{key}, text"] = outputs(model, **batch())
            found[f"{key}, greedy"] = generated(model, inputs, pixel_values=pixels)
            found[f"{key}, beams"] = generated(model, inputs, pixel_values=pixels, num_beams=2)
            model.zero_grad()
            model(**inputs, pixel_values=pixels, labels=ids).loss.backward()
            grads = {name: t.grad for name, t in model.adapter_tensors().items() if t.grad is not None}
            found[f"{key}, gradients"] = digest_named(grads)
    return found


@case
def several_adapters():
    """Switched, together, an adapter an item of the batch, continually extended, saved and loaded."""
    found = {}
    for choice in ("compete", "exclusive", "gate"):
        with tempfile.TemporaryDirectory() as folder:
            model = extended(make_base(), choice, adapter_name="a")
            model.save_pretrained(f"{folder}/a", adapter_dtype="float32")
            for seed, name in enumerate(("b", "c"), start=1):
                torch.manual_seed(seed)  # 0.1.0 drew random numbers while it loaded an adapter
                other = opened(
                    shake(MoExtendForCausalLM.from_base(make_base(), {1: [0], 2: [3, 3]}, **CHOICES[choice]), seed)
                )
                other.save_pretrained(f"{folder}/{name}", adapter_dtype="float32")
                model.load_adapter(f"{folder}/{name}", adapter_name=name)
            for names in (["a"], ["c"], ["a", "b"], ["a", "b", "c"]):
                model.set_adapter(names)
                found[f"{choice} {names}"] = outputs(model, **batch())
                found[f"{choice} {names}, greedy"] = generated(model, batch())
            for items in (["a", "b", "__base__"], [["a", "b"], "c", "__base__"], ["c", "c", "c"]):
                found[f"{choice} items {items}"] = outputs(model, **batch(), adapter_names=items)
                found[f"{choice} items {items}, greedy"] = generated(model, batch(), adapter_names=items)
            model.delete_adapter("c")
            model.set_adapter(["a", "b"])
            torch.manual_seed(3)
            model.add_adapter("top", {0: [1], 3: [2]}, **CHOICES[choice])
            opened(shake_only(model, "top"), "top")
            found[f"{choice} on top"] = outputs(model, **batch())
            model.save_pretrained(f"{folder}/top", adapter_name="top")
            stack = MoExtendForCausalLM.from_pretrained(f"{folder}/a", base=make_base(), adapter_name="a")
            stack.load_adapter(f"{folder}/b", adapter_name="b")
            stack.load_adapter(f"{folder}/top", adapter_name="top")
            stack.set_adapter(["a", "b", "top"])
            found[f"{choice} stack loaded"] = outputs(stack, **batch())
    return found


def shake_only(model, name):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.adapter_tensors(name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.3)
    return model


# ---------------------------------------------------------------- training


def chats(number=24):
    ask = "What is {} plus {}?"
    rows = [
        [{"role": "user", "content": ask.format(i, i + 3)}, {"role": "assistant", "content": f"It is {2 * i + 3}."}]
        for i in range(number)
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


def retention():
    return Dataset.from_list([{"text": f"The function number {i} returns a list of {i} names."} for i in range(24)])


def trained(folder, model, resume=None, **options):
    settings = {
        "max_steps": 20,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "assistant_only_loss": True,
        "gate_steps": 20,
        "retention_tokens": 256,
        "verify_base": True,
        "retention_cache_dir": str(folder),
    }
    texts = {"retention_dataset": retention()} if options.pop("given", False) else {}
    trainer = MoExtendSFTTrainer(
        model=model,
        args=MoExtendSFTConfig(str(folder), **{**settings, **options}),
        train_dataset=chats(),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        **texts,
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tensors": digest_named(model.adapter_tensors()), "losses": losses}


def tiny(choice, **options):
    torch.manual_seed(0)
    plan = {1: [0, 3], 3: [1, 2]}
    return MoExtendForCausalLM.from_base(TINY, plan, dtype="float32", **CHOICES[choice], **options)


@case
def training():
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for choice in ("paper", "exclusive"):
            found[choice] = trained(f"{folder}/{choice}", tiny(choice), gradient_checkpointing=choice == "paper")
        found["gate, own text"] = trained(f"{folder}/own", tiny("gate"), given=True)
        found["gate, sampled text"] = trained(f"{folder}/self", tiny("gate"), packing=True, max_length=128)
    return found


@case
def resumed_training():
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_strategy": "steps", "save_steps": 10, "given": True, "gradient_accumulation_steps": 2}
        whole = trained(f"{folder}/run", tiny("gate"), **options)
        again = trained(f"{folder}/run", tiny("gate"), resume=f"{folder}/run/checkpoint-10", **options)
        return {"whole": whole, "resumed": again}


@case
def router_shift():
    with tempfile.TemporaryDirectory() as folder:
        from modeling_moextend.extender import probe_config

        args = probe_config(folder, max_steps=10, per_device_train_batch_size=2, disable_tqdm=True, bf16=False)
        torch.manual_seed(0)
        model = MoExtendForCausalLM.from_base(TINY, {1: [0]}, dtype="float32", scope="all")
        data = chats()
        with contextlib.redirect_stdout(sys.stderr):
            shift = measure_router_shift(
                model, data, data.select(range(8)), args=args, processing_class=AutoTokenizer.from_pretrained(TINY)
            )
    return {"before": shift.counts_before.tolist(), "after": shift.counts_after.tolist(), "plan": str(shift.select())}


def compute(names):
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)
    return {name: CASES[name]() for name in names}


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in flat(value, f"{prefix} / {name}".strip(" /")).items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="root of another checkout")
    parser.add_argument("--output", help="JSON file to write this checkout's hashes to")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    found = compute(args.cases)
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
    if args.against:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--output", f"{folder}/other.json", "--cases", *args.cases]
            path = os.pathsep.join([str(Path(args.against).resolve()), str(Path(__file__).parent)])
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
            other = json.loads(Path(folder, "other.json").read_text(encoding="utf-8"))
        one, other = flat(json.loads(json.dumps(found))), flat(other)
        differ = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        print(f"{len(one)} values, {len(differ)} differ" + "".join(f"\n  {key}" for key in differ))
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
