#!/usr/bin/env python3
"""Builds what goes to PyPI, of the last commit: wheel and source archive in dist/.

    .ci/release.py https://example.org/me/moextend

Links and pictures of README.md are relative, as a checkout wants them; PyPI shows README.md alone. So in the copy that
is built they lead to the files of this version in the repository, and what else has to name the repository does: the
metadata's addresses, CITATION.cff, and mkdocs.yml (`make docs` in the unpacked archive builds the site to publish).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELATIVE = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Markdown whose relative links lead to files of `repository` at `tag`; of pictures to the PNG, which PyPI shows.

    Raises:
        ValueError: a file is not there.
    """

    def absolute(found: re.Match) -> str:
        path = found[1].replace(".svg", ".png")
        if not (ROOT / path).exists():
            raise ValueError(f"README.md links to {path}, which is not there.")
        return f"]({repository}/{'raw' if path.endswith('.png') else 'blob'}/{tag}/{path}{found[2] or ''})"

    return RELATIVE.sub(absolute, text)


def name_repository(folder: Path, repository: str, docs: str | None = None) -> None:
    """Writes the repository's address into the files of a copy of the repository."""
    setup = (folder / "setup.cfg").read_text(encoding="utf-8")
    tag = "v" + re.search(r"^version = (.+)$", setup, re.MULTILINE)[1]
    addresses = {
        "Repository": repository,
        "Documentation": docs or f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
    }
    lines = "".join(f"    {name} = {address}\n" for name, address in addresses.items())
    changes = {
        "README.md": lambda text: absolute_links(text, repository, tag),
        "setup.cfg": lambda text: text.replace("project_urls =\n", f"project_urls =\n{lines}"),
        "CITATION.cff": lambda text: f"{text}repository-code: {repository}\n",
        "mkdocs.yml": lambda text: f"{text}repo_url: {repository}\n",
    }
    for name, change in changes.items():
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(change(text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="its address, as a browser opens it")
    parser.add_argument("--docs", help="address of the site of docs/ (default: the folder in the repository)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist/")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        name_repository(Path(folder), args.repository.rstrip("/"), args.docs)
        subprocess.run([sys.executable, "-c", BUILD, str(args.output.resolve())], cwd=folder, check=True)


if __name__ == "__main__":
    main()
