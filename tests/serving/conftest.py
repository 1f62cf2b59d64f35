"""Tests of serving have an environment of their own (`make test-serving`); where vLLM is missing, none is there."""

import importlib.util
import os

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
    from bases import Workshop

    @pytest.fixture(scope="session")
    def workshop(tmp_path_factory):
        return Workshop(tmp_path_factory.mktemp("serving"))
