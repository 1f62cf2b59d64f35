"""What whole new experts and those of a rank cost: parameters, file, optimiser state, memory of a training step.

    python benchmarks/expert_rank.py                                   # random Mixtral layers, 2 cores: 2 minutes
    python benchmarks/expert_rank.py --hidden 4096 --inner 14336 --layers 4 --dtype bfloat16 --device cuda

Each setting runs in a process of its own; the memory is the peak of the process (on a GPU that of torch's allocator),
less what it was before the adapter was attached. Weights are random: what is
measured does not depend on them.
"""

import argparse
import json
import multiprocessing
import resource

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_moextend import MoExtendForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    sizes = {"hidden": 512, "inner": 1792, "layers": 8, "experts": 8, "new": 4, "tokens": 512}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 32, 8])
    parser.add_argument("--dtype", default="bfloat16", help="of the base; new tensors train in float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing, as TRL has it by default"
    )
    args = parser.parse_args()
    for rank in (None, *args.ranks):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(json.dumps({"rank": rank, **pool.apply(measure, (args, rank))}), flush=True)


def measure(args: argparse.Namespace, rank: int | None) -> dict[str, float]:
    """Two steps of AdamW: parameters, and MiB of the file (in the base's dtype), of the optimiser and at the peak."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        num_local_experts=args.experts,
    )
    with torch.device(args.device):
        base = MixtralForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
    before = peak(args.device)
    plan = {layer: list(range(args.new)) for layer in range(args.layers)}
    model = MoExtendForCausalLM.from_base(base, plan, scope="all", expert_rank=rank)
    trained = model.set_trainable()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    ids = torch.randint(3, 1024, (1, args.tokens), device=args.device)
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sum(t.nbytes for states in optimizer.state.values() for t in states.values() if t.dim())
    numbers = {"file": model.adapter_bytes(), "optimiser": state, "peak": peak(args.device) - before}
    return {
        "parameters": sum(p.numel() for p in trained.values()),
        **{name: round(size / 2**20, 1) for name, size in numbers.items()},
    }


def peak(device: str) -> int:
    """Bytes that were in use at once, at most, up to now."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
