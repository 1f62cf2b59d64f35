"""The commands: arguments -> result. A docstring is the text of --help; the library is imported when one runs."""

import argparse
from pathlib import Path
from typing import Any


def inspect_command(args: argparse.Namespace) -> dict[str, Any]:
    """Say what is in an adapter.

    For which base it is, how tokens reach its experts, and what it holds, layer by
    layer with the source experts; in a folder, which tensors hold NaN or infinity.
    Never reads a base; of a repository on the Hub only headers, a few kilobytes.

    examples:
      moextend inspect outputs/adapter
      moextend inspect me/my-adapter --revision v2 --tensors
      moextend inspect me/my-adapter --json
    """
    from modeling_moextend.tools.inspection import inspect_adapter

    return inspect_adapter(args.adapter, **hub_options(args))


def verify_command(args: argparse.Namespace) -> dict[str, Any]:
    """Check an adapter against its base.

    Loads the base, and checks
      file    it is whole: the checksum of its tensors
      finite  no tensor holds NaN or infinity
      base    the base is the one it was made on: its fingerprint
      fit     names and shapes are what base and config ask for
      off     with the adapter off, logits are the base's, bit for bit
      sample  a greedy answer with the adapter: its logits are finite
    and prints the answer of base and adapter. What a failed check makes void is left out.

    examples:
      moextend verify outputs/adapter
      moextend verify me/my-adapter --base /data/mixtral --prompt "What is a monad?"
    """
    from modeling_moextend.tools.verification import verify_adapter

    names = ("base", "encoder", "prompt", "image", "audio", "max_new_tokens", "dtype")
    return verify_adapter(args.adapter, **{name: getattr(args, name) for name in names}, **hub_options(args))


def diff_command(args: argparse.Namespace) -> dict[str, Any]:
    """Compare two adapters.

    Entries of the config, tensors that one of them lacks, and for tensors in both the
    largest difference and the norm of the difference relative to the first one's.
    Reads both adapters whole, and never a base.

    examples:
      moextend diff outputs/checkpoint-100 outputs/checkpoint-200
      moextend diff me/my-adapter outputs/adapter --json
    """
    from modeling_moextend.tools.inspection import diff_adapters

    return diff_adapters(args.adapter, args.other)


def merge_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter into one new folder.

    A standalone checkpoint: the adapter's folder, with base and encoder in subfolders.
    It loads with trust_remote_code=True and needs nothing from elsewhere.

    With --native: the base's own architecture with more experts a layer, which loads
    without code of ours. It exists where it gives the same answers (up to rounding):
    every MoE layer extended by the same number, scope "all", selection "compete",
    calibration "none", no encoder, and a base whose router allows it. Elsewhere every
    condition that fails is named.

    A folder holds one adapter. One that was trained on top of others is refused, for it
    was not trained to answer without them.

    Needs memory for the adapter and about one file of the base (with --native: and the one
    that is written), not for the base. The folder appears whole or not at all.

    examples:
      moextend merge me/my-adapter outputs/standalone
      moextend merge outputs/adapter outputs/more-experts --native --max-shard-size 2GB
    """
    from modeling_moextend.tools.merge import merge

    names = ("base", "encoder", "native", "check_base", "check_trained_on", "max_shard_size")
    return merge(args.adapter, args.output, **{name: getattr(args, name) for name in names}, **hub_options(args))


def compress_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter anew with new experts of a low rank.

    Of each new expert the new adapter holds the difference to its source expert, cut to
    the nearest one of that rank (a truncated singular value decomposition), and nothing
    else changes. Says for each layer how much of the difference was lost: the norm of
    the error relative to it (Frobenius), and the largest error of a weight.

    Of the base only the source experts are read, one weight of a layer at a time. An
    adapter that has a rank already has to have a higher one. The folder appears whole or
    not at all.

    The card (README.md) stays behind, for its sizes are those of before: publishing
    writes a new one.

    An adapter that was trained on top of this one does not know the new one by its
    fingerprint: load it with the old one, or with check_trained_on=False.

    examples:
      moextend compress outputs/adapter outputs/small --rank 32
      moextend compress me/my-adapter outputs/small --rank 64 --base /data/mixtral
    """
    from modeling_moextend.tools.compression import compress

    names = ("rank", "base", "check_base")
    return compress(args.adapter, args.output, **{name: getattr(args, name) for name in names}, **hub_options(args))


