"""Writes adapters of this version, for the test that later versions load them: tests/test_old_adapters.py.

    PYTHONPATH=. python tests/old_adapters/make.py        # from the root, once a version of the format

Bases, encoder and adapters lie side by side in a folder named by the version, small and random: their configs name
each other by relative paths. `code/` holds the files that this version ships with each of them; `logits.safetensors`
what that code answers to `inputs`.
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import make_base, make_encoder, shake
from safetensors.torch import save_file

import modeling_moextend
from modeling_moextend import MoExtendForCausalLM
from old_adapters.inputs import IMAGE, inputs

HERE = Path(__file__).resolve().parent
PLAN = {1: [0, 3], 2: [5]}
SEEING = {"encoder": "encoder", "image_token_id": IMAGE}
ADAPTERS = {  # name -> (base, plan, options of from_base, options of save_pretrained)
    "paper": ("mixtral", PLAN, {"paper": True}, {}),
    "routed": ("deepseek_v3", PLAN, {"scope": "all", "selection": "compete"}, {}),
    "compete": ("gpt_oss", PLAN, {"scope": "all", "selection": "compete", "calibration": "none"}, {}),
    "exclusive": ("gpt_oss", PLAN, {"scope": "all"}, {"adapter_dtype": "float32"}),
    "gate": ("mixtral", PLAN, {"scope": "gate", "gate_threshold": -0.25}, {}),
    "sharded": ("mixtral", PLAN, {"scope": "all"}, {"max_shard_size": "8KB"}),
    "aligned": ("mixtral", {}, SEEING, {}),
    "modality": ("mixtral", PLAN, SEEING, {"adapter_dtype": "float32"}),
    "seeing-gate": ("mixtral", PLAN, {**SEEING, "scope": "gate", "selection": "compete"}, {}),
}
ON_TOP = ("upper", {0: [2], 2: [1, 1]}, {"scope": "gate"})  # of the adapter "gate"


def opened(model, name=None):
    """Moved from its start values, with a gate that lets some tokens through and others not."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, tensor in model.adapter_tensors(name).items():
            if key == "gate.fc2.weight":
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif key == "gate.fc2.bias":
                tensor.zero_()
    return model


def main():
    folder = HERE / modeling_moextend.__version__
    folder.mkdir()
    os.chdir(folder)
    for family in sorted({base for base, *_ in ADAPTERS.values()}):
        make_base(family, torch.bfloat16).save_pretrained(f"base-{family}")
    make_encoder().save_pretrained("encoder")
    logits = {}
    for name, (family, plan, options, saving) in ADAPTERS.items():
        torch.manual_seed(1)
        model = MoExtendForCausalLM.from_base(f"base-{family}", plan, **options)
        opened(shake(model)).save_pretrained(name, **saving)
    below = MoExtendForCausalLM.from_pretrained("gate", adapter_name="gate")
    name, plan, options = ON_TOP
    below.add_adapter(name, plan, **options)
    with torch.no_grad():
        for tensor in below.adapter_tensors(name).values():
            tensor.mul_(1.25)
    opened(below, name).save_pretrained(name, adapter_name=name)
    for name, (_, _, options, _) in ADAPTERS.items():
        model = MoExtendForCausalLM.from_pretrained(name, dtype="float32")
        with torch.no_grad():
            logits[name] = model(**inputs("encoder" in options)).logits
    stack = MoExtendForCausalLM.from_pretrained("gate", adapter_name="gate", dtype="float32")
    stack.load_adapter("upper", adapter_name="upper")
    stack.set_adapter(["gate", "upper"])
    with torch.no_grad():
        logits["upper"] = stack(**inputs()).logits
    save_file(logits, "logits.safetensors")
    Path("code").mkdir()
    for path in Path(modeling_moextend.__file__).parent.glob("*_moextend.py"):
        shutil.copy(path, "code")
    for path in Path().glob("*/*_moextend.py"):
        if path.parent.name != "code":
            path.unlink()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree("code/__pycache__")


if __name__ == "__main__":
    main()
