"""Pushes an adapter folder to the Hub as one commit: adapter, config, shipped code, processor, model card.

    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --private
    python examples/publish.py --adapter outputs/easy-vqa/adapter --repo_id me/my-adapter --dry_run

The folder is read and checked first: a damaged adapter is not published. Nothing else in it (checkpoints, optimiser
states, pickled arguments) is uploaded.
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi

from modeling_moextend import MoExtendConfig, create_card
from modeling_moextend.adapter_moextend import check_tensors, read_adapter

PUBLISHED = ["config.json", "moextend_adapter*", "*_moextend.py", "README.md", "*.png"]
PUBLISHED += ["tokenizer*", "special_tokens_map.json", "*processor_config.json", "chat_template*", "*.jinja"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder that save_pretrained or the trainer wrote")
    parser.add_argument("--repo_id", required=True, help="e.g. me/my-adapter")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, and stop")
    args = parser.parse_args()

    values, tensors, metadata = read_adapter(args.adapter)
    check_tensors(tensors, tensors, metadata)
    card = Path(args.adapter, "README.md")
    if not card.exists():
        size = sum(tensor.nbytes for tensor in tensors.values())
        create_card(MoExtendConfig.from_dict(values), repo_id=args.repo_id, adapter_bytes=size).save(card)
    files = sorted({path.name for pattern in PUBLISHED for path in Path(args.adapter).glob(pattern)})
    print("\n".join(files))
    if args.dry_run:
        return
    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=args.adapter,
        allow_patterns=files,
        delete_patterns="moextend_adapter*",
        commit_message="Upload MoExtend adapter",
        revision=args.revision,
    )
    print(f"Published: {commit}")


if __name__ == "__main__":
    main()
