"""Pushes an adapter folder to the Hub as one commit: adapter, config, shipped code, processor, model card.

    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --private
    python examples/publish.py --adapter outputs/x --repo_id me/x --report report --license mit --datasets me/questions
    python examples/publish.py --adapter outputs/x --repo_id me/x --base me/the-base --dry_run

The folder is read and checked first: a damaged adapter is not published, and neither is one whose base or encoder is
a path on this machine. --base and --encoder say where they lie on the Hub; that is written into the adapter. Nothing
else in the folder (checkpoints, optimiser states, pickled arguments) is uploaded. The card is filled from the adapter,
the trainer's card.json, the picture of the router shift and --report; a README.md of your own goes up as it is, unless
an option for the card is given.
"""

import argparse

from modeling_moextend.publishing.hub import publish_folder
from modeling_moextend.tools.interrupts import run_script

CARD = ("license", "language", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder that save_pretrained or the trainer wrote")
    parser.add_argument("--repo_id", required=True, help="e.g. me/my-adapter")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--base", help="Hub id of the base, where the adapter names another place")
    parser.add_argument("--encoder", help="Hub id of the encoder, where the adapter names another place")
    parser.add_argument("--report", help="folder of evaluate_adapter.py: results, forgetting table and pictures")
    parser.add_argument("--shift", help="picture of the router shift; default: what stage extend left there")
    parser.add_argument("--license", help="of the adapter; default: the base's")
    parser.add_argument("--language", nargs="+", help="ISO 639 codes")
    parser.add_argument("--datasets", nargs="+", help="what it was trained on: Hub ids, or names of files")
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be uploaded, beside the card's pictures, and stop"
    )
    args = parser.parse_args()

    card = {name: value for name in CARD if (value := getattr(args, name))}
    names = ("base", "encoder", "report", "shift", "revision", "dry_run")
    options = {name: getattr(args, name) for name in names}
    try:
        done = publish_folder(args.adapter, args.repo_id, private=args.private or None, card=card, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{args.adapter}: {error}") from error
    print("\n".join(done) if args.dry_run else f"Published: {done}")


if __name__ == "__main__":
    run_script(main, "nothing was published; the same command begins anew")
