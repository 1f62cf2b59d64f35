"""Senses: of each, a frozen encoder and a projector put features of inputs where its placeholder tokens stand (LLaVA).

An encoder is any model of transformers that takes images alone, or audio alone, and gives a sequence of features.
Letters: B items, S tokens, N inputs of one modality in the batch, P features of an input, T placeholders of all of
them, H hidden size of the base, D of the encoder.
"""

import contextlib
import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    Cache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .configuration_moextend import MODALITIES, Sense, as_config, shortened
from .layers_moextend import keep_in_graph
from .package_moextend import from_package

CONFIG_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
INPUTS = {  # modality -> what a pass takes of it: the inputs themselves, which of their values are real, and more
    "image": ("pixel_values", "pixel_attention_mask", "spatial_shapes"),
    "audio": ("input_features", "input_features_mask"),
}


class Projector(nn.Module):
    """Two linear layers with an activation between them (`mlp2x_gelu` of LLaVA-1.5), or one: [N, P, D] to
    [N, P / `downsample`, H], for which so many features stand side by side, the last ones beside zeros."""

    def __init__(self, sense: Sense, hidden_size: int, device=None):
        super().__init__()
        self.downsample, size = sense.projector_downsample, sense.encoder_config.hidden_size
        options = {"device": device, "dtype": torch.float32}
        self.linear_1 = nn.Linear(size * self.downsample, hidden_size, **options)
        self.act, self.linear_2 = ACT2FN[sense.projector_hidden_act], None
        if sense.projector_type == "mlp":
            self.linear_2 = nn.Linear(hidden_size, hidden_size, **options)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.downsample > 1:
            features = F.pad(features, (0, 0, 0, -features.shape[1] % self.downsample))
            features = features.unflatten(1, (-1, self.downsample)).flatten(2)
        hidden = self.linear_1(features.to(self.linear_1.weight.dtype))
        return hidden if self.linear_2 is None else self.linear_2(self.act(hidden))


@contextlib.contextmanager
def projectors_tied(model, projectors):
    """Inside the block, token embeddings of `model` are tied to projectors that train, with gradient zero: sharded
    layers are gathered for backward by all processes or by none, whether their batch has images or not."""
    trained = [one for projector in projectors if torch.is_grad_enabled() for one in projector.parameters()]
    if not any(parameter.requires_grad for parameter in trained):
        yield
        return
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: keep_in_graph(output, trained))
    try:
        yield
    finally:
        hook.remove()


def load_encoder(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """The encoder in a checkpoint (of one alone, or of a model that has one), from safetensors, frozen."""
    hub = {key: kwargs[key] for key in CONFIG_KWARGS if key in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)  # AutoConfig might run code
    config = as_config(values)
    config = getattr(config, "vision_config", config)
    encoder_class = class_of_encoder(config)
    check_encoder(name_or_path, encoder_class, config.model_type or values["model_type"])  # an unknown config has none
    for name in ("mask_time_prob", "mask_feature_prob"):  # of training alone; some checkpoints lack its tensor
        if hasattr(config, name):
            setattr(config, name, 0.0)
    kwargs |= {"config": config}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["key_mapping"] = {r"^(model\.)?encoder\.": ""}
    else:
        encoder_class, kwargs["trust_remote_code"] = AutoModel, False
    return load_whole("encoder", encoder_class, name_or_path, **kwargs).requires_grad_(False).eval()


def load_whole(role, auto_class, name_or_path, **kwargs):
    """A model from safetensors only, unless `use_safetensors=False` allows pickled weights, with none missing."""
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # False would refuse safetensors
    model, loading = auto_class.from_pretrained(name_or_path, **{**kwargs, "output_loading_info": True})
    missing = ", ".join(sorted(loading["missing_keys"])[:8])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"{role}={str(name_or_path)!r} is incomplete, or no model of the kind: it lacks {missing}.")
    return model


