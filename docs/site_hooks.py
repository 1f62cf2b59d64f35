"""Links of docs/ that leave it, for the site: `../examples/x.py` is a file of the repository, not a page."""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
OUTWARD = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """`[text](../path)` as a link to the file at `repo_url` of mkdocs.yml; without a `repo_url`, as its text.

    Raises:
        PluginError: the file is not there.
    """

    def outward(found: re.Match) -> str:
        path = os.path.normpath(os.path.join("docs", found[2]))
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path}: {found[2]} is not there")
        if not config.repo_url:
            return found[1]
        return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{path}{found[3] or ''})"

    return OUTWARD.sub(outward, markdown)
