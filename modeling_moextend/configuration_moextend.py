"""`MoExtendConfig`: which base, which layers got new experts, how tokens reach them, and where images come from."""

import copy
import math
from operator import index

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

SCOPES = ("all", "modality", "gate")
SELECTIONS = ("compete", "exclusive")
CALIBRATIONS = ("all", "routed", "none")
PAPER = {"scope": "all", "selection": "compete", "calibration": "all"}
SELECT_FEATURES = ("patch", "full")


class MoExtendConfig(PreTrainedConfig):
    r"""
    Everything needed to rebuild an adapter on an unchanged base. The defaults of `scope`, `selection` and
    `calibration` are what a config without these entries means; what a new adapter gets is up to `routing_choices`.

    Args:
        base_model_name_or_path (`str`, *optional*): Hub id or folder of the base.
        base_model_revision (`str`, *optional*): commit the adapter was made on.
        base_fingerprint (`str`, *optional*): 1,024 base values at fixed places, float32, base64.
        text_config (`PreTrainedConfig` or `dict`, *optional*): the base's whole config, unchanged.
        encoder_name_or_path (`str`, *optional*): CLIP or SigLIP vision checkpoint; `None` for text only.
        encoder_config (`PreTrainedConfig` or `dict`, *optional*): the encoder's vision config.
        encoder_fingerprint (`str`, *optional*): like `base_fingerprint`.
        encoder_select_layer (`int`): which hidden state of the encoder is projected (LLaVA-1.5: -2).
        encoder_select_feature (`str`): `"patch"` drops the class token, `"full"` keeps it.
        projector_hidden_act (`str`): activation between the projector's two linear layers.
        image_token_id (`int`, *optional*): id standing for an image feature; may lie past the embedding.
        extended_layers (`dict[int, list[int]]`): decoder layer index -> source expert of each new expert.
        scope (`str`): tokens that may use new experts: `"all"`, `"modality"` (from the first image token on), or
            `"gate"` (those that a learned, causal gate lets through).
        selection (`str`): `"compete"` (one top-k over old and new rows, the paper) or `"exclusive"`.
        calibration (`str`): `"all"` (the paper), `"routed"` or `"none"`.
        calibration_hidden_size (`int`): inner width of the calibration.
        gate_hidden_size (`int`): width D of the gate.
        gate_threshold (`float`): the gate lets a token through when its routing margin is above this; the higher, the
            fewer tokens. Can be changed after training (`model.gate_threshold = ...`).
        routing_rule (`dict`, *optional*): entries of `routing_moextend.Rule`: how the base's routers work, found when
            the experts were attached. Adapters of version 0.1.0 have three of them; the rest is found anew.

    Raises:
        ValueError: a value outside the allowed ones, or a combination without meaning.
    """

    model_type = "moextend"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}

    def __init__(
        self,
        base_model_name_or_path=None,
        base_model_revision=None,
        base_fingerprint=None,
        text_config=None,
        encoder_name_or_path=None,
        encoder_config=None,
        encoder_fingerprint=None,
        encoder_select_layer=-2,
        encoder_select_feature="patch",
        projector_hidden_act="gelu",
        image_token_id=None,
        extended_layers=None,
        scope="all",
        selection="compete",
        calibration="all",
        calibration_hidden_size=16,
        gate_hidden_size=64,
        gate_threshold=0.0,
        routing_rule=None,
        **kwargs,
    ):
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_fingerprint = base_fingerprint
        self.text_config = as_config(text_config)
        self.encoder_name_or_path = encoder_name_or_path
        self.encoder_config = as_config(encoder_config)
        self.encoder_fingerprint = encoder_fingerprint
        self.encoder_select_layer = encoder_select_layer
        self.encoder_select_feature = encoder_select_feature
        self.projector_hidden_act = projector_hidden_act
        self.image_token_id = image_token_id
        self.extended_layers = normalise_plan(extended_layers)
        self.scope, self.selection, self.calibration = scope, selection, calibration
        self.calibration_hidden_size = calibration_hidden_size
        self.gate_hidden_size, self.gate_threshold = gate_hidden_size, gate_threshold
        self.routing_rule = routing_rule
        kwargs.setdefault("tie_word_embeddings", False)  # the base ties its own weights; nothing here is tied
        super().__init__(**kwargs)
        check_routing_choices(self)
        check_vision_choices(self)

    @property
    def num_image_tokens(self):
        """Features (and so image tokens) one image gives; 0 without an encoder."""
        if self.encoder_config is None:
            return 0
        return count_image_tokens(self.encoder_config, self.encoder_select_feature)

    def get_text_config(self, decoder=None, encoder=None):
        """A view of the language model's config: trainers write to it, and the base's own must not change.

        Its `router_aux_loss_coef` is 0: TRL's load-balancing loss needs layers of one width. The base's own stands in
        `text_config`, and `MoExtendSFTTrainer` goes by that.
        """
        if self.text_config is None:
            return self
        view = self.__dict__.get("_text_view")
        if view is None:
            view = self.__dict__["_text_view"] = copy.deepcopy(self.text_config.get_text_config())
            view.router_aux_loss_coef = 0.0
        return view

    def to_dict(self):
        """As JSON-ready `dict`: layer indices as strings, the view of `text_config` left out."""
        output = super().to_dict()
        output.pop("_text_view", None)
        output["extended_layers"] = {str(layer): list(sources) for layer, sources in self.extended_layers.items()}
        return output

    def to_diff_dict(self):
        """The whole config: an adapter must not depend on a later version's defaults."""
        return self.to_dict()

    def published(self):
        """The config as it is saved: with the auto classes that load it, and without the place it was loaded from."""
        config = copy.deepcopy(self)
        config.name_or_path = ""
        config.architectures = ["MoExtendForCausalLM"]
        config.auto_map = {
            "AutoConfig": "configuration_moextend.MoExtendConfig",
            "AutoModel": "modeling_moextend.MoExtendModel",
            "AutoModelForCausalLM": "modeling_moextend.MoExtendForCausalLM",
            "AutoModelForImageTextToText": "modeling_moextend.MoExtendForCausalLM",
            # No decision model: the only auto class that `transformers serve` asks for remote code (5.23).
            "AutoModelForDecision": "modeling_moextend.MoExtendForCausalLM",
        }
        return config