def class_of_encoder(config):
    """The class of an encoder with this config, or of the encoder in an encoder-decoder; `None`: no model."""
    model_class = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None
    if model_class is None or isinstance(model_class, tuple) or not getattr(config, "is_encoder_decoder", False):
        return model_class
    with torch.device("meta"):
        return type(model_class(config).get_encoder())


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a loaded model: itself, or the one inside, without a head."""
    inside = "vision_model" if hasattr(model.config, "vision_config") else model.base_model_prefix
    tower = getattr(model, inside, model)
    if tower.config.is_encoder_decoder and hasattr(tower, "get_encoder"):
        tower = tower.get_encoder()
    check_encoder(type(model).__name__, type(tower), tower.config.model_type)
    if tower is not model:
        tower.config.name_or_path = model.config.name_or_path  # a part does not know where the whole lies
    return tower


def modality_at(name_or_path, **hub):
    """What the encoder in a checkpoint takes, by its config: see `modality_of`."""
    config = as_config(PreTrainedConfig.get_config_dict(name_or_path, **hub)[0])
    config = getattr(config, "vision_config", config)
    encoder_class = class_of_encoder(config)
    check_encoder(name_or_path, encoder_class, config.model_type)
    return modality_of(encoder_class)


def modality_of(encoder_class):
    """What a class of models takes, as it says itself: "image" or "audio"; `None`: neither alone."""
    taken = getattr(encoder_class, "input_modalities", ())
    taken = (taken,) if isinstance(taken, str) else tuple(taken)
    entries = {*dir(encoder_class.config_class), *encoder_class.config_class.attribute_map} if taken else ()
    known = len(taken) == 1 and taken[0] in MODALITIES and "hidden_size" in entries
    return taken[0] if known else None


def check_encoder(given, encoder_class, model_type):
    if modality_of(encoder_class) is None:
        raise ValueError(
            f"encoder={given!r} is a {model_type!r} model; an encoder must be a model of "
            "transformers that takes images alone or audio alone and gives a sequence of features, like the vision "
            "model of CLIP or SigLIP, DINOv2, Whisper, Wav2Vec2, HuBERT, WavLM or AST, or a whole one that has it."
        )


def check_values(sense, values, mask):
    """Refuses inputs of another shape than the encoder takes, without their mask, or too short for a feature."""
    name, shape, found = INPUTS[sense.modality][0], sense.input_shape, list(values.shape[1:])
    if "dino" in sense.encoder_config.model_type:  # takes any size
        shape[1:] = found[-2:]
    if shape is not None and found != shape:
        raise ValueError(
            f"{name} must be [N, {', '.join(map(str, shape))}] (those of the batch, in reading order, as the "
            f"encoder's own processor makes them), not {list(values.shape)}."
        )
    if mask is None and sense.convolutions is not None:
        raise ValueError(f"{name} needs {INPUTS[sense.modality][1]} [N, L], true where an input is no padding.")
    elif len(values) and mask is not None and min(count_placeholders(sense, values, mask)) < 1:
        raise ValueError(f"{name} holds an input that is too short: the encoder makes no feature of it.")


def count_placeholders(sense, values, mask):
    """[N]: how many placeholders each of the inputs takes."""
    if sense.convolutions is not None:
        return [sense.num_placeholders(length) for length in mask.sum(dim=1).tolist()]
    return [sense.num_placeholders(tuple(values.shape[-2:]))] * len(values)


def encode(sense, encoder, projector, inputs) -> torch.Tensor:
    """`inputs` (by the names of `INPUTS`) of one modality -> [T, H] features, input by input: one hidden state of the
    frozen encoder, projected. An input gives what it gives alone, whatever else is in the batch."""
    values, mask, *more = map(inputs.get, INPUTS[sense.modality])
    check_values(sense, values, mask)
    values, kwargs = values.to(encoder.device, encoder.dtype), {"output_hidden_states": True}

    def hidden_state(values):
        return encoder(**{encoder.main_input_name: values}, **kwargs).hidden_states[sense.encoder_select_layer]

    with torch.no_grad():
        if sense.convolutions is None or values.dim() == 3:
            if more and sense.convolutions is not None:
                kwargs |= {"pixel_attention_mask": mask.to(encoder.device), "spatial_shapes": more[0]}
            hidden = hidden_state(values)
            hidden = hidden[:, 0 if sense.encoder_select_feature == "full" else sense.num_class_tokens :]
        else:  # padding would go through norms and attention of some: inputs of one length together, without any
            lengths, hidden = mask.sum(dim=1).tolist(), [None] * len(values)
            for length in set(lengths):
                same = [index for index, own in enumerate(lengths) if own == length]
                for index, one in zip(same, hidden_state(values[same, :length]), strict=True):
                    hidden[index] = one
            hidden = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
        if sense.convolutions is not None:
            lengths = [shortened(length, sense.convolutions) for length in mask.sum(dim=1).tolist()]
            real = torch.arange(hidden.shape[1]) < torch.tensor(lengths).unsqueeze(1)
            hidden = hidden.masked_fill(~real.unsqueeze(-1).to(hidden.device), 0)
    features = projector(hidden)
    if sense.convolutions is None:
        return features.flatten(0, 1)
    counts = torch.tensor(count_placeholders(sense, values, mask)).unsqueeze(1)
    return features[(torch.arange(features.shape[1]) < counts).to(features.device)]


def merge_features(input_ids, embedding, features):
    """Token embeddings [B, S, H] with features in place of placeholders, in reading order. A placeholder never reaches
    the embedding: its id may lie past it.

    features: list of (sense, [T, H] features or `None`, counts): counts, [N], say how many are of which input.
    """
    places = [input_ids == sense.token_id for sense, *_ in features]
    for (sense, own, counts), is_placeholder in zip(features, places, strict=True):
        num_tokens, num_features = int(is_placeholder.sum()), 0 if own is None else len(own)
        if num_tokens != num_features:
            each = f"of {counts[0]}" if len(set(counts)) == 1 else f"of {counts}"
            name = f"{sense.modality}s" if sense.modality == "image" else "clips"
            raise ValueError(
                f"{sense.modality.capitalize()} features and {sense.modality} tokens do not match: {num_features} "
                f"features{'' if own is None else f' ({len(counts)} {name} {each})'}, {num_tokens} {sense.modality} "
                f"tokens (id {sense.token_id}) in input_ids. Were tokens cut off by max_length, or {name} left out? "
                f"Or has the processor another token: from_base(..., {sense.modality}_token_id=processor."
                f"{sense.modality}_token_id)?"
            )
    embeds = embedding(input_ids.masked_fill(torch.stack(places).any(dim=0), 0))
    for (_, own, _), is_placeholder in zip(features, places, strict=True):
        if own is not None:
            own = own.to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(is_placeholder.unsqueeze(-1).to(embeds.device), own)
    return embeds


def is_multimodal(config):
    """Whether a base of this config has a language model inside a model that sees."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def split_inputs(inputs):
    """What a call was given of each modality, modality -> {name: tensor}, taken out of its keywords `inputs`."""
    if inputs.get("input_values") is not None:
        raise ValueError("Audio goes in as input_features and input_features_mask, as the processor makes them.")
    given = {modality: {n: inputs.pop(n) for n in names if n in inputs} for modality, names in INPUTS.items()}
    return {m: own for m, own in given.items() if own.get(INPUTS[m][0]) is not None}


