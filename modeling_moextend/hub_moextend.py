"""Publishing: which files of a folder make an adapter, and one commit of exactly these."""

import importlib

from huggingface_hub import HfApi

PUBLISHED = [  # patterns of the files that make a published adapter
    "config.json",
    "moextend_adapter*.safetensors",
    "moextend_adapter*.safetensors.index.json",
    "*_moextend.py",
    "README.md",
    "*processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.png",  # figures of the card
]


PUSH_KWARGS = ("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description")
IGNORED_KWARGS = (  # what transformers' own save_pretrained takes and an adapter has no use for
    "state_dict",
    "save_function",
    "safe_serialization",
    "variant",
    "save_peft_format",
    "save_original_format",
)


def check_save_kwargs(names):
    """Refuses what `save_pretrained` does not know: a misspelled option would be lost without a word."""
    unknown = sorted(set(names) - {*PUSH_KWARGS, *IGNORED_KWARGS})
    if unknown:
        raise TypeError(f"save_pretrained() got unexpected keyword arguments: {', '.join(unknown)}.")


def upload(
    folder,
    repo_id,
    *,
    token=None,
    private=None,
    revision=None,
    create_pr=False,
    commit_message="Upload MoExtend adapter",
    commit_description=None,
    make_card=None,
):
    """One commit of the adapter's files, and of nothing else that lies in `folder` (a `Path`).

    `make_card` is called to write README.md where the repository has none: somebody may have written it by hand.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if make_card is not None and not api.file_exists(repo_id, "README.md", revision=revision):
        make_card()
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        allow_patterns=PUBLISHED,
        ignore_patterns="*/*",
        delete_patterns="moextend_adapter*",
    )


def write_card(folder, config, repo_id, num_parameters):
    """README.md, where `card.py` and its template language are at hand: neither comes with the shipped code."""
    try:
        card = importlib.import_module(".card", __package__).create_card(
            config,
            repo_id=repo_id,
            adapter_bytes=sum(file.stat().st_size for file in folder.glob("moextend_adapter*.safetensors")),
            num_parameters=num_parameters,
        )
    except ImportError:
        return
    card.save(folder / "README.md")
