"""Tiny random bases of the default families, built in memory (all others: families.py). The Hub is off."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small models threads wait for each other more than they compute

import copy
import socket
import sys
from dataclasses import replace

import pytest
import torch
from families import COMMON as COMMON
from families import DEFAULT, VOCAB, make_family
from families import FAMILIES as EVERY_FAMILY
from transformers import CLIPVisionConfig, CLIPVisionModel

FAMILIES = {name: EVERY_FAMILY[name].config for name in DEFAULT}  # those that every test of a family runs with
PAPER = {"scope": "all", "selection": "compete", "calibration": "all"}  # the paper's routing, not from_base's default


def make_base(family="mixtral", dtype=torch.float32, **config):
    """A private copy of the family's random base; `config` is set on it (e.g. `_experts_implementation`)."""
    return make_family(family, dtype=dtype, **config)


def frozen_copy(base):
    """A copy of `base` in the state that an extended one is in, for comparisons bit for bit: nothing in it trains.

    torch.matmul looks at that: it folds a batch times a weight that trains into one product, and may compute one an
    item where the weight is frozen (`should_fold` in ATen's LinearAlgebra.cpp). A product of another shape may be
    summed in another order, which shows in its last bits.
    """
    return copy.deepcopy(base).requires_grad_(False)


def rounding(*terms, dtype=torch.float32):
    """What nested sums of so many terms may differ by, in relation to their size, where they are done in two orders.

    A sum of n terms is off by up to n eps / 2, whatever the order (Higham, "Accuracy and Stability of Numerical
    Algorithms", 3.1), so two of them are up to n eps apart.
    """
    return sum(terms) * torch.finfo(dtype).eps


def make_encoder():
    """A random CLIP vision model: 16x16 pixels, 4 patches, hidden size 16."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    return CLIPVisionModel(config).eval()


def shake(model, seed=0, std=0.3):
    """Moves every new tensor away from its start value, so that a test sees its effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "projector" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * std)
    return model


def enable_checkpointing(model):
    """Gradient checkpointing, by the name that the installed transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def new_spans(model, layer):
    """Adapter name -> (first, stop): the indices that its new experts have in a layer, in a pass that begins now."""
    num_base = model.moe_layers[layer].num_experts
    plan = model.passes.layer_plans(model.select_adapters()).get(layer)
    return (
        {}
        if plan is None
        else {name: (num_base + first, num_base + stop) for name, (first, stop) in plan.spans.items()}
    )


def in_scope(model, scopes):
    """Context of a pass, for layers called by themselves: adapter name -> [T] bool, tokens in its scope."""
    return model.passes.using(plan=replace(model.passes.plan, scopes=scopes))


def batch(rows=3, length=10, seed=0):
    """Random ids [rows, length] with left padding in all rows but the first, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def in_processes(work, folder, number=2):
    """Runs `work(rank, port, folder)` in `number` processes, to their end; each writes what it found to `folder`.

    `work` is to call `leave_group` last.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=number)


def leave_group():
    """Ends a process of `in_processes` that has written its results.

    Not through the interpreter's own end: C++ threads of gloo, the store and pyarrow are then taken down in no fixed
    order, and one may abort after all work is done ("terminate called without an active exception"; seen in CI).
    """
    torch.distributed.barrier()  # process 0 holds the store that the other still asks
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def base(family):
    return make_base(family)
