"""The three stages one after the other: align, extend, finetune. What `examples/train.py` and the quickstart run."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from ..attaching.choices import check_rank, routing_choices
from ..attaching.parts import listed
from ..base_checks_moextend import check_plan
from ..configuration_moextend import MoExtendConfig, check_choices, normalise_deltas, normalise_plan
from ..data.files import as_text
from ..data.llava import JSON_FILES, load_llava, read_entries
from ..data.processors import load_processor
from ..extender.router_probe import measure_router_shift, probe_config
from ..extender.router_shift import CHOICES
from ..families_moextend import find_moe_layers
from ..low_rank_moextend import expert_shapes
from ..modeling_moextend import MoExtendForCausalLM
from ..tools.files import alone_in, write_text
from ..tools.inspection import ROUTING
from ..tools.interrupts import stopped_at
from ..tools.locations import check_location, hub_id
from ..tools.modes import is_moextend
from .checkpoints import checkpoint_to_resume
from .config import MoExtendSFTConfig
from .groups import ALIGN_RATE
from .trainer import MoExtendSFTTrainer

STAGES = ("align", "extend", "finetune")
SAME_IN_PROBE = (  # the trainer's options that stage extend shares with stage finetune
    "assistant_only_loss",
    "bf16",
    "disable_tqdm",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logging_steps",
    "max_length",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "seed",
    "use_cpu",
)


@dataclass
class StagesConfig:
    """What to build and which stages to run; the trainer's own options (those of stage finetune) stand beside it."""

    base: str = field(metadata={"help": "Pretrained MoE causal LM: Hub id or folder. It is never changed."})
    data: str | None = field(
        default=None,
        metadata={"help": "LLaVA JSON(L) file; or in TRL's formats: JSON(L) file with `messages`, Hub id, folder."},
    )
    encoder: list[str] | None = field(
        default=None,
        metadata={"help": "Checkpoint that takes images or audio (CLIP, Whisper), or one of each; none: text only."},
    )
    downsample: int | None = field(
        default=None, metadata={"help": "So many features of audio make one placeholder; default: 4."}
    )
    align_data: str | None = field(
        default=None, metadata={"help": "Captions of images or audio for stage align; see --data."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Samples to evaluate on while finetuning, like --data."}
    )
    retention_data: str | None = field(
        default=None,
        metadata={
            "help": "Text that the gate of scope 'gate' leaves to the base: JSON(L) with `text` or `messages`, or "
            "a dataset (Hub id or folder). Unset: sampled from the base itself."
        },
    )
    image_folder: str | None = field(default=None, metadata={"help": "What paths in a LLaVA JSON start from."})
    on_error: str = field(
        default="raise", metadata={"help": "A missing or broken image: 'raise', or 'skip' it and count at the end."}
    )
    ignore_keys: list[str] = field(
        default_factory=list,
        metadata={"help": "Keys of a LLaVA JSON to leave unread; other unknown ones are refused."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as it goes; then the first --probe_samples are held out."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Start from this adapter, e.g. one already aligned."})
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Which to run: align extend finetune, in this order."}
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "'all', 'modality' (default with an encoder) or 'gate' (default without). An --adapter keeps its "
            "own scope, selection and calibration where none is given."
        },
    )
    selection: str | None = field(default=None, metadata={"help": "'compete' or 'exclusive' (default)."})
    calibration: str | None = field(
        default=None,
        metadata={"help": "'all', 'routed' (default with 'compete') or 'none' (default with 'exclusive')."},
    )
    deltas: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shared layers that move too, for tokens in scope alone: any of embedding, attention, output, or "
            "'none'. Default: all three with scope 'gate' and no encoder, else none."
        },
    )
    paper: bool = field(
        default=False, metadata={"help": "The paper's routing (all, compete, all) and one new expert a layer."}
    )
    expert_rank: int | None = field(
        default=None,
        metadata={"help": "Of a new expert train and save a delta of this rank to its source; unset: a whole copy."},
    )
    new_experts: int | None = field(
        default=None, metadata={"help": "New experts a layer; default: 4, or 1 with --paper."}
    )
    fraction: float = field(default=0.5, metadata={"help": "Share of MoE layers to extend: those that shift most."})
    layers: str | None = field(
        default=None,
        metadata={"help": "Instead of --fraction: all, first-half, second-half, interval, or layers like '0,2,5'."},
    )
    plan: str | None = field(
        default=None, metadata={"help": "In place of stage extend: its plan.json, or JSON like '{\"2\": [1]}'."}
    )
    align_max_steps: int = field(default=-1, metadata={"help": "Steps of stage align; -1: one epoch."})
    align_learning_rate: float = field(default=ALIGN_RATE, metadata={"help": "Learning rate of stage align."})
    align_gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches a step in stage align, in place of --gradient_accumulation_steps."}
    )
    align_max_length: int | None = field(default=1024, metadata={"help": "Longest sample of stage align, in tokens."})
    probe_max_steps: int = field(default=1000, metadata={"help": "Steps of stage extend's router probe."})
    probe_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the router probe."})
    probe_samples: int = field(
        default=10_000,
        metadata={"help": "Samples of --data held out for counting experts (at most a tenth), never trained on."},
    )
    dtype: str = field(default="auto", metadata={"help": "The base's dtype; new tensors always train in float32."})
    device_map: str | None = field(default=None, metadata={"help": "The base's device map, e.g. 'auto'."})

    def __post_init__(self):
        if isinstance(self.encoder, list):  # a recipe may give one as a string
            self.encoder = (self.encoder[0] if len(self.encoder) == 1 else self.encoder) or None
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or self.stages != sorted(set(self.stages), key=STAGES.index) or not self.stages:
            raise ValueError(f"stages={self.stages} must be some of {list(STAGES)}, in this order.")
        if "align" in self.stages and (self.encoder is None or self.align_data is None):
            raise ValueError(
                "Stage align needs --encoder and --align_data (captions). For a task of text leave it out: --stages "
                "extend finetune."
            )
        if self.stages != ["align"] and self.data is None:
            raise ValueError(f"Stages {self.stages} need --data.")
        if "finetune" in self.stages and "extend" not in self.stages and not (self.plan or self.adapter):
            raise ValueError("Stage finetune without extend needs --plan, or an --adapter that has new experts.")
        if "extend" in self.stages and self.plan is not None:
            raise ValueError("--plan takes the place of stage extend: leave out one of the two.")
        if self.encoder and not self.adapter and "align" not in self.stages:
            raise ValueError("Without stage align the projector is random: run it first, or start from its --adapter.")
        self.chosen_routing()
        check_rank(self.expert_rank, self.paper)
        if self.new_experts is None:
            self.new_experts = 1 if self.paper else 4

    def chosen_routing(self) -> dict[str, Any]:
        """The choices that were made, {name: value}: those of the options (deltas too), or all three of `paper`.

        Raises:
            ValueError: `paper` beside a choice that is not the paper's; an unknown delta.
        """
        choices = {name: getattr(self, name) for name in ROUTING}
        deltas = None if self.deltas is None else normalise_deltas([kind for kind in self.deltas if kind != "none"])
        if self.paper:
            return routing_choices(**choices, paper=True, deltas=deltas or ())
        return {name: value for name, value in (choices | {"deltas": deltas}).items() if value is not None}

    def chosen_experts(self) -> dict[str, str | int]:
        """The choices for new experts that were made: those of the routing, and the rank."""
        return self.chosen_routing() | ({} if self.expert_rank is None else {"expert_rank": self.expert_rank})

    def chosen_layers(self) -> tuple[float | None, str | list[int] | None]:
        """What `RouterShift.select` takes: (fraction, layers).

        Raises:
            ValueError: `layers` is neither a known name nor a list of numbers.
        """
        if self.layers is None:
            return self.fraction, None
        if self.layers in CHOICES:
            return None, self.layers
        if not re.fullmatch(r"\d+(,\d+)*", self.layers):
            raise ValueError(f"layers={self.layers!r} must be one of {', '.join(CHOICES)}, or layers like '0,2,5'.")
        return None, [int(layer) for layer in self.layers.split(",")]


