"""Walks a fresh machine through README, from its first line to its last, and says how long each step took.

    python tests/walk.py              # everything is downloaded anew, as for a newcomer
    python tests/walk.py --offline    # packages are this interpreter's: what the slow tests do

In a new folder with the repository's files and a new virtual environment, every shell and Python snippet is run as it
stands, in its order, each in a process of its own. Those that README marks as not run here are named.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from test_repository import tracked_files
from test_snippets import ROOT, snippets_of

OFFLINE = {  # pip as it is called in README, without an index
    "PIP_NO_INDEX": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as --no-build-isolation
    "HF_HUB_OFFLINE": "1",
}


def fresh_machine(folder, offline=False):
    """(checkout, environment): the repository's files, and the variables of a shell in a new virtual environment."""
    checkout = folder / "moextend"
    for path in tracked_files():
        target = checkout / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder / "venv")}
    if offline:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([programs / "python", "-c", code], capture_output=True, text=True, check=True)
        site = Path(found.stdout.strip())
        for old in (*site.glob("setuptools*"), site / "_distutils_hack"):  # those that come with venv build no wheel
            shutil.rmtree(old, ignore_errors=True)
        lines = [path for path in sys.path if path.endswith("-packages")] or [sysconfig.get_path("purelib")]
        (site / "dependencies.pth").write_text("\n".join(lines))
        variables |= OFFLINE
    return checkout, variables


def walk(folder, offline=False):
    """Yields (snippet, seconds or `None` where it is not run, what it printed).

    Raises:
        RuntimeError: a snippet failed; with the end of what it printed.
    """
    checkout, variables = fresh_machine(Path(folder), offline)
    for snippet in snippets_of("README.md"):
        if not snippet.runs:
            yield snippet, None, snippet.title
            continue
        start = time.time()
        command = {"bash": ["bash", "-euc"], "python": ["python", "-c"]}[snippet.language]
        done = subprocess.run([*command, snippet.code], cwd=checkout, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{snippet} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        yield snippet, time.time() - start, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="with the packages of this interpreter")
    args = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        for snippet, seconds, printed in walk(folder, args.offline):
            print(f"{snippet}  {'not run' if seconds is None else f'{seconds:.0f} s'}", flush=True)
            print("    " + "\n    ".join(printed.strip().splitlines()[-4:]))
    print(f"README from its first line to its last: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
