"""Hub ids in place of folders."""

import os
import subprocess
import sys
from pathlib import Path

SERVED = """
import json, sys
from pathlib import Path
from engines import ask, check, running, several

engine, requests = several("me/base", {"me/gate": "me/gate"})
for engine, request in ((running("me/gate"), None), (engine, requests["me/gate"])):
    items = json.loads(Path(sys.argv[1]).read_text())
    with engine as engine:
        check(items, ask(engine, [(item, request) for item in items]))
"""


def test_hub_ids_of_adapter_and_base(workshop, tmp_path):
    """From the Hub's cache, which is read once at import: in a process of its own."""
    folders = {"base": workshop.base(), "gate": workshop.adapter("gate")}
    for name, folder in folders.items():
        repository = tmp_path / "hub" / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", SERVED, folders["gate"] / "reference.json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
