"""A newcomer's way through README, the notebooks, and the site: each as it stands."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_snippets import LINKED, snippets_of
from walk import walk

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def test_readme_works_from_its_first_line_to_its_last(tmp_path):
    steps = list(walk(tmp_path, offline=True))
    assert [snippet for snippet, *_ in steps] == snippets_of("README.md")
    ran = [(snippet.language, seconds) for snippet, seconds, _ in steps if seconds is not None]
    assert [language for language, _ in ran].count("python") >= 2 and ("bash", ran[0][1]) == ran[0]
    print(*(f"{snippet} {seconds}" for snippet, seconds, _ in steps), sep="\n")
    printed = "\n".join(printed for *_, printed in steps)
    assert "one thousand nine hundred eighty-four" in printed  # what the reader is promised


@pytest.mark.parametrize(
    ("name", "promised"),
    [("text_task.ipynb", "texts with every logit bit-equal: 100%"), ("seeing.ipynb", "True")],
)
def test_notebooks_run_from_top_to_bottom(name, promised, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000000")  # as in the Makefile: activations stay in the process
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "2000000000")
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder)
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    assert any(promised in text for text in texts)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING -" not in done.stderr
    page = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "MoExtendForCausalLM" in page and "retention_tokens" in page
