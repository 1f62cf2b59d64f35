"""The adapters that a server begins with: read whole, checked against the base's own files, and put on a device."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.config import VllmConfig

from ...adapter_file_moextend import check_tensors
from ...base_checks_moextend import check_plan
from ...configuration_moextend import MoExtendConfig
from ...deltas_moextend import Delta, EmbeddingDelta, LinearDelta, find_sites
from ...families_moextend import MoELayer, find_moe_layers
from ...gate_moextend import TokenGate
from ...layers_moextend import RouterRows
from ...loading_moextend import load_stored
from ...low_rank_moextend import whole_weights
from ...routing_moextend import Calibration, Rule
from ...senses_moextend import Projector, encoder_of, load_encoder
from ...tensors_moextend import fingerprint, same_fingerprint, split_by_part, tensor_shapes
from ...tools.base_weights import Checkpoint, checkpoint_fingerprint, location_of_part, skeleton
from ...tools.inspection import read_whole
from .refusals import check_adapter, check_family, refuse


class Source(NamedTuple):
    """Where a model lies: folder or Hub id, with keywords for the Hub."""

    name: str
    options: dict[str, Any]


class ServedAdapter(NamedTuple):
    """One adapter, ready to be served."""

    source: Source
    config: MoExtendConfig
    checksum: str  # over its tensors
    rows: dict[int, RouterRows]  # by decoder layer
    experts: dict[int, dict[str, torch.Tensor]]  # by decoder layer: name in the base's module -> [n, ...], on the CPU
    deltas: dict[str, Delta]  # by the name of their site
    gate: TokenGate | None
    encoder: PreTrainedModel | None
    projector: Projector | None

    @property
    def lowest(self) -> int:
        """The layer in which it is decided which tokens are in its scope."""
        return min(self.config.extended_layers)

    @property
    def rule(self) -> Rule:
        return Rule(**self.config.routing_rule)


def sources(config: VllmConfig) -> tuple[list[Source], Source | None]:
    """The adapters that this server begins with, and the base where an adapter is in the model's place."""
    model = config.model_config
    one = getattr(model.hf_config, "moextend_adapter", None)
    shared = {"cache_dir": config.load_config.download_dir} if config.load_config.download_dir else {}
    if one is not None:
        if model.revision not in (None, "main") and not os.path.isdir(one["name_or_path"]):
            way = "download it (hf download ... --revision ... --local-dir FOLDER), and serve the folder."
            refuse(f"The adapter {one['name_or_path']}", [f"--revision {model.revision} does not reach it: {way}"])
        return [Source(one["name_or_path"], shared)], None
    several = getattr(model.hf_config, "moextend_adapters", None)
    if not isinstance(several, (list, tuple)) or not several or not all(isinstance(name, str) for name in several):
        raise ValueError(
            f"moextend_adapters={several!r} in --hf-overrides must be a list of folders or Hub ids of adapters, those "
            "that requests can name."
        )
    same = [name for name in several if list(map(place, several)).count(place(name)) > 1]
    if same:
        raise ValueError(f"moextend_adapters names {same[0]} twice.")
    return [Source(name, shared) for name in several], Source(model.model, shared | {"revision": model.revision})


