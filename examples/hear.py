"""Teaches a small pretrained MoE to hear: spoken digits -> align -> extend -> finetune -> save -> answer elsewhere.

    apt-get install espeak-ng                         # makes the speech: clips are not part of this repository
    python examples/hear.py
    python examples/hear.py --paper true              # the paper's routing, one new expert a layer

The options are those of configuration/recipes/spoken_words.yaml, and the few of `moextend quickstart`, whose code this
is with another task: what is said, how many words, and who speaks, by voices that neither encoder nor adapter has
heard. "Silenced" is a second of silence in place of each clip, whose length would tell
something as well. Writes the adapter, the picture of stage extend, results.json and a model card to --output_dir, and
prints the table.
"""

import sys
from pathlib import Path

import spoken_words_data

from modeling_moextend.quickstart.run import Task, quickstart
from modeling_moextend.tools.interrupts import run_script

SPOKEN_WORDS = Task(
    "spoken_words",
    Path("outputs/spoken-words"),
    spoken_words_data.write,
    "Questions about speech by held-out voices (exact match)",
    "trained, audio silenced",
)

if __name__ == "__main__":
    run_script(lambda: quickstart(sys.argv[1:], SPOKEN_WORDS))
