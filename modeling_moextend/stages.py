"""The three stages in a row: align, extend, finetune. What `examples/train.py` and the quickstart run."""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from .configuration_moextend import normalise_plan
from .extender import measure_router_shift, probe_config
from .llava import load_llava
from .modeling_moextend import MoExtendForCausalLM
from .processing_moextend import MoExtendProcessor, default_chat_template, with_image_parts
from .sft_trainer import MoExtendSFTTrainer

STAGES = ("align", "extend", "finetune")


@dataclass
class StagesConfig:
    """What to build and which stages to run; the trainer's own options (those of stage finetune) stand beside it."""

    base: str = field(metadata={"help": "Pretrained MoE causal LM: Hub id or folder. It is never changed."})
    data: str = field(metadata={"help": "LLaVA JSON or JSONL file, or a dataset (Hub id or folder) in TRL's format."})
    encoder: str | None = field(default=None, metadata={"help": "CLIP or SigLIP vision checkpoint; none: text only."})
    align_data: str | None = field(
        default=None, metadata={"help": "Image-caption pairs for stage align, like --data."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "What image paths in a LLaVA JSON start from."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as it goes, for files larger than memory."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Start from this adapter, e.g. one already aligned."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Which to run, in this order."})
    scope: str = field(default="all", metadata={"help": "Tokens that may use new experts: 'all' or 'modality'."})
    selection: str = field(default="compete", metadata={"help": "'compete' (the paper's) or 'exclusive'."})
    calibration: str = field(default="all", metadata={"help": "'all' (the paper's), 'routed' or 'none'."})
    new_experts: int = field(default=1, metadata={"help": "New experts a layer."})
    fraction: float = field(default=0.5, metadata={"help": "Share of MoE layers to extend: those that shift most."})
    layers: str | None = field(
        default=None,
        metadata={"help": "Instead of --fraction: 'all', 'first-half', 'second-half', 'interval', or '0,2,5'."},
    )
    plan: str | None = field(default=None, metadata={"help": "plan.json of an earlier stage extend, or JSON itself."})
    align_max_steps: int = field(default=-1, metadata={"help": "Steps of stage align; -1: one epoch."})
    align_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of stage align."})
    align_gradient_accumulation_steps: int = field(default=1, metadata={"help": "As in stage align's own trainer."})
    probe_max_steps: int = field(default=1000, metadata={"help": "Steps of stage extend's router probe."})
    probe_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the router probe."})
    probe_samples: int = field(default=10_000, metadata={"help": "Samples held out, on which experts are counted."})
    dtype: str = field(default="auto", metadata={"help": "The base's dtype; new tensors always train in float32."})
    device_map: str | None = field(default=None, metadata={"help": "The base's device map, e.g. 'auto'."})

    def __post_init__(self):
        wrong = [stage for stage in self.stages if stage not in STAGES]
        if wrong or self.stages != sorted(self.stages, key=STAGES.index) or not self.stages:
            raise ValueError(f"stages={self.stages} must be some of {list(STAGES)}, in this order.")
        if "align" in self.stages and (self.encoder is None or self.align_data is None):
            raise ValueError("Stage align needs --encoder and --align_data (image-caption pairs); or leave it out.")
        if self.stages == ["finetune"] and self.plan is None and self.adapter is None:
            raise ValueError("Stage finetune alone needs --plan, or an --adapter that has new experts.")


def load_data(name, config):
    """A training set: a LLaVA JSON(L) file read as it is, or any dataset in TRL's format (split "train").

    Raises:
        ValueError: a LLaVA sample with an image, and no encoder to see it.
    """
    if name.endswith((".json", ".jsonl")):
        data = load_llava(name, config.image_folder, streaming=config.streaming)
        if config.encoder is not None:
            return data
        return (data if config.streaming else data.with_format(None)).map(plain_text, remove_columns=["images", "id"])
    return datasets.load_dataset(name, split="train", streaming=config.streaming)


def plain_text(sample):
    """A sample without images: its messages' parts as strings, which text-only chat templates know."""
    if sample["images"]:
        raise ValueError(f"Sample {sample['id']} has an image, but there is no encoder: pass --encoder.")
    text = [
        {**message, "content": "".join(part["text"] for part in message["content"])} for message in sample["messages"]
    ]
    return {"messages": text}


def build_processor(config, assistant_only_loss=False):
    """The base's tokenizer, or with an encoder a `MoExtendProcessor`.

    The base's own chat format is kept, except where `assistant_only_loss` needs generation markers that it lacks: then
    LLaVA's format takes its place, and this is said.
    """
    if config.adapter is not None and config.encoder is not None:
        return MoExtendProcessor.from_pretrained(config.adapter)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.encoder is None:
        return tokenizer
    template = tokenizer.chat_template
    if template and assistant_only_loss and not re.search(r"{%-?\s*generation", template):
        print("The base's chat template does not mark the assistant's text: using LLaVA's (USER: ... ASSISTANT: ...).")
        template = default_chat_template()
    elif template and "image" not in template:
        template = with_image_parts(template)
    encoder_config = AutoConfig.from_pretrained(config.encoder)
    image_processor = AutoImageProcessor.from_pretrained(config.encoder, backend="pil")
    return MoExtendProcessor.from_encoder(tokenizer, image_processor, encoder_config, chat_template=template)


def build_model(config, processor):
    """The adapter to go on with; or the base with eyes; or, for a text-only extension, the base as it is."""
    options = {"dtype": config.dtype, "device_map": config.device_map}
    if config.adapter is not None:
        return MoExtendForCausalLM.from_pretrained(config.adapter, base=config.base, encoder=config.encoder, **options)
    if config.encoder is None:
        return AutoModelForCausalLM.from_pretrained(config.base, **options)
    return MoExtendForCausalLM.from_base(
        config.base, encoder=config.encoder, image_token_id=processor.image_token_id, **routing(config), **options
    )


def routing(config):
    """The routing choices, as `from_base` takes them."""
    return {name: getattr(config, name) for name in ("scope", "selection", "calibration")}


def with_experts(model, plan, config):
    """`model` with the plan's new experts."""
    if model.config.model_type != "moextend":
        return MoExtendForCausalLM.from_base(model, plan, **routing(config))
    model.extend(plan)
    return model


def read_plan(config):
    """`config.plan` (a file or JSON) as {layer: [source experts]}."""
    text = Path(config.plan).read_text(encoding="utf-8") if os.path.exists(config.plan) else config.plan
    return normalise_plan(json.loads(text))


def stage_args(args, folder, **values):
    """A copy of the trainer's options for another stage, writing to a folder of its own."""
    return replace(args, output_dir=os.path.join(args.output_dir, folder), **values)


def align(model, processor, config, args):
    """Stage 1: the projector learns from image-caption pairs."""
    options = {
        "stage": "align",
        "learning_rate": config.align_learning_rate,
        "max_steps": config.align_max_steps,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": config.align_gradient_accumulation_steps,
        "eval_strategy": "no",
    }
    args = stage_args(args, "align", **options)
    data = load_data(config.align_data, config)
    trainer = MoExtendSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.save_model(args.output_dir)


def extend(model, processor, data, held_out, config, args):
    """Stage 2: finds the layers that react and the experts to copy; writes shift.json, shift.png and plan.json."""
    folder = Path(args.output_dir, "extend")
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "max_steps": config.probe_max_steps,
        "learning_rate": config.probe_learning_rate,
        "assistant_only_loss": args.assistant_only_loss,
    }
    same = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")
    same += ("gradient_checkpointing", "logging_steps", "seed", "bf16", "fp16", "use_cpu", "disable_tqdm", "report_to")
    options |= {name: getattr(args, name) for name in same}
    probe = probe_config(str(folder), **options)
    shift = measure_router_shift(model, data, held_out, args=probe, processing_class=processor)
    named = config.layers if config.layers is None or not config.layers[:1].isdigit() else config.layers.split(",")
    named = [int(layer) for layer in named] if isinstance(named, list) else named
    plan = shift.select(None if named else config.fraction, layers=named, num_new=config.new_experts)
    shift.save(folder / "shift.json")
    shift.plot(folder / "shift.png", plan)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    print(f"Stage extend: new experts {plan} (layer: source experts); picture in {folder / 'shift.png'}")
    return plan


def split(data, config):
    """(S_t, S_e): samples to train on, and those held out for counting; at most a tenth is held out."""
    if config.streaming:
        return data.skip(config.probe_samples), data.take(config.probe_samples)
    held_out = max(1, min(config.probe_samples, len(data) // 10))
    parts = data.train_test_split(test_size=held_out, seed=0)
    return parts["train"], parts["test"]


def run_stages(config, args):
    """Runs the stages named in `config` and saves the adapter with its processor to `args.output_dir`.

    Returns:
        the trained `MoExtendForCausalLM`, on its unchanged base.
    """
    processor = build_processor(config, args.assistant_only_loss)
    model = build_model(config, processor)
    if "align" in config.stages:
        align(model, processor, config, args)
    if config.stages != ["align"]:
        data = load_data(config.data, config)
    if "extend" in config.stages:
        data, held_out = split(data, config)
        model = with_experts(model, extend(model, processor, data, held_out, config, args), config)
    elif config.plan is not None:
        model = with_experts(model, read_plan(config), config)
    if "finetune" in config.stages:
        trainer = MoExtendSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
    else:
        model.save_pretrained(args.output_dir, adapter_dtype=args.adapter_dtype)
        processor.save_pretrained(args.output_dir)
    return model
