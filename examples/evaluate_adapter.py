"""Writes a report on an adapter: what it learned, what its base lost. JSON, Markdown, pictures and a model card.

    python examples/evaluate_adapter.py --adapter outputs/x --text assets/tiny-moe/held_out.jsonl --output report
    python examples/evaluate_adapter.py --adapter outputs/x --text assets/tiny-moe/held_out.jsonl \
        --questions new_task.jsonl --compare other/report another/report --output report

The options are those of `moextend evaluate`, and so is the code.
"""

import sys

from moextend_cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
