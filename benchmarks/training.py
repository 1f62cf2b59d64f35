"""One run's training: the same records in the same order for every method, and as little code of its own as possible.

AdamW without weight decay, cosine, 3% warm-up, float32, gradients clipped at 1, a fixed number of steps. Methods with
replay take a second micro-batch a step: as many texts of the base's own as there are records of the task. The loss is
then the sum of the two means over tokens, so that long texts don't drown short answers. No method but those with new
experts takes a load-balancing loss.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from methods import Method
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tasks import ENCODER, ROOT, Task, base_folder, data_folder, messages, read, render_chat, training_records
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer
from variants import VARIANTS

from modeling_moextend import MoExtendForCausalLM, MoExtendSFTConfig, MoExtendSFTTrainer
from modeling_moextend.data.processors import load_processor, text_tokenizer
from modeling_moextend.evaluation.compare import base_of, count_selected
from modeling_moextend.processing_moextend import to_rgb
from modeling_moextend.tools.modes import is_moextend
from modeling_moextend.training.stages import change_routing

CACHE = ROOT / "outputs/benchmarks"
TRAINER = tempfile.TemporaryDirectory(prefix="moextend-benchmark-")  # a process's own: runs stand side by side
ALIGN_STEPS, ALIGN_RATE = 100, 1e-3
PLAN_RECORDS = 256  # of the task, which choose the source experts
REPLAY_TOKENS = 128  # longest replayed text
LORA = LoraConfig(
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)


def train(
    task: Task,
    method: Method,
    rate: float,
    seed: int,
    steps: int | None = None,
    *,
    model: PreTrainedModel | None = None,
    earlier: Sequence[Task] = (),
    adapter: str = "default",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Trains one run: (model, tokenizer or processor).

    Args:
        task, method: a `Task` and a `Method`.
        steps: fewer than the task's, for tests.
        model: what training starts from; default: the plain base, with images behind the aligned projector.
        earlier: tasks that `model` has learned; what is replayed, and left alone by a gate, holds their records too.
        adapter: what new experts or a LoRA are called; those of `model` with another name stay as they are below.
    """
    steps = steps or task.steps
    processing = load_processing(task)
    records = training_records(read(task.name)["train"], steps * task.batch, seed)
    set_seed(seed)
    model = start_model(task, seed) if model is None else model
    options = {"learning_rate": rate, "seed": seed, "max_steps": steps}
    if method.routing is None:
        return train_base(model, processing, task, method, records, options, earlier, adapter), processing
    batch = collator(processing)(tokenize(task, processing, records[:PLAN_RECORDS]))
    plan = busiest_experts(model, batch, method.new_experts)
    model = with_experts(model, plan, method.routing, adapter)
    return train_experts(model, processing, task, method, records, options, earlier), processing


def train_experts(
    model: PreTrainedModel,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    task: Task,
    method: Method,
    records: list[dict[str, Any]],
    options: dict[str, Any],
    earlier: Sequence[Task] = (),
) -> MoExtendForCausalLM:
    """New experts, by the library's own trainer."""
    if method.variant is not None:
        VARIANTS[method.variant](model)
    retention = {}
    if method.retention == "real":
        texts = [record["text"] for record in read("retention")] + rendered(processing, earlier, options["seed"])
        retention = {"retention_dataset": datasets.Dataset.from_list([{"text": text} for text in texts])}
    args = arguments(MoExtendSFTConfig, task, **options, **method.trainer, assistant_only_loss=True, max_length=None)
    trainer = MoExtendSFTTrainer(
        model=model, args=args, train_dataset=conversations(task, records), processing_class=processing, **retention
    )
    trainer.train()
    return model


def train_base(
    model: PreTrainedModel,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    task: Task,
    method: Method,
    records: list[dict[str, Any]],
    options: dict[str, Any],
    earlier: Sequence[Task] = (),
    adapter: str = "default",
) -> PreTrainedModel:
    """The plain base (and the projector), by TRL's trainer on records that are tokenised here."""
    choose_trainable(model, method.trains, adapter)
    samples = tokenize(task, processing, records)
    if method.replay:
        samples = with_replay(samples, replayed(processing, len(samples), options["seed"], earlier), task.batch)
    args = arguments(
        SFTConfig,
        task,
        **options,
        gradient_accumulation_steps=1 + method.replay,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )
    tokenizer = text_tokenizer(processing)
    trainer = MeanPerMicroBatch(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(samples),
        processing_class=tokenizer,
        data_collator=collator(processing),
    )
    trainer.train()
    return model


