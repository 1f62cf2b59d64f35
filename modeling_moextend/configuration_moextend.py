"""`MoExtendConfig`: which base, which layers got new experts, how tokens reach them, and what else it senses."""

import contextlib
import copy
import math
from operator import index
from typing import Self

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .validation_moextend import DEFAULTS, is_whole, nested_problems, problems_of, short

DELTAS = {"embedding": 0, "attention": 16, "output": 0}  # kind -> rank where none is given; 0: the whole matrix
LATER = ("projector_type", "projector_downsample")  # entries that files of earlier versions do not have
MAX_INDEX = 2**31
is_rank = is_whole(0, 4096)
AUTO_MAP = {
    "AutoConfig": "configuration_moextend.MoExtendConfig",
    "AutoModel": "modeling_moextend.MoExtendModel",
    **dict.fromkeys(("AutoModelForCausalLM", "AutoModelForImageTextToText"), "modeling_moextend.MoExtendForCausalLM"),
    "AutoModelForDecision": "modeling_moextend.MoExtendForCausalLM",  # all that `transformers serve` 5.23 looks for
}
MODALITIES = {"image": "", "audio": "audio_"}  # modality -> how the entries and the projector of its sense begin
CALLERS = ("attn_implementation", "experts_implementation")  # what only a call says, never a file


class MoExtendConfig(PreTrainedConfig):
    """Everything needed to rebuild an adapter on an unchanged base: the entries of `OWN`, and transformers' own.
    `ValueError`: values outside the allowed ones (all of them named), or a combination without meaning."""

    model_type = "moextend"
    sub_configs = dict.fromkeys(("text_config", "encoder_config", "audio_encoder_config"), AutoConfig)

    def __init__(self, /, **entries):  # a file may hold an entry of any name, "self" as well
        for name, default in DEFAULTS.items():
            setattr(self, name, entries.pop(name, default))
        self.trained_on = self.trained_on or []
        check_entries(self, entries)
        entries.setdefault("tie_word_embeddings", False)  # the base ties its own weights; nothing here is tied
        super().__init__(**entries)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> Self:
        """As in transformers, without what is no file's to say: private attributes, and kernels, which are code."""
        private = {name for name in config_dict if name.startswith("_") and name != "_name_or_path"}
        ours = {name: config_dict[name] for name in config_dict if name not in {*CALLERS, *private}}
        called = {name: kwargs.pop(name) for name in ("generation_config",) if hasattr(kwargs.get(name), "to_dict")}
        found = super().from_dict(ours, **kwargs)  # without what is for the model
        return (found[0], found[1] | called) if isinstance(found, tuple) else found

    @property
    def senses(self) -> dict[str, "Sense"]:
        """Modality -> what the config says of its sense, for those that the adapter has."""
        senses = {modality: Sense(self, modality) for modality in MODALITIES}
        return {modality: sense for modality, sense in senses.items() if sense.encoder_config is not None}

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that an image of the encoder's own size takes; 0 without an encoder."""
        sense = self.senses.get("image")
        return 0 if sense is None else sense.num_placeholders()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """A view of the language model's config: trainers write to it, and the base's own must not change. Its
        `router_aux_loss_coef` is 0: TRL's load-balancing loss needs layers of one width."""
        if self.text_config is None:
            return self
        view = self.__dict__.get("_text_view")
        if view is None:
            view = self.__dict__["_text_view"] = copy.deepcopy(self.text_config.get_text_config())
            view.router_aux_loss_coef = 0.0
        return view

    def set_text_config(self, config: PreTrainedConfig) -> None:
        """Takes the config of the base that is there, a copy; the view of an earlier one is forgotten."""
        self.text_config = copy.deepcopy(config)
        self.__dict__.pop("_text_view", None)

    def to_dict(self) -> dict:
        """As JSON-ready `dict`: layer indices as strings, the view of `text_config` left out."""
        output = super().to_dict()
        output.pop("_text_view", None)
        if not self.deltas:  # as in files of earlier versions
            del output["deltas"]
        if self.expert_rank is None:  # as in files of earlier versions
            del output["expert_rank"]
        absent = [name for name in LATER if output[name] == DEFAULTS[name]]  # as in files of earlier versions
        absent += [name for name in DEFAULTS if name.startswith("audio_") and "audio" not in self.senses]
        for name in absent:
            del output[name]
        output["extended_layers"] = {str(layer): list(sources) for layer, sources in self.extended_layers.items()}
        return output

    to_diff_dict = to_dict  # the whole config: an adapter must not depend on a later version's defaults

    def published(self, with_code: bool = True) -> Self:
        """The config as it is saved: with the auto classes of its code, and without where it was loaded from."""
        config = copy.deepcopy(self)
        forget_places(config)
        config.base_subfolder = config.encoder_subfolder = config.audio_encoder_subfolder = None  # of a standalone one
        config.architectures = ["MoExtendForCausalLM"]
        config.__dict__.pop("auto_map", None)
        if with_code:
            config.auto_map = dict(AUTO_MAP)
        return config


