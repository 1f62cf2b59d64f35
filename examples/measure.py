"""What readers that can't see get on questions about images: always the commonest answer, or that to each question.

python examples/measure.py --train outputs/easy-vqa/train.json --questions outputs/easy-vqa/test.json
"""

import argparse
import json

from modeling_moextend.quickstart.measure import blind_readers, read_questions

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="LLaVA JSON file the readers know")
    parser.add_argument("--questions", required=True, help="LLaVA JSON file with what is asked")
    arguments = parser.parse_args()
    known, asked = read_questions(arguments.train, split="train"), read_questions(arguments.questions)
    print(json.dumps(blind_readers(known, asked), indent=2))
