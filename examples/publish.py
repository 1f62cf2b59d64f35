"""Pushes an adapter folder to the Hub as one commit: adapter, config, shipped code, processor, model card.

    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --private
    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --report report --dry_run

The folder is read and checked first: a damaged adapter is not published. Nothing else in it (checkpoints, optimiser
states, pickled arguments) is uploaded.
"""

import argparse
import shutil
from pathlib import Path

from modeling_moextend import MoExtendConfig
from modeling_moextend.adapter_moextend import check_tensors, read_adapter
from modeling_moextend.hub_moextend import PUBLISHED, upload, write_card


def add_report(report, folder):
    """Copies a report's model card and pictures into the adapter's folder."""
    if not (report / "model_card.md").exists():
        raise SystemExit(f"--report {report}: no model_card.md there; write one with examples/evaluate.py")
    shutil.copyfile(report / "model_card.md", folder / "README.md")
    for picture in report.glob("*.png"):
        shutil.copyfile(picture, folder / picture.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder that save_pretrained or the trainer wrote")
    parser.add_argument("--repo_id", required=True, help="e.g. me/my-adapter")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--report", help="report folder of evaluate.py: its card and pictures go along")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, and stop")
    args = parser.parse_args()

    folder = Path(args.adapter)
    if not folder.is_dir():
        parser.error(f"--adapter {args.adapter}: no such folder")
    values, tensors, metadata = read_adapter(args.adapter)
    check_tensors(tensors, tensors, metadata)  # against its own header: is the file whole?
    config = MoExtendConfig.from_dict(values)
    for role in ("base_model", "encoder"):
        where = getattr(config, f"{role}_name_or_path")
        if where is not None and Path(where).exists():
            print(f"Note: the {role.split('_')[0]} is {where}, a local folder; others need it too, or one on the Hub.")
    if args.report:
        add_report(Path(args.report), folder)
    files = {path.name for pattern in PUBLISHED for path in folder.glob(pattern)} | {"README.md"}
    print("\n".join(sorted(files)))
    if args.dry_run:
        return
    if not (folder / "README.md").exists():
        write_card(folder, config, args.repo_id, sum(tensor.numel() for tensor in tensors.values()))
    print(f"Published: {upload(folder, args.repo_id, private=args.private or None, revision=args.revision)}")


if __name__ == "__main__":
    main()