def inputs_per_item(sense, input_ids, counts):
    """[B]: how many inputs each item of `input_ids` [B, S] holds, whose placeholders are `counts` [N], in order."""
    per_item, first = [], 0
    for number in (input_ids == sense.token_id).sum(dim=1).tolist():
        last = first
        while number > 0 and last < len(counts):
            number, last = number - counts[last], last + 1
        per_item.append(last - first)
        first = last
    return per_item


def select_inputs(sense, given, input_ids, past_length):
    """Those of the inputs `given` (name -> [N, ...]) whose placeholders come after the cached `past_length` tokens. A
    user who hands on a cache gives either those of the whole conversation `input_ids` [B, S] or only the new ones."""
    values, mask, *_ = map(given.get, INPUTS[sense.modality])
    counts, new_ids = count_placeholders(sense, values, mask), input_ids[:, past_length:]
    if past_length == 0 or sum(counts) == int((new_ids == sense.token_id).sum()):
        return given
    total = inputs_per_item(sense, input_ids, counts)
    all_tokens, new = (int((ids == sense.token_id).sum()) for ids in (input_ids, new_ids))
    if sum(counts) != all_tokens:
        raise ValueError(
            f"{sense.modality.capitalize()} inputs for {sum(counts)} tokens were given; the conversation has "
            f"{all_tokens}, of which {new} are not in the cache yet. Give all inputs, or just the new ones."
        )
    unseen, first = [], 0
    for number, row in zip(total, new_ids, strict=True):
        remaining, index = int((row == sense.token_id).sum()), first + number
        while remaining > 0 and index > first:
            index, remaining = index - 1, remaining - counts[index - 1]
        unseen += range(index, first + number)
        first += number
    return {name: tensor[unseen] for name, tensor in given.items() if tensor is not None} if unseen else {}