def forget_places(value):
    """Takes out of a config, and of those inside it, where they were loaded from: folders of this machine, maybe."""
    entries = vars(value) if isinstance(value, PreTrainedConfig) else value if isinstance(value, dict) else {}
    for name, entry in entries.items():
        forget_places(entry)
        if name in ("_name_or_path", "name_or_path"):
            entries[name] = ""


class UnknownConfig(PreTrainedConfig):
    """Stands for the config of a base with code of its own, until that base is loaded and brings its class."""


def as_config(config):
    """A config object from a config object, a `dict` with `model_type`, or `None`."""
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"a config must be a mapping with a model_type, not {short(config)}.")
    config = dict(config)
    model_type = config.pop("model_type")
    known = model_type in CONFIG_MAPPING
    problems = nested_problems(config, CONFIG_MAPPING[model_type] if known else UnknownConfig)
    if problems:
        raise ValueError("; ".join(problems))
    try:
        return AutoConfig.for_model(model_type, **config) if known else UnknownConfig(**config)
    except Exception as error:  # whatever a class of transformers makes of values that it does not expect
        raise ValueError(f"no config of a {short(model_type)} model: {short(str(error))}") from error


class Sense:
    """What a config says of one sense: its entries by the names that those of images have."""

    def __init__(self, config: MoExtendConfig, modality: str):
        self.config, self.modality = config, modality

    def __getattr__(self, entry):
        if entry in ("config", "modality") or entry.startswith("__"):  # of a copy that is not filled yet
            raise AttributeError(entry)
        return getattr(self.config, MODALITIES[self.modality] + entry)

    def __repr__(self):  # without the whole config
        return f"Sense({self.modality}: {self.encoder_name_or_path!r}, token {self.token_id})"

    @property
    def token_id(self) -> int:
        """What stands for its features in `input_ids`."""
        return getattr(self.config, f"{self.modality}_token_id")

    @property
    def convolutions(self) -> list | None:
        """[kernel, stride, padding] of all that shortens an input on its way to features, where their number depends
        on its length: of audio; of SigLIP 2's patches, which nothing shortens. `None`: on its shape alone."""
        encoder = self.encoder_config
        if hasattr(encoder, "conv_kernel"):  # Wav2Vec2, HuBERT, WavLM
            return [
                [kernel, stride, 0] for kernel, stride in zip(encoder.conv_kernel, encoder.conv_stride, strict=True)
            ]
        if hasattr(encoder, "max_source_positions"):  # Whisper
            return [[3, 1, 2], [3, 2, 2]]
        return [] if self.modality == "image" and not hasattr(encoder, "image_size") else None

    @property
    def input_shape(self) -> list | None:
        """[channels, height, width] of images, [mel bins, frames], or of AST [frames, mel bins]; `None`: any."""
        encoder = self.encoder_config
        if hasattr(encoder, "max_source_positions"):
            return [encoder.num_mel_bins, 2 * encoder.max_source_positions]
        if self.convolutions is not None:
            return None
        audio, image = ("max_length", "num_mel_bins"), ("num_channels", "image_size", "image_size")
        return [getattr(encoder, name) for name in (audio if self.modality == "audio" else image)]

    @property
    def num_class_tokens(self) -> int:
        """Tokens in front of the patches: CLIP and DINOv2 have a class token (and registers), AST two, SigLIP none."""
        model_type, registers = self.encoder_config.model_type, getattr(self.encoder_config, "num_register_tokens", 0)
        known = {"siglip": 0, "clip": 1, "dinov2": 1, "vit": 1, "audio-spectrogram": 2}
        return registers + next((number for name, number in known.items() if name in model_type), 0)

    def num_placeholders(self, size: tuple | None = None) -> int:
        """Placeholders that an input takes: of an image by its (height, width), default the encoder's own; of frames,
        samples or patches in a list by their number."""
        if self.convolutions is not None:
            number = shortened(self.encoder_config.num_patches if size is None else size, self.convolutions)
        else:
            encoder, (height, width) = self.encoder_config, self.input_shape[-2:] if size is None else size
            steps = [getattr(encoder, name, encoder.patch_size) for name in ("time_stride", "frequency_stride")]
            height, width = (
                (side - encoder.patch_size) // step + 1 for side, step in zip((height, width), steps, strict=True)
            )
            number = height * width + (self.num_class_tokens if self.encoder_select_feature == "full" else 0)
        return -(-number // self.projector_downsample)


def shortened(length, convolutions):
    """How many features `length` values give after `convolutions`, each [kernel, stride, padding]."""
    for kernel, stride, padding in convolutions:
        length = max((length + padding - kernel) // stride + 1, 0)
    return length


def normalise_plan(plan):
    """`{layer: [source experts]}` with `int` keys in ascending order; JSON has only string keys."""
    try:
        given = {} if plan is None else plan.items()
        if any(isinstance(source, bool) for _, sources in given for source in sources):
            raise ValueError("True and False are no experts")
        layers = [
            (int(layer) if isinstance(layer, str) else index(layer), [index(source) for source in sources])
            for layer, sources in given
        ]
        numbers = [number for layer, sources in layers for number in (layer, *sources)]
        if len(dict(layers)) < len(layers) or not all(-MAX_INDEX < number < MAX_INDEX for number in numbers):
            raise ValueError("a layer is named twice, or a number is no index")
        empty = [layer for layer, sources in layers if not sources]
        if empty:
            raise ValueError(f"no source expert for layers {short(empty)}: leave these layers out")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "extended_layers must map a layer index to a list of source experts, like {2: [1], 5: [3, 0]}; "
            f"got {short(plan)} ({short(str(error))})."
        ) from error
    return dict(sorted(layers))


def normalise_deltas(deltas):
    """`{kind: rank}` of an adapter's deltas, from such a mapping, or from kinds alone, with the ranks of `DELTAS`."""
    chosen = deltas
    if deltas is None or isinstance(deltas, (list, tuple, set, frozenset)):
        chosen = {kind: DELTAS.get(kind) for kind in map(str, deltas or ())}
    if not hasattr(chosen, "items") or any(kind not in DELTAS or not is_rank(rank) for kind, rank in chosen.items()):
        raise ValueError(
            f"deltas={short(deltas)} must be any of {', '.join(map(repr, DELTAS))}, as a list, or a mapping from "
            "these to ranks (integers from 1 to 4096; 0 for whole matrices)."
        )
    return {kind: chosen[kind] for kind in DELTAS if kind in chosen}


def check_entries(config, others):
    """Brings the entries of a new config into their form, or refuses them; `others` go to transformers."""
    entries = {**vars(config), **others}
    problems = problems_of(entries, type(config))
    forms = dict.fromkeys(type(config).sub_configs, as_config)
    forms |= {"extended_layers": normalise_plan, "gate_threshold": check_threshold, "deltas": normalise_deltas}
    for name, form in forms.items():
        try:
            setattr(config, name, form(entries[name]))
        except ValueError as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
    check_choices(config, problems)


def check_choices(config, problems=()):
    """Refuses a config with `problems`, or entries that are not allowed, or have no meaning together."""
    problems = problems or problems_of({name: getattr(config, name) for name in DEFAULTS}, type(config))
    problems = problems or meaning_problems(config)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(lines if len(problems) == 1 else f"The config has {len(problems)} wrong entries.\n  {lines}")


def meaning_problems(config):
    """Combinations of allowed values that have no meaning, a line each."""
    problems = []
    if config.selection == "exclusive" and config.calibration != "none":
        problems.append(
            f"selection='exclusive' with calibration={config.calibration!r} has no meaning: weights of new experts "
            "already sum to what the base's sum to. Use calibration='none' or selection='compete'."
        )
    given = [config.encoder_name_or_path, config.audio_encoder_name_or_path, *config.senses]
    if config.scope == "modality" and not any(given):
        problems.append("scope='modality' needs an encoder: without images no token would ever use a new expert.")
    ids = [sense.token_id for sense in config.senses.values() if sense.token_id is not None]
    if len(ids) > len(set(ids)):
        problems.append(f"image_token_id and audio_token_id are both {ids[0]}: one token can't stand for both.")
    for sense in config.senses.values():
        depth = getattr(sense.encoder_config, "num_hidden_layers", None)
        if depth is not None and sense.encoder_select_layer not in range(-depth - 1, depth + 1):
            problems.append(
                f"{MODALITIES[sense.modality]}encoder_select_layer={sense.encoder_select_layer} is out of range: an "
                f"encoder of {depth} layers has hidden states {-depth - 1} to {depth} (0: the embeddings, -1: the "
                "last)."
            )
    return problems


def check_threshold(threshold):
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(threshold, bool) and math.isfinite(float(threshold)):
            return float(threshold)
    meaning = "0 is where the gate was trained to decide; 1e9 lets no token through, -1e9 every one"
    raise ValueError(f"gate_threshold={short(threshold)} is no finite number. {meaning}.")