def plan_command(args: argparse.Namespace) -> dict[str, Any]:
    """Say what a training run would take, before a GPU is paid.

    From the base's config alone: new parameters, bytes of the adapter, memory and
    operations of a step, and hours, for new experts, for LoRA (rank 16, attention and
    experts) and for full fine-tuning, on each GPU under DDP and FSDP2.

    Parameters and bytes are exact. Memory and operations come from the sizes of the
    layers, with every token using new experts, and lie within a tenth of small runs
    that were measured; what the driver and gaps take is not in them, so a GPU counts
    as full at 92%. Hours stand on --tflops, what a GPU really reaches. The loss that
    keeps the base's text (scope gate) is not in them.

    The layers that get new experts are found by stage extend; here they are the upper
    ones, which cost least: below the lowest of them nothing is computed backward.

    examples:
      moextend plan --base mistralai/Mixtral-8x7B-Instruct-v0.1 --new-experts 1 --gpus 8
      moextend plan --base config.json --expert-rank 64 --gpus 2 --gpu-memory 24GB
      moextend plan --base Qwen/Qwen3-30B-A3B --layers 24-47 --tokens 5e8 --json
    """
    from modeling_moextend.training.planning import plan_training

    names = ("layers", "fraction", "new_experts", "expert_rank", "scope", "deltas", "sequence", "batch", "gpus")
    names += ("checkpointing", "gpu_memory", "tokens", "dtype")
    options = {name: getattr(args, name) for name in names} | given(args, "tflops") | hub_options(args)
    return plan_training(args.base, **options)


def push_command(args: argparse.Namespace) -> dict[str, Any]:
    """Publish an adapter's folder on the Hub.

    One commit of exactly the files that make an adapter: weights, config, code,
    processor, card. The adapter is read and checked first. The token is that of
    `hf auth login`, or HF_TOKEN.

    A damaged adapter is not published, and neither is one whose base or encoder is a path
    on this machine: --base and --encoder say where they lie on the Hub, and that is
    written into the adapter. Nothing else in the folder (checkpoints, optimiser states,
    pickled arguments) is uploaded. The card is filled from the adapter, the trainer's
    card.json, the picture of the router shift and --report; a README.md of your own goes
    up as it is, unless an option for the card is given.

    examples:
      moextend push outputs/adapter me/my-adapter --private
      moextend push outputs/adapter me/my-adapter --revision v2 --base me/the-base
      moextend push outputs/adapter me/my-adapter --report report --license mit --dry-run
    """
    from modeling_moextend.publishing.hub import publish_folder

    folder = Path(args.adapter)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    if args.report is not None and not Path(args.report, "report.json").is_file():
        raise FileNotFoundError(f"{args.report}: no report there. `moextend evaluate` writes one.")
    if args.shift is not None and not Path(args.shift).is_file():
        raise FileNotFoundError(f"{args.shift}: no such picture.")
    options = {name: getattr(args, name) for name in ("base", "encoder", "report", "shift", "revision", "dry_run")}
    card = {name: value for name in ("license", "language", "datasets") if (value := getattr(args, name))}
    commit = publish_folder(folder, args.repo_id, private=args.private or None, card=card, **options)
    if args.dry_run:
        return {"repo_id": args.repo_id, "files": commit}
    return {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url}