def expand_inputs(sense, given, input_ids, expand_size):
    """name -> [N * expand_size, ...]: repeated item by item, or beams would get their neighbours'."""
    values, mask, *_ = map(given.get, INPUTS[sense.modality])
    order, first = [], 0
    for number in inputs_per_item(sense, input_ids, count_placeholders(sense, values, mask)):
        order += [*range(first, first + number)] * expand_size
        first += number
    return {name: tensor[order] for name, tensor in given.items() if tensor is not None}


def of_base(name):
    return lambda self, *args, **kwargs: getattr(self.base, name)(*args, **kwargs)


class SenseGenerationMixin(GenerationMixin):
    """transformers' `generate` for prompts that hold placeholders, and for prompts of several adapters."""

    def generate(self, inputs: torch.Tensor | None = None, *args, adapter_names: list | None = None, **kwargs) -> Any:
        """As in transformers, by the adapters that are active when it begins; `adapter_names`: see `forward`."""
        prompts = inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"), [None]  # no prompt: one is begun
        with self.passes.using(selection=self.select_adapters(adapter_names, *prompts)):
            return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs) -> Any:
        """As in transformers, by the adapters that are active now. `ValueError`: see `init_continuous_batching`."""
        self.check_prompts(inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs) -> Any:
        """As in transformers (`generate_batch`, `transformers serve --continuous-batching`). `ValueError`: with
        `disable_adapter` or `adapter_names`, of which its thread is not told; what serving/batching.py is without."""
        selection, init = self.select_adapters(), super().init_continuous_batching
        if self.passes.thread.enabled is False or selection.per_item is not None:
            raise ValueError(
                "disable_adapter and adapter_names are one thread's; batches run in another: call disable_adapters() "
                "or set_adapter(...) before."
            )
        serving = [selection.adapters[name] for name in selection.taking_part]
        if all(one.gate is None and not one.encoders for one in serving):
            return init(*args, **kwargs)
        batching = from_package("serving.batching", "Continuous batching with a gate or an encoder")
        return batching.manager_with_gates(init, selection, *args, **kwargs)

    def check_prompts(self, prompts: list[list[int]]) -> None:
        """`ValueError`: one of the `prompts` (lists of ids) of continuous batching holds placeholders."""
        if any(one in prompt for one in self.placeholder_ids for prompt in prompts):
            raise ValueError("Continuous batching takes no images or audio: use generate for prompts that hold them.")

    # Some families bring a cache of their own, take no `inputs_embeds`, or have positions of several dimensions.
    _supports_default_dynamic_cache = of_base("_supports_default_dynamic_cache")
    _prepare_cache_for_generation = of_base("_prepare_cache_for_generation")
    _prepare_model_inputs = of_base("_prepare_model_inputs")
    _prepare_position_ids_for_generation = of_base("_prepare_position_ids_for_generation")

    def _validate_model_kwargs(self, model_kwargs):
        """Without an encoder, the base's own check; what no encoder takes is refused by the pass, which says why."""
        own = () if not self.senses and is_multimodal(self.base.config) else sum(INPUTS.values(), ())
        validate = super()._validate_model_kwargs if self.senses else self.base._validate_model_kwargs
        validate({name: value for name, value in model_kwargs.items() if name not in own})

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, pixel_values: Any = None, **kwargs
    ) -> dict:
        """The base's own preparation; images and audio go with the pass that has their tokens, and with no other."""
        given = {"past_key_values": past_key_values, "pixel_values": pixel_values, **kwargs}
        inputs = self.base.prepare_inputs_for_generation(input_ids, **given)
        if inputs.get("input_ids") is None or not self.senses:
            return inputs
        given, cut = split_inputs(inputs), input_ids.shape[1] - inputs["input_ids"].shape[1]
        for modality, sense in self.senses.items():
            if modality in given:
                inputs |= select_inputs(sense, given[modality], input_ids, cut)
            elif not kwargs.get("is_first_iteration"):
                # An assistant gets the placeholders of the prompt, but generate hands it no inputs: it drafts without.
                is_placeholder = inputs["input_ids"] == sense.token_id
                inputs["input_ids"] = inputs["input_ids"].masked_fill(is_placeholder, 0)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats items for beams; images are per image, not per item, and are repeated with their item."""
        if not self.senses:  # a multimodal base knows its own images
            return self.base._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        inputs = split_inputs(model_kwargs)
        for modality, sense in self.senses.items() if expand_size > 1 else ():
            if modality in inputs:
                inputs[modality] = expand_inputs(sense, inputs[modality], input_ids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        for own in inputs.values():
            model_kwargs |= own
        return input_ids, model_kwargs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        """The usual processors, which index scores by ids: placeholders may lie past the head."""
        vocab_size, prompt = self.get_output_embeddings().weight.shape[0], kwargs.get("encoder_input_ids")
        found = [one for one in self.placeholder_ids if prompt is not None and bool((prompt == one).any())]
        if found:
            past_head = any(not 0 <= one < vocab_size for one in found)
            check_processors(generation_config, kwargs.get("negative_prompt_ids"), past_head)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        return WithPlaceholderColumn(self.placeholder_ids, processors) if self.placeholder_ids else processors

    def _get_candidate_generator(self, *args, **kwargs):
        """The usual one, which never proposes a placeholder."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if not self.placeholder_ids:
            return generator
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.logits_processor = None  # it would look up the score of an image token; proposals are verified
        generator.get_candidates = partial(text_candidates, generator.get_candidates, self.placeholder_ids)
        return generator