class MeanPerMicroBatch(SFTTrainer):
    """The loss of a step is the sum of its micro-batches' means over tokens, not the mean over all their tokens."""

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)


def arguments(config: type[SFTConfig], task: Task, learning_rate: float, seed: int, **options: Any) -> SFTConfig:
    """A trainer's arguments: what all runs share, and what this one has of its own."""
    shared = {
        "output_dir": TRAINER.name,
        "per_device_train_batch_size": task.batch,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1: a share of all steps
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 20,
        "use_cpu": True,
    }
    return config(**{**shared, "learning_rate": learning_rate, "seed": seed, **options})


# ---------------------------------------------------------------- models


def load_base() -> PreTrainedModel:
    """The plain base in float32."""
    return AutoModelForCausalLM.from_pretrained(str(base_folder()), dtype=torch.float32)


def load_processing(task: Task) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Tokenizer of a text task, processor of a task with images."""
    encoder = str(ROOT / ENCODER) if task.vision else None
    return load_processor(str(base_folder()), encoder, assistant_only_loss=True)


def aligned_folder(seed: int) -> Path:
    """Where stage align of a seed leaves its projector."""
    return data_folder() / f"aligned-{seed}"


def align(task: Task, seed: int) -> None:
    """Stage align, once a seed: the projector that all methods start from on a task with images."""
    processor = load_processing(task)
    set_seed(seed)
    model = MoExtendForCausalLM.from_base(
        str(base_folder()), encoder=str(ROOT / ENCODER), image_token_id=processor.image_token_id, dtype=torch.float32
    )
    options = {"max_steps": ALIGN_STEPS, "max_length": None, "assistant_only_loss": True}
    args = arguments(MoExtendSFTConfig, task, ALIGN_RATE, seed, stage="align", **options)
    dataset = conversations(task, training_records(read("captions"), ALIGN_STEPS * task.batch, seed))
    MoExtendSFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor).train()
    model.save_pretrained(str(aligned_folder(seed)), adapter_dtype=torch.float32)


def start_model(task: Task, seed: int) -> PreTrainedModel:
    """What training starts from: the plain base; with images, the base behind the aligned projector."""
    if not task.vision:
        return load_base()
    locations = {"base": str(base_folder()), "encoder": str(ROOT / ENCODER)}
    return MoExtendForCausalLM.from_pretrained(str(aligned_folder(seed)), dtype=torch.float32, **locations)


def with_experts(
    model: PreTrainedModel, plan: dict[int, list[int]], routing: dict[str, str], adapter: str = "default"
) -> MoExtendForCausalLM:
    """`model` with the plan's new experts, under a routing: in `adapter` where it has that, else in one on top. Deltas
    only where the routing names them."""
    routing = {"deltas": {}, **routing}
    if not is_moextend(model):
        return MoExtendForCausalLM.from_base(model, plan, adapter_name=adapter, **routing)
    if adapter not in model.adapters:
        model.add_adapter(adapter, plan, **routing)
        return model
    change_routing(model, routing)
    model.extend(plan)
    return model


@torch.inference_mode()
def busiest_experts(model: PreTrainedModel, batch: dict[str, torch.Tensor], num_new: int) -> dict[int, list[int]]:
    """{layer: the `num_new` base experts that the tokens of `batch` select most, busiest first}; wraps around.

    Adapters of `model` with experts are off meanwhile: these hide what the base's own would be selected for.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    stacked = is_moextend(model) and any(part.config.extended_layers for part in model.adapters.values())
    with base_of(model.eval(), None if stacked else model) as reference:
        all_logits = reference(**inputs, output_router_logits=True).router_logits
    real, top_k = batch["attention_mask"].reshape(-1).bool(), model.config.get_text_config().num_experts_per_tok
    plan = {}
    for layer, logits in enumerate(all_logits):
        counts = count_selected(logits[real].topk(top_k).indices, logits.shape[1])
        order = counts.argsort(descending=True, stable=True).tolist()
        plan[layer] = [order[number % len(order)] for number in range(num_new)]
    return plan


def choose_trainable(model: PreTrainedModel, trains: str, adapter: str = "default") -> None:
    """Sets what trains: "all" of the base, its "routers", "lora" (attention and experts); and the projector.

    A LoRA `adapter` is new; those that are there already are active below it, and frozen.
    """
    base = getattr(model, "base", model)
    if trains == "lora":
        add_lora(base, adapter)
    for name, parameter in base.named_parameters():
        own_lora = "lora_" in name and f".{adapter}." in name
        trained = {"all": True, "routers": name.endswith(".gate.weight"), "lora": own_lora}
        parameter.requires_grad_(trained[trains])
    if getattr(model, "projector", None) is not None:
        model.encoder.requires_grad_(False)
        model.projector.requires_grad_(True)


