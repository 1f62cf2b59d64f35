"""What may not be installed beside vLLM for CPUs."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_a_package_that_was_built_for_another_torch_is_taken_out(name, tmp_path):
    """vLLM's wheel for CPUs asks for it, and transformers imports what is there: nothing here could be collected."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    metadata = tmp_path / f"{name}-0.99.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.99")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import bases"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True).returncode
    assert find_spec(name) is None
    assert name in re.search(r"pip uninstall --yes (.*)", MAKEFILE.read_text())[1].split()
