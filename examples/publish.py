"""Pushes an adapter folder to the Hub as one commit: adapter, config, shipped code, processor, model card.

    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --private
    python examples/publish.py --adapter outputs/x --repo_id me/x --report report --license mit --datasets me/questions
    python examples/publish.py --adapter outputs/x --repo_id me/x --base me/the-base --dry_run

The options are those of `moextend push`, and so is the code.
"""

import sys

from moextend_cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
