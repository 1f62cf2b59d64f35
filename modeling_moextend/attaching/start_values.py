"""Where every new tensor starts."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..deltas_moextend import Site, delta_shapes, find_sites
from ..families_moextend import MoELayer, correction_of, onloaded, tensor_at
from ..gate_moextend import TokenGate
from ..layers_moextend import execution_device, input_device
from ..low_rank_moextend import expert_shapes
from ..routing_moextend import Calibration, Rule
from ..senses_moextend import Projector
from ..tensors_moextend import row_paths


def start_tensors(
    config: MoExtendConfig,
    layers: dict[int, MoELayer],
    base: PreTrainedModel,
    plan: dict[int, list[int]] | None = None,
    sites: dict[str, Site] | None = None,
    *,
    with_gate: bool = True,
    with_projector: bool = True,
) -> dict[str, torch.Tensor]:
    """Every tensor of a new adapter by role, in float32; of one that is extended, those of the layers of `plan`.

    | tensor | start | why |
    |---|---|---|
    | expert | copy of its source expert | Eq. 8: knows what the base knows |
    | expert with a rank | lora_A as in PEFT (Kaiming), lora_B zero | its source expert, bit for bit |
    | router row, bias, correction bias, scale | copy of its source's | Eq. 8: chosen and weighed where its source is |
    | calibration fc1 | uniform, 1/sqrt(E + N) (nn.Linear's) | something to learn from |
    | calibration fc2 | zero | identity at first |
    | gate | `TokenGate`: last layer zero, bias -1 | closed: an untrained adapter is the base, bit for bit |
    | projector | nn.Linear's | learns in stage align |
    | delta, whole | zero | the shared layer is the base's |
    | delta of rank r: lora_A, lora_B | nn.Linear's, zero (LoRA, arXiv 2106.09685) | zero at first |
    | delta of rank r, embedding | zero, uniform 1/sqrt(r) | tokens that no training saw keep the base's |

    Args:
        config: the adapter's, with its routing rule.
        layers: decoder layer -> `MoELayer` of the base.
        sites: where deltas go, `None`: as the config says.
    """
    tensors, modules = {}, {}
    plan = config.extended_layers if plan is None else plan
    for index, sources in plan.items():
        tensors |= {
            f"layers.{index}.{name}": value for name, value in copy_sources(layers[index], sources, config).items()
        }
        if config.calibration != "none":
            device = tensors[f"layers.{index}.router.weight"].device
            size = layers[index].num_experts + len(sources)
            calibration = Calibration(size, config.calibration_hidden_size, device=device)
            nn.init.zeros_(calibration.fc2.weight)
            tensors |= named_tensors(f"layers.{index}.calibration", calibration)
    if config.scope == "gate" and plan and with_gate:
        rows = tensors[f"layers.{min(plan)}.router.weight"]
        modules["gate"] = TokenGate(rows.shape[-1], config.gate_hidden_size, device=rows.device)
    for modality, sense in config.senses.items() if with_projector else ():
        projector = Projector(sense, config.get_text_config().hidden_size, device=input_device(base))
        modules[f"{MODALITIES[modality]}projector"] = projector
    for part, module in modules.items():
        tensors |= named_tensors(part, module)
    return tensors | start_deltas(config, find_sites(config, base.get_decoder()) if sites is None else sites)


def start_deltas(config: MoExtendConfig, sites: dict[str, Site]) -> dict[str, torch.Tensor]:
    """The tensors of all deltas at these sites, by role."""
    tensors = {}
    for name, shape in delta_shapes(config, sites).items():
        site, _, part = name.rpartition(".")
        tensors[name] = torch.zeros(shape, device=execution_device(sites[site].module))
        if part == ("lora_B" if site.endswith(".embedding") else "lora_A"):
            nn.init.uniform_(tensors[name], -(shape[1] ** -0.5), shape[1] ** -0.5)
    return tensors


def named_tensors(part: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters by role."""
    return {f"{part}.{name}": tensor.detach() for name, tensor in module.named_parameters()}


def copy_sources(layer: MoELayer, sources: list[int], config: MoExtendConfig) -> dict[str, torch.Tensor]:
    """What new experts of one layer copy from their sources: role -> value."""
    rule = Rule(**config.routing_rule)
    with onloaded(layer.experts), onloaded(layer.router) as router:
        check_stacked(layer)
        shapes = expert_shapes(layer.experts, len(sources), config.expert_rank)
        stacks = {f"experts.{name}": layer.experts._parameters[name] for name in shapes if ".lora_" not in name}
        router_tensors = {role: tensor_at(router, path) for role, path in row_paths(rule).items() if path}
        router_tensors["correction_bias"] = correction_of(layer, rule)
        stacks |= {f"router.{role}": tensor for role, tensor in router_tensors.items() if tensor is not None}
        copies = {role: tensor.detach()[sources].to(torch.float32, copy=True) for role, tensor in stacks.items()}
        factors = start_factors(shapes, layer.experts.down_proj.device)
        return {f"experts.{role}": tensor for role, tensor in factors.items()} | copies


def start_factors(shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
    """Role -> start value, in float32, of the factors of low-rank experts among `shapes`."""
    found = {role: torch.zeros(shape, device=device) for role, shape in shapes.items() if ".lora_" in role}
    for role, tensor in found.items():
        for factor in tensor if role.endswith("lora_A") else ():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return found


def check_stacked(layer: MoELayer) -> None:
    """Refuses experts with a parameter that does not hold one part for each expert, and names it."""
    for name, p in layer.experts.named_parameters(recurse=False):
        if p.dim() == 0 or len(p) != layer.num_experts:
            raise ValueError(
                f"{type(layer.experts).__name__}.{name} has the shape {list(p.shape)}, not one part for each of the "
                f"{layer.num_experts} experts, so new experts can't be copied from it: this family can't be extended."
            )
