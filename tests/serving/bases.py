"""Bases and adapters that the tests of serving need, made when first asked for, and what `generate` answers with each.

Every new tensor is random and large enough to change most tokens; a gate's threshold is the median of its margins, so
that half of the tokens are in scope.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TINY_MOE, TINY_CLIP = ASSETS / "tiny-moe", ASSETS / "tiny-clip"
NEW_TOKENS = 12
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN = {
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "head_dim": 32,
    "decoder_sparse_step": 1,
}
# With the entries of real checkpoints that transformers needs none of and vLLM goes by, and the one width of latent
# attention (kv_lora_rank + qk_rope_head_dim) that vLLM computes on a CPU.
DEEPSEEK = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "num_experts_per_tok": 3,
    "topk_group": 2,
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 0.7}
DEEPSEEK_V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "routed_scaling_factor": 1.5}
DEEPSEEK_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 2.5}
FAMILIES = {
    "deepseek_v2": {**DEEPSEEK, **DEEPSEEK_V2, "q_lora_rank": None, "rope_parameters": YARN},
    "deepseek_v3": {**DEEPSEEK, **DEEPSEEK_V3, "q_lora_rank": 32, "num_mtp_layers": 0},
    "qwen3_moe": {**QWEN, "norm_topk_prob": True},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    "olmoe": {"num_experts": 8, "intermediate_size": 64, "norm_topk_prob": False},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 64, "head_dim": 32, "sliding_window": 32},
    "granitemoe": {"num_local_experts": 8, "intermediate_size": 64, **GRANITE},
}
FOUR, ONE, EVERY = {1: [1, 5, 0, 3], 3: [3, 0, 6, 2]}, {1: [1], 2: [4]}, dict.fromkeys(range(4), [5, 1])
PLAIN = {"deltas": ()}  # a gate has deltas of all kinds unless this says otherwise
ADAPTERS = {  # name -> what `from_base` is told
    "paper": {"extended_layers": FOUR, "paper": True},
    "all": {"extended_layers": FOUR, "scope": "all"},
    "all_one": {"extended_layers": ONE, "scope": "all"},
    "all_routed": {"extended_layers": FOUR, "scope": "all", "selection": "compete", "calibration": "routed"},
    "native": {"extended_layers": EVERY, "scope": "all", "selection": "compete", "calibration": "none"},
    "gate": {"extended_layers": FOUR},
    "gate_one": {"extended_layers": ONE, **PLAIN},
    "gate_routed": {"extended_layers": FOUR, "selection": "compete", "calibration": "routed", **PLAIN},
    "gate_all": {"extended_layers": {2: [1, 5]}, "selection": "compete", "calibration": "all", **PLAIN},
    "low_rank": {"extended_layers": FOUR, "expert_rank": 4, "deltas": {"attention": 4, "output": 8, "embedding": 4}},
    "all_deltas": {"extended_layers": ONE, "scope": "all", "deltas": ("embedding", "attention", "output")},
}


def prompts(vocabulary: int) -> list[list[int]]:
    """Token ids: short ones and long ones, of which three have a beginning in common."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, vocabulary, (90,), generator=generator).tolist()
    return [text[:3], text[7:8], text, text[:80] + text[3:9], text[40:60], text[:80] + text[20:24], text[50:90]]


IMAGE_PROMPTS = (  # text, and how many images
    ("<image>What is this? It is", 1),
    ("A list of modules", 0),
    ("First <image> and then <image> are", 2),
    ("The function returns a list of the names of all modules. <image>", 1),
)


def images(count: int, seed: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy() for _ in range(count))
    return [Image.fromarray(one).resize((80, 64)) for one in pixels]