def train_command(args: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter by a recipe: align, extend, finetune.

    A recipe is a flat YAML file of options. Options on the command line win over it;
    unknown ones are an error. Those that ship: easy_vqa, spoken_words,
    mixtral_8x7b_clip_l, mixtral_8x7b_whisper_large, qwen3_30b_a3b_siglip2,
    qwen3_30b_a3b_text. Several processes: `accelerate launch -m moextend_cli train ...`.

    Ctrl-C ends with one line: where it stopped, and how to go on.

    examples:
      moextend train --config easy_vqa
      moextend train --config my_recipe.yaml --max-steps 200 --output-dir outputs/try
      moextend train --config easy_vqa --stages finetune --adapter outputs/aligned --plan plan.json
    """
    from modeling_moextend.training.recipes import train

    return train([word for word in args.given if word != "--json"])


def evaluate_command(args: argparse.Namespace) -> dict[str, Any]:
    """Measure an adapter: what it learned, what its base lost.

    Writes a report folder: JSON, Markdown, pictures and a model card.

    --text holds what the base knew: JSON lines {"domain", "text"}, or "messages" in place
    of "text". --questions holds the new task: JSON (lines) with "messages", the last one
    being the reference answer, or LLaVA JSON. With scope "gate" both are also measured
    over --thresholds of the gate; the adapter itself is not changed.

    examples:
      moextend evaluate outputs/adapter --text held_out.jsonl --questions new_task.jsonl
      moextend evaluate me/my-adapter --text held_out.jsonl --compare other/report --output report
    """
    from modeling_moextend.evaluation.folder import report_adapter

    names = ("questions", "output", "base", "encoder", "image_folder", "max_questions", "thresholds", "compare")
    names += ("title", "dtype", "max_length", "batch_size")
    options = {name: getattr(args, name) for name in names} | given(args, "metric", "max_new_tokens")
    return report_adapter(args.adapter, args.text, **options)


def report_command(args: argparse.Namespace) -> dict[str, Any]:
    """Show reports side by side.

    Reads what `moextend evaluate` or a ReportCallback wrote; nothing is measured anew.

    examples:
      moextend report report
      moextend report mine/report other/report --picture frontier.svg
    """
    from modeling_moextend.evaluation.folder import compare_reports

    return compare_reports(args.folders, args.picture)


def quickstart_command(args: argparse.Namespace) -> dict[str, Any]:
    """Teach a small pretrained MoE to see, in a few minutes on a CPU.

    easy-VQA (pip install easy-vqa) -> align -> extend -> finetune -> save -> answer in a
    fresh process. By default the base and the encoder of this repository, so run it from a
    checkout; any of base, encoder and data can be another folder or Hub id. Writes the
    adapter, the picture of stage extend, results.json and a model card to --output-dir,
    and prints a table. The options are those of the recipe easy_vqa, and a few.

    examples:
      moextend quickstart --output-dir outputs/try
      moextend quickstart --paper true --output-dir outputs/paper
    """
    from modeling_moextend.quickstart import quickstart

    return quickstart([word for word in args.given if word != "--json"])


def chat_command(args: argparse.Namespace) -> dict[str, Any]:
    """Talk to an adapter in the terminal.

    Answers come word by word. After each it is said which of its tokens used new experts,
    marked by colour, or by [brackets] where there is none. /off lets the base answer alone,
    /on brings the adapter back, /adapter NAME switches to another one, /image FILE and
    /audio FILE show an image and play a clip with the next message, /help names the rest.
    Ctrl-C ends an answer.

    examples:
      moextend chat assets/numbers
      moextend chat me/my-adapter --temperature 0.7 --max-new-tokens 500
    """
    from modeling_moextend.chat import Chat
    from modeling_moextend.evaluation.folder import load_adapter

    from .chat import Conversation

    model, processor = load_adapter(args.adapter, args.base, args.encoder, args.dtype)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature")}
    Conversation(Chat(model, processor, **options)).run()
    return {}


def demo_command(args: argparse.Namespace) -> dict[str, Any]:
    """Show base and adapter side by side in a browser.

    Needs gradio: pip install 'moextend[demo]'. The page asks both the same question, with
    an image where the adapter sees and a clip where it hears, and marks which tokens used
    new experts. As a Hugging Face Space: modeling_moextend/chat/demo.py is its app.py.

    examples:
      moextend demo assets/numbers
      moextend demo me/my-adapter --port 8000
    """
    from modeling_moextend.chat.demo import launch

    names = ("base", "encoder", "dtype", "port", "share", "max_new_tokens", "temperature")
    launch(args.adapter, **{name: getattr(args, name) for name in names})
    return {}


def completion_command(args: argparse.Namespace) -> dict[str, Any]:
    """Print what lets a shell complete commands and options.

    Needs argcomplete: pip install 'moextend[completion]'.

    examples:
      moextend completion bash >> ~/.bashrc
      moextend completion fish > ~/.config/fish/completions/moextend.fish
    """
    try:
        from argcomplete import shellcode
    except ImportError as error:
        raise ImportError("Shell completion needs argcomplete: pip install 'moextend[completion]'.") from error

    return {"shell": args.shell, "code": shellcode(["moextend"], shell=args.shell)}


def hub_options(args: argparse.Namespace) -> dict[str, str]:
    """The keywords for the Hub that the arguments name."""
    return given(args, "revision", "subfolder", "cache_dir")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments `names` that were given; the library has the defaults of the others."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
