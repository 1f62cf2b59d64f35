"""Engines of vLLM, what they are asked, and whether they answer as `generate` does."""

import gc
from contextlib import contextmanager

import pytest
from bases import NEW_TOKENS
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

OPTIONS = {"max_model_len": 256, "block_size": 32, "enforce_eager": True, "distributed_executor_backend": "uni"}
OPTIONS |= {"disable_log_stats": True, "dtype": "float32", "seed": 0}


@contextmanager
def running(model, **options):
    """An engine, ended with the block."""
    engine = None
    try:
        engine = LLM(str(model), **OPTIONS | options)
        yield engine
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def several(base, adapters, **options):
    """`running` with `adapters` (name -> folder) on one base; and name -> what a request names it by."""
    requests = {name: LoRARequest(name, k, str(folder)) for k, (name, folder) in enumerate(adapters.items(), 1)}
    architecture = options.pop("architecture", "MixtralForCausalLM")
    overrides = {"architectures": [f"MoExtend{architecture}"]}
    overrides |= {"moextend_adapters": [str(folder) for folder in adapters.values()]}
    given = {"hf_overrides": overrides, "enable_lora": True, "max_loras": len(adapters), **options}
    return running(base, **given), requests


def ask(engine, jobs):
    """Answers to `jobs`, a list of (reference item or prompt, request of an adapter or `None`), all given at once."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=0)
    inputs = [{"prompt_token_ids": item["ids"]} if "ids" in item else item for item, _ in jobs]
    return engine.generate(inputs, greedy, lora_request=[request for _, request in jobs], use_tqdm=False)


def check(items, outputs, tolerance=2e-5):
    """The served tokens are those of the reference. Their log-probabilities are as near as float32 allows where other
    kernels sum in another order; what routes one token otherwise moves them by a hundredth or more."""
    for number, (item, output) in enumerate(zip(items, outputs, strict=True)):
        found = output.outputs[0]
        assert list(found.token_ids) == item["new"], f"prompt {number}"
        logprobs = [one[token].logprob for one, token in zip(found.logprobs, found.token_ids, strict=True)]
        assert logprobs == pytest.approx(item["logprobs"], abs=tolerance), f"prompt {number}"