class Workshop:
    """Makes bases and adapters in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def base(self, family: str = "mixtral", dtype: str = "float32") -> Path:
        """Folder of the small trained base of the repository (mixtral), or of a random one."""
        folder = self.folder / f"{family}-{dtype}"
        if folder.exists():
            return folder
        torch.manual_seed(2)
        if family == "mixtral":
            model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=dtype)
        else:
            config = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
            model = AutoModelForCausalLM.from_config(config)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("bias", "e_score_correction_bias")):  # which start at zero
                    torch.nn.init.normal_(tensor, std=0.1)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY_MOE).save_pretrained(folder)
        return folder

    def adapter(self, kind: str, family: str = "mixtral", dtype: str = "float32") -> Path:
        """Folder of an adapter, a key of `ADAPTERS`, and what it answers in reference.json."""
        folder = self.folder / f"{family}-{dtype}-{kind}"
        if folder.exists():
            return folder
        base = self.base(family, dtype)
        model = MoExtendForCausalLM.from_base(base, dtype=dtype, **ADAPTERS[kind]).eval()
        return self.save(model, folder)

    def encoder(self, kind: str) -> Path:
        """Folder of the repository's small CLIP, or of a random SigLIP."""
        folder = self.folder / kind
        if not folder.exists():
            torch.manual_seed(3)
            sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
            siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16))
            (CLIPVisionModel.from_pretrained(TINY_CLIP) if kind == "clip" else siglip).float().save_pretrained(folder)
            siglip = SiglipImageProcessor(size={"height": 32, "width": 32})
            (AutoImageProcessor.from_pretrained(TINY_CLIP) if kind == "clip" else siglip).save_pretrained(folder)
        return folder

    def seeing(self, encoder: str, scope: str) -> Path:
        """Folder of an adapter that sees, its processor, and what it answers to `IMAGE_PROMPTS` in reference.json."""
        folder = self.folder / f"{encoder}-{scope}"
        if folder.exists():
            return folder
        path, base = self.encoder(encoder), self.base()
        tokenizer, pixels = AutoTokenizer.from_pretrained(base), AutoImageProcessor.from_pretrained(path)
        processor = MoExtendProcessor.from_encoder(tokenizer, pixels, AutoConfig.from_pretrained(path))
        options = {"encoder": path, "image_token_id": processor.image_token_id, "dtype": "float32", "scope": scope}
        model = MoExtendForCausalLM.from_base(base, FOUR, **options).eval()
        shake(model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, found = MoExtendForCausalLM.from_pretrained(folder, dtype="float32"), []
        for seed, (text, count) in enumerate(IMAGE_PROMPTS):
            inputs = processor(text=text, images=images(count, seed) or None, return_tensors="pt")
            found.append(answer(model, **inputs))
        (folder / "reference.json").write_text(json.dumps(found))
        return folder

    def save(self, model, folder, seed=0):
        shake(model, seed)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY_MOE).save_pretrained(folder)
        loaded = MoExtendForCausalLM.from_pretrained(folder, dtype=model.base.dtype)
        (folder / "reference.json").write_text(json.dumps(answers(loaded)))
        return folder

    def reference(self, folder: Path) -> list[dict]:
        """What `generate` gives for `prompts`: [{"ids", "new", "logprobs"}]."""
        path = folder / "reference.json"
        if not path.exists():  # of a base
            path.write_text(json.dumps(answers(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))))
        return json.loads(path.read_text())


@torch.no_grad()
def shake(model, seed=0):
    """Random new tensors, and the threshold of the gate at the median of its margins."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.adapter_tensors().items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if name.startswith("gate."):
            tensor.copy_(noise * (0.5 if name == "gate.fc2.weight" else 0 if name == "gate.fc2.bias" else 0.3))
        elif ".calibration.fc1" in name or ".correction_bias" in name:
            tensor.copy_(noise)
        elif ".calibration.fc2" in name:
            tensor.copy_(noise * 0.3)
        elif name.startswith("projector."):
            tensor.add_(noise * 0.05)
        elif ".experts." not in name and ".router." not in name:  # a delta
            tensor.copy_(noise * 0.08)
        else:
            scale = tensor.float().std() if tensor.numel() > 1 and tensor.any() else 0.1
            tensor.add_(noise * scale * (0.5 if ".experts." in name else 1))
    if model.config.scope == "gate":
        margins = []
        for ids in prompts(model.config.get_text_config().vocab_size):
            with model.record_routing() as records:
                model(input_ids=torch.tensor([ids]))
            margins += [record.gate for record in records.values() if record.margins]
        model.gate_threshold = round(float(torch.cat(margins).median()), 3)


def answers(model) -> list[dict]:
    vocabulary = model.config.get_text_config().vocab_size
    return [{"ids": ids, **answer(model, input_ids=torch.tensor([ids]))} for ids in prompts(vocabulary)]


@torch.no_grad()
def answer(model, **inputs) -> dict:
    """{"new": token ids, "logprobs": of each} that `generate` gives."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.cat(output.logits).float().log_softmax(-1).gather(-1, new.unsqueeze(-1))
    return {"new": new.tolist(), "logprobs": logprobs.squeeze(-1).tolist()}
