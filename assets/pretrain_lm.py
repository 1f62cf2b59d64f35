"""Pretrain the small mixture-of-experts language model in assets/tiny-moe, or evaluate it.

pip install -r assets/requirements.txt
python assets/pretrain_lm.py --output assets/tiny-moe
python assets/pretrain_lm.py --evaluate assets/tiny-moe
"""

import argparse
import json
import math
import os
import shutil
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read once, when tokenizers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from text_data import DOMAINS, build_corpus, digest, held_out_texts, write_held_out
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIAL_TOKENS = [PAD, BOS, END, "<|system|>", "<|user|>", "<|assistant|>"]
# <|end|> closes every turn and every document. An image part is written as <image>, which is not in the vocabulary:
# the library gives it an id of its own past the embedding.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') }}
    {%- endif %}
    {%- set parts = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set parts.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set parts.text = parts.text ~ '<image>' %}
            {%- elif part['type'] == 'text' %}
                {%- set parts.text = parts.text ~ part['text'] %}
            {%- else %}
                {{- raise_exception('unknown content type ' ~ part['type'] ~ ': use text or image') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- parts.text ~ eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- parts.text ~ eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; `tokenizer(text)` puts bos in front, the chat template brings its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def render_chat(messages: list[dict[str, str]]) -> str:
    """What the chat template gives for plain messages, without the bos that the tokenizer adds."""
    return "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def sample(texts: list[str], characters: int) -> list[str]:
    """Documents of a fixed pseudo-random choice, up to about the given number of characters."""
    chosen, size = [], 0
    for text in sorted(texts, key=digest):
        if size > characters:
            break
        chosen.append(text)
        size += len(text)
    return chosen


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each document: bos, text, and the end token that a dialogue already has."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [row if row[-1] == end else [*row, end] for row in rows]


class Packer:
    """Draws [batch, length] blocks of token ids, each from one domain, domains taken by weight.

    Within a domain the shuffled documents are read through before any comes again. Half of the blocks begin at a
    document's bos, as prompts do; the others go on where that domain's block before ended, so that ends are read too.
    """

    def __init__(self, documents: dict[str, list[list[int]]], weights: dict[str, float], length: int, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.documents, self.length = documents, length
        self.names, self.weights = list(weights), torch.tensor(list(weights.values()), dtype=torch.float32)
        self.queues = {name: [] for name in self.names}
        self.rest = {name: [] for name in self.names}

    def next_document(self, name: str) -> list[int]:
        if not self.queues[name]:
            self.queues[name] = torch.randperm(len(self.documents[name]), generator=self.random).tolist()
        return self.documents[name][self.queues[name].pop()]

    def block(self) -> list[int]:
        name = self.names[torch.multinomial(self.weights, 1, generator=self.random).item()]
        goes_on = torch.rand((), generator=self.random) < 0.5
        tokens = self.rest[name] if goes_on else []
        while len(tokens) < self.length:
            tokens = tokens + self.next_document(name)
        self.rest[name] = tokens[self.length :]
        return tokens[: self.length]

    def batch(self, size: int) -> torch.Tensor:
        return torch.tensor([self.block() for _ in range(size)])


def make_model(args, tokenizer) -> MixtralForCausalLM:
    if args.start:
        implementation = args.experts_implementation
        return MixtralForCausalLM.from_pretrained(
            args.start, dtype=torch.float32, experts_implementation=implementation
        ).train()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        sliding_window=None,
        tie_word_embeddings=True,
        router_aux_loss_coef=args.balance,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._experts_implementation = args.experts_implementation
    model = MixtralForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def make_optimizer(model: torch.nn.Module, args) -> torch.optim.AdamW:
    """Weight decay on matrices only; norms keep their scale."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def rate(progress: float, warmup: float = 0.02, floor: float = 0.03) -> float:
    """Share of the peak learning rate at a share of the run: linear warm-up, then cosine down to the floor."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def save(model, tokenizer, folder: Path) -> None:
    """Write weights in bf16 through a second folder, so that a reader never meets half a file."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = MixtralForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(partial)
    for key in ("is_local", "local_files_only"):  # how a loaded tokenizer was found is no property of it
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(partial)
    folder.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only
        os.replace(path, folder / path.name)
    partial.rmdir()


def train(args) -> None:
    torch.manual_seed(args.seed)
    corpus = build_corpus(render_chat)
    texts = [text for domain in DOMAINS for text in sample(corpus["train"][domain], 4_000_000)]
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else train_tokenizer(texts, args.vocab_size)
    write_held_out(corpus["held_out"], args.output)
    documents = {domain: encode(tokenizer, corpus["train"][domain]) for domain in DOMAINS}
    for domain in DOMAINS:
        print(f"{domain:8} {len(documents[domain]):6} documents {sum(map(len, documents[domain])):9} tokens")
    model = make_model(args, tokenizer)
    print(f"{model.num_parameters():,} parameters")
    start = time.monotonic()
    steps = run_steps(model, Packer(documents, args.weights, args.length, args.seed), args, tokenizer)
    save(model, tokenizer, args.output)
    seconds = time.monotonic() - start
    tokens = steps * args.batch_size * args.length
    print(f"{steps} steps, {tokens:,} tokens in {seconds / 60:.1f} minutes")


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Sum over layers of E * sum_i f_i * P_i (Fedus et al. 2021, eq. 4); top_k * layers when all is even.

    `router_logits` holds one [tokens, E] a layer. transformers' own loss pools the layers first: an expert may then
    starve in one layer as long as its namesake in another is busy, and here that left dead experts in every layer.
    """
    total = 0
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = torch.nn.functional.one_hot(logits.topk(top_k).indices, experts).sum(dim=1).float()
        total = total + experts * (chosen.mean(dim=0) * logits.softmax(dim=-1).mean(dim=0)).sum()
    return total


def least_share(router_logits: tuple[torch.Tensor, ...], top_k: int) -> float:
    """Share of top-k selections of the least used expert of any layer, in this batch."""
    counts = [torch.bincount(x.topk(top_k).indices.flatten(), minlength=x.shape[-1]) for x in router_logits]
    return min((count.min() / count.sum()).item() for count in counts)


def run_steps(model, packer: Packer, args, tokenizer) -> int:
    """Train, saving an intermediate state every few minutes; returns the number of steps done."""
    optimizer, top_k = make_optimizer(model, args), model.config.num_experts_per_tok
    start = saved = time.monotonic()
    with tqdm(range(args.steps), mininterval=10) as bar:
        for step in bar:
            now = time.monotonic()
            # The second term only matters on a machine slower than planned for: the rate still ends low in time.
            progress = max(step / args.steps, (now - start) / (args.max_minutes * 60))
            if progress >= 1:
                return step
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate(progress)
            batch = packer.batch(args.batch_size)
            # Without `labels` the model adds no balance loss of its own.
            output = model(input_ids=batch, output_router_logits=True)
            loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            (loss + args.balance * balance_loss(output.router_logits, top_k)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            share = least_share(output.router_logits, top_k)
            bar.set_postfix(loss=f"{loss.item():.3f}", least_used_expert=f"{share:.1%}")
            if now - saved > args.save_minutes * 60:
                save(model, tokenizer, args.output)
                saved = now
    return args.steps


class Bigram:
    """Interpolated Kneser-Ney bigram over token ids, its discount estimated from the counts (Chen & Goodman 1998)."""

    def __init__(self, documents: list[list[int]], vocab_size: int):
        self.pairs = Counter(pair for row in documents for pair in zip(row, row[1:], strict=False))
        self.context, self.followers, self.preceding = Counter(), Counter(), Counter()
        for (left, right), count in self.pairs.items():
            self.context[left] += count
            self.followers[left] += 1
            self.preceding[right] += 1
        once, twice = (sum(count == n for count in self.pairs.values()) for n in (1, 2))
        self.discount = once / (once + 2 * twice)
        self.kinds, self.vocab_size = len(self.pairs), vocab_size

    def lower(self, right: int) -> float:
        """Continuation probability of a token, itself smoothed with the uniform distribution."""
        spared = self.discount * len(self.preceding) / self.kinds
        return max(self.preceding[right] - self.discount, 0) / self.kinds + spared / self.vocab_size

    def probability(self, left: int, right: int) -> float:
        if not self.context[left]:
            return self.lower(right)
        spared = self.discount * self.followers[left] / self.context[left]
        found = max(self.pairs[left, right] - self.discount, 0) / self.context[left]
        return found + spared * self.lower(right)

    def perplexity(self, documents: list[list[int]]) -> float:
        logs = [math.log(self.probability(*pair)) for row in documents for pair in zip(row, row[1:], strict=False)]
        return math.exp(-sum(logs) / len(logs))


@torch.inference_mode()
def perplexity(model, documents: list[list[int]], batch_size: int = 16) -> float:
    """exp of the mean cross-entropy in nats over all tokens but each document's bos; lower is better."""
    total, count = 0.0, 0
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        width = max(map(len, rows))
        batch = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in rows])
        logits = model(input_ids=batch).logits[:, :-1].float()  # causal: what follows a row's end cannot change it
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += (labels != -100).sum().item()
    return math.exp(total / count)


@torch.inference_mode()
def expert_use(model, documents: list[list[int]]) -> torch.Tensor:
    """Share of top-k selections that each expert gets, [layers, experts], rows sum to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for row in documents:
        routers = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
    return counts / counts.sum(dim=1, keepdim=True)


def random_routing(gate, inputs, output):
    """Forward hook of a router: other experts, drawn evenly, with the weights that the chosen ones had."""
    logits, weights, _ = output
    return logits, weights, torch.rand(logits.shape).topk(weights.shape[-1]).indices


def random_perplexity(model, documents: list[list[int]]) -> float:
    torch.manual_seed(0)
    hooks = [layer.mlp.gate.register_forward_hook(random_routing) for layer in model.model.layers]
    try:
        return perplexity(model, documents)
    finally:
        for hook in hooks:
            hook.remove()


def evaluate(args) -> None:
    """Print held-out perplexity by domain beside a bigram model and random routing, then expert use by layer."""
    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    corpus = build_corpus(render_chat)
    rows, use = [], []

    def read(texts: list[str]) -> list[list[int]]:
        return [row[: args.length] for row in encode(tokenizer, texts)]  # as long as in training

    print("| held-out text | tokens | model | bigram | random routing | shipped sample |\n|---|---|---|---|---|---|")
    for domain in DOMAINS:
        held_out = read(sample(corpus["held_out"][domain], args.characters))
        bigram = Bigram(encode(tokenizer, corpus["train"][domain]), len(tokenizer))
        shipped = read(held_out_texts(domain, args.evaluate / "held_out.jsonl"))
        values = [perplexity(model, held_out), bigram.perplexity(held_out), random_perplexity(model, held_out)]
        rows.append([*values, perplexity(model, shipped)])
        use.append(expert_use(model, held_out))
        print(f"| {domain} | {sum(map(len, held_out))} | " + " | ".join(f"{value:.1f}" for value in rows[-1]) + " |")
    means = torch.tensor(rows, dtype=torch.float64).log().mean(dim=0).exp().tolist()
    print("| geometric mean | | " + " | ".join(f"{value:.1f}" for value in means) + " |")
    print_use(torch.stack(use))


def print_use(use: torch.Tensor) -> None:
    """Table of the least and most used expert by layer, as shares of top-k selections; `use` is [domains, L, E]."""
    print("\n| layer | least used expert | most used expert | least to most within " + ", ".join(DOMAINS) + " |")
    print("|---|---|---|---|")
    for layer, share in enumerate(use.mean(dim=0)):
        within = ", ".join(f"{row.min():.1%} to {row.max():.1%}" for row in use[:, layer])
        print(f"| {layer} | {share.min():.1%} | {share.max():.1%} | {within} |")


def parse_args() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="train, and write model, tokenizer and held_out.jsonl here")
    what.add_argument("--evaluate", type=Path, help="print the held-out tables of the model in this folder")
    parser.add_argument("--start", type=Path, help="go on from the weights and tokenizer in this folder")
    parser.add_argument("--steps", type=int, default=1900, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, each with 8 experts")
    parser.add_argument("--hidden_size", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--intermediate_size", type=int, default=224, help="inner width of an expert")
    parser.add_argument("--vocab_size", type=int, default=4096, help="byte-level BPE tokens")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--weight_decay", type=float, default=0.1, help="on matrices")
    parser.add_argument("--balance", type=float, default=0.02, help="coefficient of each layer's balance loss")
    parser.add_argument(
        "--weights", type=json.loads, default='{"code": 1, "manual": 1, "science": 1, "chat": 1}', help="by domain"
    )
    parser.add_argument(
        "--experts_implementation", choices=("eager", "grouped_mm"), default="grouped_mm", help="speed"
    )
    parser.add_argument("--max_minutes", type=float, default=600, help="the learning rate ends low by then")
    parser.add_argument("--save_minutes", type=float, default=4, help="time between intermediate states")
    parser.add_argument("--characters", type=int, default=150_000, help="held-out text a domain in the evaluation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    torch.set_num_threads(arguments.threads)
    evaluate(arguments) if arguments.evaluate else train(arguments)