class UnknownConfig(PreTrainedConfig):
    """Stands for the config of a base with code of its own, until that base is loaded and brings its class."""


def as_config(config):
    """A config object from a config object, a `dict` with `model_type`, or `None`."""
    if isinstance(config, dict):
        config = dict(config)
        model_type = config.pop("model_type")
        return AutoConfig.for_model(model_type, **config) if model_type in CONFIG_MAPPING else UnknownConfig(**config)
    return config


def has_class_token(encoder_config):
    """CLIP prepends a class token to its patches, SigLIP does not."""
    return "clip" in encoder_config.model_type and "siglip" not in encoder_config.model_type


def count_image_tokens(encoder_config, select_feature="patch"):
    """P, the features an image gives: (image_size // patch_size)^2, and the class token with "full".

    Raises:
        ValueError: an unknown `select_feature`.
    """
    config = getattr(encoder_config, "vision_config", encoder_config)
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"select_feature={select_feature!r} is unknown; it must be 'patch' or 'full'.")
    patches = (config.image_size // config.patch_size) ** 2
    return patches + (1 if select_feature == "full" and has_class_token(config) else 0)


def normalise_plan(plan):
    """`{layer: [source experts]}` with `int` keys in ascending order; JSON has only string keys.

    Raises:
        ValueError: a plan that is no mapping, a key or source that is no integer, or a layer without sources.
    """
    if plan is None:
        return {}
    if not hasattr(plan, "items"):
        raise ValueError(f"extended_layers must map layers to source experts, like {{2: [1]}}, not {plan!r}.")
    try:
        if any(isinstance(source, bool) for sources in plan.values() for source in sources):
            raise TypeError("True and False are no experts")
        plan = {
            int(layer) if isinstance(layer, str) else index(layer): [index(source) for source in sources]
            for layer, sources in plan.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(
            "extended_layers must map a layer index to a list of source experts, like {2: [1], 5: [3, 0]}; "
            f"got {plan!r}."
        ) from error
    empty = [layer for layer, sources in plan.items() if not sources]
    if empty:
        raise ValueError(f"extended_layers names no source expert for layers {empty}: leave these layers out instead.")
    return dict(sorted(plan.items()))


def routing_choices(scope=None, selection=None, calibration=None, paper=False, has_encoder=False):
    """The three choices of a new adapter as a `dict`, those left at `None` filled in.

    | | `None` means | with `paper` |
    |---|---|---|
    | scope | `"modality"` with an encoder, else `"gate"` | `"all"` |
    | selection | `"exclusive"` | `"compete"` |
    | calibration | `"none"` with exclusive selection, else `"routed"` | `"all"` |

    Raises:
        ValueError: `paper`, and a choice that is not the paper's.
    """
    given = {"scope": scope, "selection": selection, "calibration": calibration}
    if paper:
        others = {name: value for name, value in given.items() if value not in (None, PAPER[name])}
        if others:
            raise ValueError(f"paper=True means {PAPER}, but {others} was given: leave out one or the other.")
        return dict(PAPER)
    if scope is None:
        given["scope"] = "modality" if has_encoder else "gate"
    if selection is None:
        given["selection"] = "exclusive"
    if calibration is None:
        given["calibration"] = "none" if given["selection"] == "exclusive" else "routed"
    return given


def check_routing_choices(config):
    """Refuses what is not allowed, with the reason.

    Raises:
        ValueError: names the value, the allowed ones and the way out.
    """
    choices = {"scope": SCOPES, "selection": SELECTIONS, "calibration": CALIBRATIONS}
    choices["encoder_select_feature"] = SELECT_FEATURES
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not known; allowed: {', '.join(map(repr, allowed))}."
            )
    if config.selection == "exclusive" and config.calibration != "none":
        raise ValueError(
            f"selection='exclusive' with calibration={config.calibration!r} has no meaning: the weights of new "
            "experts already sum to what the base's own weights sum to. Use calibration='none' or "
            "selection='compete'."
        )
    config.gate_threshold = check_threshold(config.gate_threshold)
    if isinstance(config.gate_hidden_size, bool) or not isinstance(config.gate_hidden_size, int):
        raise ValueError(f"gate_hidden_size={config.gate_hidden_size!r} must be an integer, like 64.")
    if config.gate_hidden_size < 1:
        raise ValueError(f"gate_hidden_size={config.gate_hidden_size} must be at least 1.")
    if config.scope == "modality" and config.encoder_name_or_path is None and config.encoder_config is None:
        raise ValueError("scope='modality' needs an encoder: without images no token would ever use a new expert.")


def check_threshold(threshold):
    """`threshold` as a float.

    Raises:
        ValueError: no finite number (a JSON file holds no other).
    """
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(threshold, bool) or not math.isfinite(value):
        raise ValueError(
            f"gate_threshold={threshold!r} is no finite number. 0 is where the gate was trained to decide; 1e9 "
            "lets no token through, -1e9 every one."
        )
    return value


def check_vision_choices(config):
    """Refuses a projector activation or an encoder layer that does not exist.

    Raises:
        ValueError: names the value and the allowed ones.
    """
    if config.projector_hidden_act not in ACT2FN:
        raise ValueError(
            f"projector_hidden_act={config.projector_hidden_act!r} is not known; allowed: {', '.join(sorted(ACT2FN))}."
        )
    depth = getattr(config.encoder_config, "num_hidden_layers", None)
    if depth is not None and config.encoder_select_layer not in range(-depth - 1, depth + 1):
        raise ValueError(
            f"encoder_select_layer={config.encoder_select_layer} is out of range: an encoder of {depth} layers has "
            f"hidden states {-depth - 1} to {depth} (0: the embeddings, -1: the last)."
        )
