"""What `from_base` does: a base is loaded and checked, its rule found, and the first adapter attached."""

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..base_checks_moextend import check_layout, check_not_extended, check_plan
from ..configuration_moextend import normalise_plan, routing_choices
from ..families_moextend import find_moe_layers
from ..loading_moextend import identity, load_base, load_new_encoder, undone_on_error
from .layouts import check_request
from .rules import complete_rule


def extend_base(cls, base, extended_layers, encoder, choices, image_token_id, adapter_name, entries, options):
    """See `from_base`, of the class `cls`.

    Args:
        choices: keywords of `routing_choices`.
        entries: more of the config, name -> value.
        options: to the base's `from_pretrained`.
    """
    plan = normalise_plan(extended_layers)
    choices = routing_choices(**choices, has_encoder=encoder is not None)
    if not plan and encoder is None:
        raise ValueError(
            "Nothing to add: extended_layers is empty and there is no encoder. Name layers and source experts, "
            "like extended_layers={2: [1]}, or pass encoder=... to begin with a projector."
        )
    if not isinstance(base, PreTrainedModel):
        check_request(base, options)
        base = load_base(base, cls.auto_base_class, **options)
    check_not_extended(base)
    check_causal_lm(base, cls.auto_base_class)
    check_layout(base)
    layers = find_moe_layers(base.get_decoder())
    check_plan(layers, plan)
    encoder = load_new_encoder(encoder, base, options)
    config = cls.config_class(
        **identity(base, encoder),
        image_token_id=base.get_input_embeddings().weight.shape[0] if image_token_id is None else image_token_id,
        extended_layers=plan,
        routing_rule=complete_rule({}, layers, plan)._asdict(),
        dtype=base.dtype,
        **choices,
        **entries,
    )
    with undone_on_error(base, encoder):
        return cls(config, base, encoder, adapter_name=adapter_name)


def check_causal_lm(base, auto_class):
    """Refuses what is no causal LM."""
    if auto_class is AutoModelForCausalLM and (
        base.config.is_encoder_decoder or base.get_output_embeddings() is None or not base.can_generate()
    ):
        raise ValueError(
            f"{type(base).__name__} is no causal LM (it has no language-model head of its own): pass the "
            "...ForCausalLM."
        )