# ---------------------------------------------------------------- what the stages work on


def load_data(name: str, config: StagesConfig) -> Dataset | IterableDataset:
    """A training set: a LLaVA JSON(L) file (`conversations`) read as it is, a JSON(L) file in a format of TRL's, or a
    dataset in one (split "train").

    Raises:
        ValueError: a LLaVA sample with an image, and no encoder to see it.
    """
    if name.endswith(JSON_FILES) and is_llava(name):
        options = {"streaming": config.streaming, "on_error": config.on_error, "ignore_keys": config.ignore_keys}
        data = load_llava(name, config.image_folder, **options)
        if config.encoder is not None:
            return data
        columns = [name for name in data.column_names or ("images", "id") if name != "messages"]
        return (data if config.streaming else data.with_format(None)).map(plain_text, remove_columns=columns)
    return load_any(name, streaming=config.streaming)


def check_paths(config: StagesConfig) -> None:
    """Refuses wrong paths of data, images, base, encoder and adapter before any of them is read.

    Raises:
        ValueError: one message with all that are wrong.
        OSError: the Hub can't be read.
    """
    problems = []
    given = [(role, getattr(config, role)) for role in ("base", "adapter")]
    for role, where in given + [("encoder", where) for where in listed(config.encoder)]:
        if where is not None:
            with noted(problems):
                check_location(role, where)
    used = [name for name in ("eval_data", "retention_data") if getattr(config, name)]
    used += ["align_data"] * ("align" in config.stages) + ["data"] * (config.stages != ["align"])
    for name in used:
        with noted(problems):
            check_data(name, getattr(config, name))
    if config.image_folder is not None and not os.path.isdir(config.image_folder):
        problems.append(f"image_folder={config.image_folder!r}: there is no such folder.")
    if config.plan is not None:
        with noted(problems):
            read_plan(config)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"Nothing was loaded or trained, for not everything is where the options say:{lines}")


@contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Adds the text of a ValueError inside to `problems`."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def check_data(option: str, name: str) -> None:
    """Refuses a JSON(L) file or folder that is not there.

    Raises:
        ValueError: says what was looked for.
    """
    if name.endswith(JSON_FILES):
        if not os.path.isfile(name):
            raise ValueError(f"{option}={name!r}: there is no such file.")
    elif os.path.isfile(name):
        kinds = " or ".join(JSON_FILES)
        raise ValueError(f"{option}={name!r}: a file must be {kinds}; of others give the folder that holds them.")
    elif os.path.isdir(name) and not os.listdir(name):
        raise ValueError(f"{option}={name!r}: the folder is empty.")
    elif not os.path.exists(name) and hub_id(name) is None:
        raise ValueError(f"{option}={name!r}: there is no such folder, and it is no Hub id like me/my-data.")


def where_in_extend(config: StagesConfig, args: MoExtendSFTConfig) -> str:
    """What to say to whoever stops stage extend."""
    begun = "align" in config.stages
    adapter = f" --adapter {os.path.join(args.output_dir, 'align')}" * begun
    return f"in stage extend, which has no checkpoints; go on with --stages {' '.join(config.stages[begun:])}{adapter}"


def is_llava(name: str) -> bool:
    """Whether a JSON(L) file is in LLaVA's format; an empty one counts as such, and its reader says so."""
    return "conversations" in next((entry for _, entry in read_entries(name)), {"conversations": []})


def load_any(name: str, **options: Any) -> Dataset | IterableDataset:
    """A dataset of TRL's formats: JSON(L) file, Hub id or folder."""
    if name.endswith(JSON_FILES):
        return datasets.load_dataset("json", data_files=name, split="train", **options)
    return datasets.load_dataset(name, split="train", **options)