def add_lora(base: PreTrainedModel, adapter: str) -> None:
    """A further LoRA that starts at zero; all of them are active."""
    inject_adapter_in_model(LORA, base, adapter_name=adapter)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(base.peft_config))


# ---------------------------------------------------------------- data


def conversations(task: Task, records: list[dict[str, Any]]) -> datasets.Dataset:
    """Records as a dataset in TRL's conversational format; images are opened when a sample is taken."""
    if not task.vision:
        return datasets.Dataset.from_list([{"messages": messages(record)} for record in records])
    samples = [{"messages": in_parts(messages(record)), "images": [record["image"]]} for record in records]
    return datasets.Dataset.from_list(samples).cast_column("images", datasets.List(datasets.Image()))


def in_parts(turns: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts, an image part where `<image>` stands first."""
    image = {"type": "image", "text": None}
    return [
        {
            "role": turn["role"],
            "content": [image] * turn["content"].startswith("<image>")
            + [{"type": "text", "text": turn["content"].removeprefix("<image>")}],
        }
        for turn in turns
    ]


def tokenize(
    task: Task, processing: PreTrainedTokenizerBase | ProcessorMixin, records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Records as [{"input_ids", "labels", "picture"}]: labels are the assistant's tokens, as with TRL's own masks."""
    tokenizer, image = text_tokenizer(processing), ""
    if task.vision:
        image = processing.image_token * processing.num_image_tokens
    samples = []
    for record in records:
        turns = messages({**record, "question": record["question"].replace("<image>", image)})
        ids = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        labels = [
            token if mask else -100 for token, mask in zip(ids["input_ids"], ids["assistant_masks"], strict=True)
        ]
        samples.append({"input_ids": ids["input_ids"], "labels": labels, "picture": record["image"]})
    return samples


def tokenize_texts(
    processing: PreTrainedTokenizerBase | ProcessorMixin, number: int, seed: int, group: int = 128
) -> list[dict[str, Any]]:
    """`number` retention texts in the seed's order as samples; every token is a label.

    Within each `group` of them shorter ones come first: a batch of like lengths has little padding.
    """
    tokenizer = text_tokenizer(processing)
    texts = [record["text"] for record in training_records(read("retention"), number, seed)]
    all_ids = tokenizer(texts, truncation=True, max_length=REPLAY_TOKENS).input_ids
    ordered = [ids for start in range(0, number, group) for ids in sorted(all_ids[start : start + group], key=len)]
    return [{"input_ids": ids, "labels": ids, "picture": None} for ids in ordered]


def replayed(
    processing: PreTrainedTokenizerBase | ProcessorMixin, number: int, seed: int, earlier: Sequence[Task] = ()
) -> list[dict[str, Any]]:
    """`number` samples to replay: texts of the base's own and records of each earlier task, in turn."""
    parts = [tokenize_texts(processing, number, seed)]
    parts += [tokenize(task, processing, earlier_records(task, number, seed)) for task in earlier]
    return [parts[index % len(parts)][index] for index in range(number)]


def rendered(
    processing: PreTrainedTokenizerBase | ProcessorMixin, earlier: Sequence[Task], seed: int, number: int = 900
) -> list[str]:
    """Records of earlier tasks as text, `number` of each, without the leading bos."""
    tokenizer = text_tokenizer(processing)
    talks = [messages(record) for task in earlier for record in earlier_records(task, number, seed)]
    return [render_chat(tokenizer, talk) for talk in talks]


def earlier_records(task: Task, number: int, seed: int) -> list[dict[str, Any]]:
    return training_records(read(task.name)["train"], number, f"replay {seed}")


def with_replay(samples: list, replayed: list, batch: int) -> list:
    """Micro-batches of the task and of replayed text in turn."""
    mixed = []
    for start in range(0, len(samples), batch):
        mixed += samples[start : start + batch] + replayed[start : start + batch]
    return mixed


def collator(
    processing: PreTrainedTokenizerBase | ProcessorMixin,
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Samples -> right-padded batch; `pixel_values` where they have pictures."""
    tokenizer = text_tokenizer(processing)

    def collate(samples):
        fills = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        samples = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
        length = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            name: torch.tensor([sample[name] + [fill] * (length - len(sample[name])) for sample in samples])
            for name, fill in fills.items()
        }
        pictures = [to_rgb(sample["picture"]) for sample in samples if sample["picture"]]
        if pictures:
            batch["pixel_values"] = processing.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch

    return collate
