"""Throughput in vLLM: a base, the same base with adapters, and with a LoRA of PEFT's, on the same requests.

    make test-serving                                   # sets up its environment
    .venv-serving/bin/python benchmarks/serving.py      # a random Mixtral of 90 million parameters, on one CPU core

Prints new tokens a second of each, the best of several rounds, and their ratio to the base's, with few and with many
requests at once. The engines live beside each other and take turns, and processor time is what counts: whatever else
the machine does slows all of them. A gate with the threshold 1e9 lets no token through; one with the median of its
margins as threshold lets half of the prompts' tokens through, the same ones with deltas and without.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
REQUESTS, PROMPT, NEW, ROUNDS = (16, 64), 64, 16, 6
SIZES = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "max_position_embeddings": 512}
SOURCES, ATTENTION = [1, 5, 0, 3], ["q_proj", "k_proj", "v_proj", "o_proj"]
BASE, BESIDE, LORA = "base", "base, served beside adapters", "PEFT LoRA, rank 16, attention"
CLOSED, HALF = "gate, no token routed", "gate, half of the tokens routed"
EXPERTS = "the same without deltas"
ANSWER = "seconds: "
ENGINES = {  # what each of them serves
    "base": [BASE],
    "adapters": [BESIDE, CLOSED, HALF],
    "experts": [EXPERTS],
    "lora": [LORA],
}


def prompts() -> list[list[int]]:
    """Token ids [most requests, PROMPT]."""
    import torch

    size = max(REQUESTS), PROMPT
    return torch.randint(3, SIZES["vocab_size"], size, generator=torch.Generator().manual_seed(1)).tolist()


def make(folder: Path) -> None:
    """The base, three adapters and a LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from modeling_moextend import MoExtendForCausalLM

    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).save_pretrained(folder / "base")
    layers, text = dict.fromkeys(range(1, 6), SOURCES), torch.tensor(prompts())
    for deltas, names in ((None, ("closed", "half")), ((), ("experts",))):
        model = MoExtendForCausalLM.from_base(folder / "base", layers, dtype="float32", deltas=deltas)
        torch.manual_seed(2)  # the same gate for all
        for name, tensor in model.adapter_tensors().items():
            if not name.startswith("layers."):
                torch.nn.init.normal_(tensor, std=0.1)
        with model.record_routing() as records, torch.no_grad():
            model(input_ids=text)
        median = float(torch.cat([record.gate for record in records.values() if record.margins]).median())
        for name in names:
            model.gate_threshold = 1e9 if name == "closed" else median
            model.save_pretrained(folder / name)
    lora = LoraConfig(r=16, target_modules=ATTENTION, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(MixtralForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "lora")


def serve(folder: Path, kind: str) -> None:
    """An engine of `ENGINES`: a number of requests and a name come in, the seconds go out that they take."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    options = {"max_model_len": 256, "block_size": 32, "enforce_eager": True, "skip_tokenizer_init": True}
    options |= {"dtype": "float32", "enable_prefix_caching": False, "distributed_executor_backend": "uni"}
    paths = {
        "base": {},
        "adapters": {CLOSED: folder / "closed", HALF: folder / "half"},
        "experts": {EXPERTS: folder / "experts"},
        "lora": {LORA: folder / "lora"},
    }
    if paths[kind]:
        options |= {"enable_lora": True, "max_loras": len(paths[kind])}
    if kind in ("adapters", "experts"):
        options["hf_overrides"] = {"architectures": ["MoExtendMixtralForCausalLM"]}
        options["hf_overrides"] |= {"moextend_adapters": [str(path) for path in paths[kind].values()]}
    if kind == "lora":
        # vLLM takes Triton's kernels for experts beside a LoRA, and a CPU has none. This one leaves experts alone.
        FusedMoEConfig.is_lora_enabled = property(lambda self: False, lambda self, value: None)
        options["lora_target_modules"] = ATTENTION
    requests = {name: LoRARequest(name, k, str(path)) for k, (name, path) in enumerate(paths[kind].items(), 1)}
    engine = LLM(str(folder / "base"), **options)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts()]
    for line in sys.stdin:
        count, _, name = line.strip().partition(" ")
        start = time.process_time()
        engine.generate(inputs[: int(count)], greedy, lora_request=requests.get(name), use_tqdm=False)
        print(f"{ANSWER}{time.process_time() - start}", flush=True)


def ask(engine: subprocess.Popen, count: int, name: str) -> float:
    """Seconds that an engine took for so many requests."""
    print(count, name, file=engine.stdin, flush=True)
    for line in engine.stdout:
        if line.startswith(ANSWER):
            return float(line.removeprefix(ANSWER))
    raise SystemExit(f"The engine of {name!r} has ended with exit code {engine.wait()}.")


def main() -> None:
    if len(sys.argv) > 1:
        return serve(Path(sys.argv[1]), sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        engines = {kind: subprocess.Popen([sys.executable, __file__, folder, kind], **pipes) for kind in ENGINES}
        try:
            names = {name: engines[kind] for kind, served in ENGINES.items() for name in served}
            jobs = [(count, name) for count in REQUESTS for name in names]
            for count, name in jobs:
                ask(names[name], count, name)  # the first time is slower
            best = dict.fromkeys(jobs, float("inf"))
            for _ in range(ROUNDS):
                best = {job: min(seconds, ask(names[job[1]], *job)) for job, seconds in best.items()}
        finally:
            for engine in engines.values():
                engine.terminate()
    for (count, name), seconds in best.items():
        speed, ratio = count * NEW / seconds, best[count, BASE] / seconds
        print(f"{count:3} requests  {name:35} {speed:8.1f} tokens/s {ratio:6.3f}")


if __name__ == "__main__":
    main()