def plain_text(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample without images: its messages' parts as strings, which text-only chat templates know."""
    for kind, name in (("images", "an image"), ("audios", "audio")):
        if sample.get(kind):
            raise ValueError(f"Sample {sample['id']} has {name}, but there is no encoder: pass --encoder.")
    messages = sample["messages"]
    return {"messages": [{**message, "content": as_text(message["content"])} for message in messages]}


def split_held_out(
    data: Dataset | IterableDataset, config: StagesConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """(S_t, S_e): samples to train on, and those held out for counting; the same ones in every stage and run."""
    if config.streaming:
        return data.skip(config.probe_samples), data.take(config.probe_samples)
    held_out = min(config.probe_samples, len(data) // 10)
    if held_out == 0:
        return data, None
    parts = data.train_test_split(test_size=held_out, seed=0)
    return parts["train"], parts["test"]


def build_model(config: StagesConfig, processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedModel:
    """The adapter to go on with; or the base with an encoder; or, for a text-only extension, the base as it is."""
    options = {"dtype": config.dtype, "device_map": config.device_map}
    if config.adapter is not None:
        model = MoExtendForCausalLM.from_pretrained(
            config.adapter, base=config.base, encoder=config.encoder, **options
        )
        change_routing(model, config.chosen_experts())
    elif config.encoder is None:
        model = AutoModelForCausalLM.from_pretrained(config.base, trust_remote_code=False, **options)
    else:
        senses = {"encoder": config.encoder, "image_token_id": processor.image_token_id}
        senses["audio_token_id"] = processor.audio_token_id
        if config.downsample is not None:
            senses["audio_projector_downsample"] = config.downsample
        model = MoExtendForCausalLM.from_base(config.base, **senses, **config.chosen_experts(), **options)
    return model


def change_routing(model: MoExtendForCausalLM, routing: dict[str, Any]) -> None:
    """Other routing choices, or another rank, for an adapter that has no new experts yet, as after stage align.

    Raises:
        ValueError: it has new experts, which were trained for the routing they have.
    """
    changed = {name: value for name, value in routing.items() if value != getattr(model.config, name)}
    if changed and model.config.extended_layers:
        current = {name: getattr(model.config, name) for name in changed}
        raise ValueError(
            f"The adapter's new experts were made for {current}, not for {changed}: leave these options out."
        )
    for name, value in changed.items():
        setattr(model.config, name, value)
    check_choices(model.config)


def with_experts(model: PreTrainedModel, plan: dict[int, list[int]], config: StagesConfig) -> MoExtendForCausalLM:
    """`model` with the plan's new experts."""
    if is_moextend(model):
        model.extend(plan)
        return model
    return MoExtendForCausalLM.from_base(model, plan, **config.chosen_experts())


def read_plan(config: StagesConfig) -> dict[int, list[int]]:
    """`config.plan` (a file or JSON) as {layer: [source experts]}.

    Raises:
        ValueError: neither a file nor JSON, or JSON that can't be read.
    """
    if not os.path.isfile(config.plan) and not config.plan.lstrip().startswith("{"):
        raise ValueError(f"plan={config.plan!r} is no file, and no JSON like '{{\"2\": [1]}}'.")
    text = Path(config.plan).read_text(encoding="utf-8") if os.path.isfile(config.plan) else config.plan
    try:
        return normalise_plan(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"plan={config.plan!r} is no JSON like '{{\"2\": [1]}}': {error}.") from error


# ---------------------------------------------------------------- the stages


def align(
    model: MoExtendForCausalLM,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    data: Dataset | IterableDataset,
    config: StagesConfig,
    args: MoExtendSFTConfig,
    checkpoint: str | None,
) -> None:
    """Stage 1: the projector learns from image-caption pairs. Writes the aligned adapter to the folder `align`."""
    args = replace(
        args,
        output_dir=os.path.join(args.output_dir, "align"),
        stage="align",
        train_projector=None,
        learning_rate=config.align_learning_rate,
        max_steps=config.align_max_steps,
        num_train_epochs=1,
        gradient_accumulation_steps=config.align_gradient_accumulation_steps,
        max_length=config.align_max_length,
        prefix_cache=None,
        eval_strategy="no",
        push_to_hub=False,
    )
    trainer = MoExtendSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    heading(config, "align", f"the aligned adapter is in {args.output_dir}")


def extend(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    data: Dataset | IterableDataset,
    held_out: Dataset | IterableDataset,
    config: StagesConfig,
    args: MoExtendSFTConfig,
) -> dict[int, list[int]]:
    """Stage 2: finds the layers that react and the experts to copy; writes shift.json, shift.png and plan.json."""
    folder = Path(args.output_dir, "extend")
    options = {name: getattr(args, name) for name in SAME_IN_PROBE}
    options |= {"max_steps": config.probe_max_steps, "learning_rate": config.probe_learning_rate}
    probe = probe_config(str(folder), **options)
    shift = measure_router_shift(model, data, held_out, args=probe, processing_class=processor)
    plan = shift.select(*config.chosen_layers(), num_new=config.new_experts)
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        shift.save(folder / "shift.json")
        shift.plot(folder / "shift.png", plan)
        write_text(folder / "plan.json", json.dumps(plan))
        done = f"new experts {plan} (layer: source experts); picture in {folder / 'shift.png'}"
        heading(config, "extend", f"{done}, plan in {folder / 'plan.json'}")
    PartialState().wait_for_everyone()
    return plan


def heading(config: StagesConfig, stage: str, done: str | None = None) -> None:
    """Says, on one process, which stage begins, or what one has `done`."""
    if PartialState().is_main_process:
        number = config.stages.index(stage) + 1
        text = f"MoExtend, stage {number} of {len(config.stages)}: {stage}"
        print(f"{text} is done: {done}" if done else f"\n{text}", flush=True)


def find_checkpoint(args: MoExtendSFTConfig) -> tuple[str | None, str | None]:
    """(stage, folder) to resume, from `--resume_from_checkpoint`; (None, None) without it. "true": the last whole one.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    resume, aligned = args.resume_from_checkpoint, os.path.join(args.output_dir, "align")
    if not resume:
        return None, None
    resume = True if str(resume).lower() == "true" else resume
    checkpoint, said = checkpoint_to_resume(resume, args.output_dir, aligned)
    stage = "align" if Path(checkpoint).resolve().parent == Path(aligned).resolve() else "finetune"
    if PartialState().is_main_process:
        rest = "; what came before is not run again, and its options count for nothing" * (stage == "finetune")
        print("\n".join([*said, f"MoExtend: goes on in stage {stage} from {checkpoint}{rest}"]))
    return stage, checkpoint


def check_resumed_plan(checkpoint: str, config: StagesConfig) -> None:
    """Refuses a plan beside a checkpoint that has another one.

    Raises:
        ValueError: names both.
    """
    plan = normalise_plan(json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))["extended_layers"])
    if config.plan is not None and read_plan(config) != plan:
        raise ValueError(
            f"--plan says {read_plan(config)}, but {checkpoint} has {plan}: leave out --plan to resume it."
        )


def check_before(
    model: PreTrainedModel, config: StagesConfig, args: MoExtendSFTConfig, held_out: Dataset | IterableDataset | None
) -> None:
    """Refuses, before the first step of the first stage, what would only fail in a later one.

    Raises:
        ValueError: says which option.
    """
    layers = find_moe_layers(model.get_decoder())
    has_experts = bool(getattr(model.config, "extended_layers", None))
    if not is_moextend(model):
        routing = {name: value for name, value in config.chosen_routing().items() if name in ROUTING}
        MoExtendConfig(**routing_choices(**routing))  # refuses what from_base would, after the probe
    for layer in layers.values():
        expert_shapes(layer.experts, 1, config.expert_rank)  # refuses a rank that is too high
    if config.plan is not None:
        check_plan(layers, read_plan(config))
    chosen = config.chosen_layers()[1]
    if isinstance(chosen, list):
        check_plan(layers, {layer: [0] for layer in chosen})
    if "extend" in config.stages and has_experts:
        raise ValueError(f"The adapter has new experts in layers {list(model.config.extended_layers)} already.")
    if "extend" in config.stages and held_out is None:
        raise ValueError("Stage extend counts on held-out samples: give more data, or --probe_samples above 0.")
    if config.stages[-1] == "finetune" and not (has_experts or config.plan or "extend" in config.stages):
        raise ValueError("Stage finetune has no new experts to train: run stage extend, or give --plan.")
    if args.stage != "finetune":
        raise ValueError(f"--stage {args.stage} is the trainer's own; to run one stage use --stages {args.stage}.")
    if args.eval_strategy != "no" and config.eval_data is None:
        raise ValueError("--eval_strategy needs --eval_data.")
    if config.streaming and "align" in config.stages and config.align_max_steps < 0:
        raise ValueError("With --streaming the length of an epoch is unknown: give --align_max_steps.")
    if len(config.stages) > 1 and str(args.distributed_state.distributed_type).endswith(("FSDP", "DEEPSPEED")):
        raise ValueError("Under FSDP and DeepSpeed run one stage a launch: --stages align, extend, finetune.")


def run_stages(config: StagesConfig, args: MoExtendSFTConfig) -> MoExtendForCausalLM:
    """Runs the stages named in `config` and saves the adapter with its processor to `args.output_dir`.

    `args.resume_from_checkpoint` goes on in the stage that wrote the checkpoint; stages before it are not run again.

    Returns:
        the trained `MoExtendForCausalLM`, on its unchanged base.
    """
    with alone_in(args.output_dir, "stages") if PartialState().is_main_process else nullcontext():
        return run_alone(config, args)


def run_alone(config: StagesConfig, args: MoExtendSFTConfig) -> MoExtendForCausalLM:
    """As `run_stages`, of which there is no other in this folder."""
    set_seed(args.seed)  # before the projector and the calibration draw their start values
    resumed, checkpoint = find_checkpoint(args)
    if resumed == "finetune":
        check_resumed_plan(checkpoint, config)
        config = replace(config, adapter=checkpoint, plan=None, stages=["finetune"])
    check_paths(config)
    captions = load_data(config.align_data, config) if "align" in config.stages else None
    data = held_out = None
    if config.stages != ["align"]:
        data, held_out = split_held_out(load_data(config.data, config), config)
    eval_data = load_data(config.eval_data, config) if config.eval_data else None
    retention_data = load_any(config.retention_data) if config.retention_data else None
    counted = {} if config.downsample is None else {"audio_projector_downsample": config.downsample}
    processor = load_processor(config.adapter or config.base, config.encoder, args.assistant_only_loss, **counted)
    model = build_model(config, processor)
    check_before(model, config, args, held_out)
    say = partial(heading, config)
    if "align" in config.stages:
        say("align")
        align(model, processor, captions, config, args, checkpoint if resumed == "align" else None)
    if "extend" in config.stages:
        say("extend")
        with stopped_at(partial(where_in_extend, config, args)):
            model = with_experts(model, extend(model, processor, data, held_out, config, args), config)
    elif config.plan is not None:
        model = with_experts(model, read_plan(config), config)
    if "finetune" in config.stages:
        datasets_ = {"train_dataset": data, "eval_dataset": eval_data, "retention_dataset": retention_data}
        say("finetune")
        trainer = MoExtendSFTTrainer(model=model, args=args, processing_class=processor, **datasets_)
        trainer.train(resume_from_checkpoint=checkpoint if resumed == "finetune" else None)
        trainer.save_model(args.output_dir)
        say("finetune", f"the adapter is in {args.output_dir}")
    elif PartialState().is_main_process:
        model.save_pretrained(args.output_dir, adapter_dtype=args.adapter_dtype)
        processor.save_pretrained(args.output_dir)
    PartialState().wait_for_everyone()
    return model
