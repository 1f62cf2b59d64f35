"""Throughput in vLLM: a base, the same base with adapters, and with a LoRA of PEFT's, on the same requests.

    make test-serving                                   # sets up its environment
    .venv-serving/bin/python benchmarks/serving.py      # a random Mixtral of 90 million parameters, on the CPU

Prints new tokens a second of each, the best of several rounds, and their ratio to the base's. A gate with the
threshold 1e9 lets no token through; one with the median of its margins as threshold lets half of them through.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
REQUESTS, PROMPT, NEW, ROUNDS = 16, 64, 16, 3
SIZES = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "max_position_embeddings": 512}
SOURCES = [1, 5, 0, 3]


def make(folder: Path) -> None:
    """The base, two adapters and a LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from modeling_moextend import MoExtendForCausalLM

    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).save_pretrained(folder / "base")
    model = MoExtendForCausalLM.from_base(folder / "base", dict.fromkeys(range(1, 6), SOURCES), dtype="float32")
    for name, tensor in model.adapter_tensors().items():
        if not name.startswith("layers."):
            torch.nn.init.normal_(tensor, std=0.1)
    with model.record_routing() as records, torch.no_grad():
        model(input_ids=torch.randint(3, 4096, (8, 64)))
    margins = torch.cat([record.gate for record in records.values() if record.margins])
    for name, threshold in {"closed": 1e9, "half": float(margins.median())}.items():
        model.gate_threshold = threshold
        model.save_pretrained(folder / name)
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    get_peft_model(MixtralForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "lora")


def measure(folder: Path, kind: str) -> dict[str, float]:
    """New tokens a second, by name, of one engine: "base", "adapters" or "lora"."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"max_model_len": 256, "block_size": 32, "enforce_eager": True, "skip_tokenizer_init": True}
    options |= {"dtype": "float32", "enable_prefix_caching": False, "distributed_executor_backend": "uni"}
    requests = {"base": None}
    if kind == "adapters":
        paths = {"gate, no token routed": folder / "closed", "gate, half of the tokens routed": folder / "half"}
        requests = {"base, served beside adapters": None}
        options["hf_overrides"] = {"architectures": ["MoExtendMixtralForCausalLM"]}
        options["hf_overrides"] |= {"moextend_adapters": [str(path) for path in paths.values()]}
    elif kind == "lora":
        paths, requests = {"PEFT LoRA, rank 16, attention": folder / "lora"}, {}
    if kind != "base":
        options |= {"enable_lora": True, "max_loras": len(paths)}
        requests |= {name: LoRARequest(name, k, str(path)) for k, (name, path) in enumerate(paths.items(), 1)}
    engine, best = LLM(str(folder / "base"), **options), {}
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    ids = torch.randint(3, 4096, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    for _ in range(ROUNDS):
        for name, request in requests.items():
            start = time.perf_counter()
            engine.generate([{"prompt_token_ids": one} for one in ids], greedy, lora_request=request, use_tqdm=False)
            best[name] = max(best.get(name, 0), REQUESTS * NEW / (time.perf_counter() - start))
    return best


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        found = {}
        for kind in ("base", "adapters", "lora"):
            command = [sys.executable, __file__, folder, kind]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{kind}: no engine ({done.stderr.strip().splitlines()[-1]})")
                continue
            for name, speed in json.loads(done.stdout.strip().splitlines()[-1]).items():
                found[name] = speed
    for name, speed in found.items():
        print(f"{name:40} {speed:8.1f} tokens/s {speed / found['base']:6.3f}")


if __name__ == "__main__":
    main()