def place(name: str) -> str:
    """One spelling of a folder, or the Hub id as it is."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def load_adapters(config: VllmConfig, device: torch.device) -> tuple[list[ServedAdapter], Source]:
    """Reads every adapter, and checks that it is whole and was made on this base: -> adapters and base.

    Raises:
        OSError, ValueError: there is none, it is damaged, of another base, or can't be served.
    """
    adapter_sources, base = sources(config)
    with torch_defaults():
        stored = [read_whole(source.name, **source.options) for source in adapter_sources]
        configs = [one.config_for_loading() for one in stored]
        for source, own in zip(adapter_sources, configs, strict=True):
            check_adapter(own, source.name, among_others=base is not None)
            if own.generation_config and base is not None:
                changed = ", ".join(own.generation_config)
                why = f"it changes the base's generation config ({changed}), which holds for a whole server."
                refuse(f"The adapter {source.name} among others", [why])
        if base is None:
            (source,), (own,) = adapter_sources, configs
            base = Source(*location_of_part("base", None, own, (source.name, source.options)))
        checkpoint = Checkpoint(base.name, **base.options)
        model = skeleton(checkpoint.config())
        check_family(model.config, adapter_sources[0].name)
        found, layers = checkpoint_fingerprint(checkpoint, model), find_moe_layers(model.get_decoder())
        adapters = []
        for source, own, one in zip(adapter_sources, configs, stored, strict=True):
            own.set_text_config(model.config)
            if own.base_fingerprint and not same_fingerprint(own.base_fingerprint, found):
                raise ValueError(
                    f"{base.name} is a different base than the adapter {source.name} was made on: its weights do not "
                    "match the adapter's base fingerprint. Serve the right base with the adapter in moextend_adapters."
                )
            check_plan(layers, own.extended_layers)
            sites = find_sites(own, model.get_decoder())
            check_tensors(tensor_shapes(own, layers, sites), one)
            parts = split_by_part(one.tensors, sites)
            dtype = config.model_config.dtype
            experts = whole_experts(own, parts, layers, checkpoint, model, dtype)
            modules = (rows_of(own, parts, layers, device, dtype), experts, deltas_of(parts, sites, device, dtype))
            vision = vision_of(own, parts, source, device, dtype)
            checksum = one.metadata.get("checksum", "")
            adapters.append(ServedAdapter(source, own, checksum, *modules, gate_of(own, parts, device), *vision))
    return adapters, base


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """torch's own default dtype and device, which vLLM sets to the model's while it builds one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def wider(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """In its own dtype or the base's, whichever is wider, as in transformers."""
    return tensor.to(device, torch.promote_types(tensor.dtype, dtype))


def rows_of(config, parts, layers, device, dtype) -> dict[int, RouterRows]:
    """Decoder layer -> `RouterRows`, with their calibration."""
    found = {}
    for layer, sources_of_layer in config.extended_layers.items():
        own = {role: wider(tensor, device, dtype) for role, tensor in parts[layer].items()}
        rows = found[layer] = RouterRows(len(sources_of_layer), config)
        for role, tensor in own.items():
            part, _, name = role.partition(".")
            if part == "router":
                setattr(rows, name, tensor if name in rows._buffers else nn.Parameter(tensor, requires_grad=False))
        if config.calibration != "none":
            size = layers[layer].num_experts + rows.num_new
            rows.calibration = Calibration(size, config.calibration_hidden_size, device="meta")
            tensors = {role.partition(".")[2]: t for role, t in own.items() if role.startswith("calibration.")}
            rows.calibration.load_state_dict(tensors, assign=True)
        rows.requires_grad_(False)
    return found


def whole_experts(
    config: MoExtendConfig,
    parts: dict,
    layers: dict[int, MoELayer],
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    dtype: torch.dtype,
) -> dict[int, dict[str, torch.Tensor]]:
    """Decoder layer -> tensors of the new experts; of a low rank, merged with their sources from the base's files."""
    names, found = {module: name for name, module in model.named_modules()}, {}
    for layer, numbers in config.extended_layers.items():
        own = {role[len("experts.") :]: t for role, t in parts[layer].items() if role.startswith("experts.")}
        found[layer] = {name: tensor for name, tensor in own.items() if "." not in name}
        experts = layers[layer].experts
        for stack in sorted({name.partition(".")[0] for name in own if "." in name}):
            full_name, shape = f"{names[experts]}.{stack}", experts._parameters[stack].shape
            source = checkpoint.experts(model, full_name, shape, numbers).to(dtype)
            factors = (wider(own[f"{stack}.{factor}"], source.device, dtype) for factor in ("lora_A", "lora_B"))
            found[layer][stack] = whole_weights(source, *factors, experts.is_transposed)
    return found


def deltas_of(parts, sites, device, dtype) -> dict[str, Delta]:
    """Name of a site -> what the adapter adds there; products in bfloat16 where the base is, as in transformers."""
    found = {}
    for site in sites:
        kind = EmbeddingDelta if site.endswith(".embedding") else LinearDelta
        half = kind is LinearDelta and dtype == torch.bfloat16
        to = (lambda tensor: tensor.to(device, dtype)) if half else (lambda tensor: wider(tensor, device, dtype))
        found[site] = kind({name: to(tensor) for name, tensor in parts[site].items()})
        found[site].requires_grad_(False)
    return found


def gate_of(config, parts, device) -> TokenGate | None:
    if config.scope != "gate":
        return None
    gate = TokenGate(parts["gate"]["key.weight"].shape[1], config.gate_hidden_size, device=device)
    gate.load_state_dict(parts["gate"])
    return gate.requires_grad_(False)


def vision_of(config, parts, source, device, dtype) -> tuple[PreTrainedModel | None, Projector | None]:
    """The adapter's encoder, checked, and its projector: transformers' own code, as in `generate`."""
    if config.encoder_config is None:
        return None, None
    encoder = load_stored("encoder", None, config, load_encoder, (source.name, source.options), dtype=dtype)
    encoder = encoder_of(encoder)
    if config.encoder_fingerprint and not same_fingerprint(config.encoder_fingerprint, fingerprint(encoder)):
        raise ValueError(f"The encoder of {source.name} is a different one than the adapter was made with.")
    projector = Projector(config.senses["image"], config.get_text_config().hidden_size, device="meta")
    tensors = {name: wider(tensor, device, dtype) for name, tensor in parts["projector"].items()}
    projector.load_state_dict(tensors, assign=True)
    return encoder.to(device).eval(), projector.requires_grad_(False)