def batched_passes(selection, inputs):
    """In a pass of continuous batching, whose requests share one paged cache: what makes each gate's `GatedPass`.
    `ValueError`: the cache holds tokens of other adapters, or has no place for what these gates remember."""
    cache, names = inputs["cache"], selection.taking_part
    serving = [(name, selection.adapters[name], selection.thresholds.get(name)) for name in names]
    gates = getattr(cache, "moextend_gates", None)
    gated = {name for name, adapter, _ in serving if adapter.gate is not None}
    begun = cache.__dict__.setdefault("moextend_adapters", serving)
    if begun != serving or gated - (set() if gates is None else gates.pages.keys()):
        raise ValueError(
            f"Continuous batching was begun by other adapters, or other thresholds of a gate, than {list(names)} now: "
            "call destroy_cached_continuous_batching_manager(), or begin with a new manager."
        )
    return None if gates is None else gates.passes(inputs)


def check_processors(generation_config, negative_prompt_ids, past_head):
    """Refuses, by name, what generates without the prompt's images, or looks image tokens up past the head."""
    scale, penalty = generation_config.guidance_scale, generation_config.encoder_repetition_penalty
    size = generation_config.encoder_no_repeat_ngram_size
    given = {"guidance_scale": scale not in (None, 1), "negative_prompt_ids": negative_prompt_ids is not None}
    given |= {"encoder_repetition_penalty": past_head and penalty not in (None, 1)}
    given |= {"encoder_no_repeat_ngram_size": past_head and bool(size)}
    given |= {"prefill_chunk_size": generation_config.prefill_chunk_size is not None}
    used = [name for name in given if given[name]]
    if used:
        raise ValueError(
            f"{' and '.join(used)} cannot be used in generate with images or audio: guidance runs the model without "
            "them, chunks may cut one in two, encoder_... looks up scores, which ids past the vocabulary have not."
        )


class WithPlaceholderColumn(LogitsProcessorList):
    """Logits processors that see one more column of scores, the placeholders': processors index scores by ids."""

    def __init__(self, placeholder_ids, processors):
        super().__init__(processors)
        self.placeholder_ids = placeholder_ids

    def __call__(self, input_ids, scores, **kwargs):
        vocab_size = scores.shape[-1]
        past_head = [one for one in self.placeholder_ids if not 0 <= one < vocab_size]
        is_placeholder = torch.isin(input_ids, torch.tensor(past_head, device=input_ids.device))
        if not past_head or not is_placeholder.any():
            return super().__call__(input_ids, scores, **kwargs)
        scores = F.pad(scores, (0, 1), value=-torch.inf)
        return super().__call__(input_ids.masked_fill(is_placeholder, vocab_size), scores, **kwargs)[:, :vocab_size]


def text_candidates(get_candidates, placeholder_ids, input_ids, **kwargs):
    """Candidates of assisted generation up to the first placeholder among them."""
    candidates, logits = get_candidates(input_ids, **kwargs)
    length = input_ids.shape[1]
    proposed = candidates[0, length:]
    found = torch.isin(proposed, torch.tensor(placeholder_ids, device=proposed.device)).nonzero()
    number = int(found[0]) if len(found) else candidates.shape[1] - length
    return candidates[:, : length + number], None if logits is None else logits[:, :number]
