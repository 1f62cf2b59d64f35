"""Tiny random bases of every family, built in memory. The Hub is off."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import functools
import socket
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

VOCAB = 96
PAPER = {"scope": "all", "selection": "compete", "calibration": "all"}  # the paper's routing, not from_base's default
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES = {  # family -> what its config needs beside COMMON: four MoE layers, E = 6 experts, K = 2
    "mixtral": {"num_local_experts": 6, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "intermediate_size": 24,
        "decoder_sparse_step": 1,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 6, "intermediate_size": 24},
    "granitemoe": {"num_local_experts": 6, "intermediate_size": 24, "logits_scaling": 2.0},
    "deepseek_v3": {
        "n_routed_experts": 6,
        "moe_intermediate_size": 24,
        "intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_group": 3,
        "topk_group": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
    "gpt_oss": {"num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "sliding_window": 16},
}


@functools.cache
def _base(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # routers start at zero or near it in some families: make their choices differ
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith((".gate.weight", ".router.weight")) or "correction_bias" in name:
                tensor.normal_(std=0.5 if "weight" in name else 0.1)
            elif "experts" in name or name.endswith("bias"):
                tensor.normal_(std=0.2)
    return model


def make_base(family="mixtral", dtype=torch.float32, **config):
    """A private copy of the family's random base; `config` is set on it (e.g. `_experts_implementation`)."""
    model = copy.deepcopy(_base(family)).to(dtype)
    implementation = config.pop("experts_implementation", None)
    if implementation:
        model.set_experts_implementation(implementation)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


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


def batch(rows=3, length=10, seed=0):
    """Random ids [rows, length] with left padding in all rows but the first, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def in_two_processes(work, folder):
    """Runs `work(rank, port, folder)` in two processes, to their end; each writes what it found to `folder`.

    `work` is to call `leave_group` last.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)


def leave_group():
    """Ends a process of `in_two_processes` that has written its results.

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
