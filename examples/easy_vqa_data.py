"""Writes easy-VQA (pip package `easy-vqa`, 64x64 images of one coloured shape) as LLaVA JSON files.

    python examples/easy_vqa_data.py outputs/easy-vqa

captions.json: one caption an image, from the training split's own answers. train.json: questions of the training
split, as many yes/no questions as open ones. test.json: the test split, on other images.
"""

import argparse

from modeling_moextend.quickstart.easy_vqa_data import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write captions.json, train.json and test.json")
    print(f"Wrote {write(parser.parse_args().folder)}")
