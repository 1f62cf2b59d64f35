"""Tests of serving run in an environment of their own (`make test-serving`); where vLLM is missing, none is collected."""

import gc
import importlib.util
import os
from contextlib import contextmanager

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its errors are ours
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.pop("OMP_NUM_THREADS", None)  # vLLM sets its own
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]

if not collect_ignore_glob:
    import pytest
    import torch
    from bases import NEW_TOKENS, Workshop

    OPTIONS = {"max_model_len": 256, "block_size": 32, "enforce_eager": True, "distributed_executor_backend": "uni"}
    OPTIONS |= {"disable_log_stats": True, "dtype": "float32", "seed": 0}

    @pytest.fixture(scope="session")
    def workshop(tmp_path_factory):
        return Workshop(tmp_path_factory.mktemp("serving"))

    @contextmanager
    def running(model, **options):
        """An engine, ended with the block."""
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        engine = None
        try:
            engine = LLM(str(model), **OPTIONS | options)
            yield engine
        finally:
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()
            torch.set_num_threads(max(1, torch.get_num_threads()))

    def several(base, adapters, **options):
        """`running` with `adapters` (name -> folder) on one base; and name -> what a request names it by."""
        from vllm.lora.request import LoRARequest

        requests = {name: LoRARequest(name, k, str(folder)) for k, (name, folder) in enumerate(adapters.items(), 1)}
        architecture = options.pop("architecture", "MixtralForCausalLM")
        overrides = {"architectures": [f"MoExtend{architecture}"]}
        overrides |= {"moextend_adapters": [str(folder) for folder in adapters.values()]}
        given = {"hf_overrides": overrides, "enable_lora": True, "max_loras": len(adapters), **options}
        return running(base, **given), requests

    def ask(engine, jobs):
        """Answers to `jobs`, a list of (reference item, request of an adapter or `None`), all given at once."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=0)
        inputs = [{"prompt_token_ids": item["ids"]} for item, _ in jobs]
        return engine.generate(inputs, greedy, lora_request=[request for _, request in jobs], use_tqdm=False)

    def check(items, outputs, tolerance=2e-5):
        """The served tokens are those of the reference, and their log-probabilities are as near as float32 allows."""
        for number, (item, output) in enumerate(zip(items, outputs, strict=True)):
            found = output.outputs[0]
            assert list(found.token_ids) == item["new"], f"prompt {number}"
            logprobs = [one[token].logprob for one, token in zip(found.logprobs, found.token_ids, strict=True)]
            assert logprobs == pytest.approx(item["logprobs"], abs=tolerance), f"prompt {number}"
