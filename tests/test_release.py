"""What PyPI gets: .ci/release.py."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)
ADDRESS = "https://example.org/me/moextend"


def test_links_lead_into_the_repository():
    text = "[![L](https://a/b.svg)](LICENSE) ![p](docs/images/idea.svg) [c](docs/faq.md#x) [h](#here) [w](https://a/b)"
    assert release.absolute_links(text, ADDRESS, "v1") == (
        f"[![L](https://a/b.svg)]({ADDRESS}/blob/v1/LICENSE) ![p]({ADDRESS}/raw/v1/docs/images/idea.png) "
        f"[c]({ADDRESS}/blob/v1/docs/faq.md#x) [h](#here) [w](https://a/b)"
    )
    with pytest.raises(ValueError, match="links to no/such.md, which is not there"):
        release.absolute_links("[x](no/such.md)", ADDRESS, "v1")


def test_what_names_the_repository_is_written_into_a_copy(tmp_path):
    for name in ("README.md", "setup.cfg", "CITATION.cff", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    release.name_repository(tmp_path, ADDRESS)
    readme = (tmp_path / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", readme, flags=re.DOTALL))
    assert len(links) > 30 and all(link.startswith("https://") for link in links)
    setup = (tmp_path / "setup.cfg").read_text()
    assert f"    Changelog = {ADDRESS}/blob/v" in setup and "    Paper = " in setup
    assert f"repo_url: {ADDRESS}" in (tmp_path / "mkdocs.yml").read_text()
    assert ADDRESS not in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the archive is made of a commit")
def test_wheel_and_archive(tmp_path):
    """The wheel says where things are and brings the recipes; the archive's own tests run in it."""
    command = [sys.executable, ROOT / ".ci" / "release.py", ADDRESS, "--output", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = message_from_bytes(file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))))
    assert {address.partition(", ")[0] for address in metadata.get_all("Project-URL")} >= {
        "Repository",
        "Documentation",
        "Changelog",
    }
    assert "![A router" in metadata.get_payload() and f"{ADDRESS}/raw/v" in metadata.get_payload()
    assert "modeling_moextend/training/recipe_files/easy_vqa.yaml" in names
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    tests = ["tests/test_routing_moextend.py", "tests/test_ready_adapter.py", "tests/test_metrics.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
