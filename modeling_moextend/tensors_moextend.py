"""An adapter's tensors by name, what of them trains, and fingerprints: which base, encoder or adapter this is."""

import base64

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .configuration_moextend import MODALITIES
from .deltas_moextend import delta_shapes
from .families_moextend import bias_path, onloaded
from .gate_moextend import TokenGate
from .layers_moextend import execution_device
from .low_rank_moextend import LowRankExperts, expert_shapes
from .package_moextend import from_package
from .routing_moextend import Rule
from .senses_moextend import Projector
from .validation_moextend import FINGERPRINT_SIZE

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:
    FSDPModule = DTensor = ()

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEVER_TRAINED = (".correction_bias", ".router.scale")  # copied from the base, frozen


def tensors_of(adapter):
    """Every new tensor of an `Adapter` by role, in file order."""
    tensors = {}
    for layer, (rows, experts) in adapter.layers.items():
        for part, module in (("experts", experts), ("router", rows)):
            low_rank = isinstance(module, LowRankExperts)
            own = dict(module.named_parameters()) if low_rank else {**module._parameters, **module._buffers}
            tensors |= {f"layers.{layer}.{part}.{name}": own[name] for name in own if own[name] is not None}
        if rows.calibration is not None:
            calibration = rows.calibration.named_parameters()
            tensors |= {f"layers.{layer}.calibration.{name}": tensor for name, tensor in calibration}
    for site, delta in adapter.deltas.items():
        tensors |= {f"{site}.{name}": tensor for name, tensor in delta.named_parameters()}
    if adapter.gate is not None:
        tensors |= {f"gate.{name}": tensor for name, tensor in adapter.gate.named_parameters()}
    for modality, projector in adapter.projectors.items():
        prefix = f"{MODALITIES[modality]}projector"
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in projector.named_parameters()}
    return tensors


def tensor_shapes(config, layers, sites):
    """Name -> shape of every new tensor of an adapter with `config`, on a base with these MoE `layers` and `Site`s of
    its deltas."""
    shapes, rule = {}, Rule(**config.routing_rule)
    for index, sources in config.extended_layers.items():
        layer, num_new, prefix = layers[index], len(sources), f"layers.{index}"
        own = dict(layer.router.named_parameters())
        experts = expert_shapes(layer.experts, num_new, config.expert_rank)
        shapes |= {f"{prefix}.experts.{role}": shape for role, shape in experts.items()}
        stacks = {f"router.{role}": own[path] for role, path in row_paths(rule).items() if path in own}
        shapes |= {f"{prefix}.{name}": (num_new, *tensor.shape[1:]) for name, tensor in stacks.items()}
        shapes |= {f"{prefix}.router.correction_bias": (num_new,)} if rule.correction else {}
        if config.calibration != "none":
            wide, narrow = layer.num_experts + num_new, config.calibration_hidden_size
            sizes = {"fc1": (narrow, wide), "fc2": (wide, narrow)}
            shapes |= {f"{prefix}.calibration.{name}.weight": size for name, size in sizes.items()}
    shapes |= delta_shapes(config, sites)
    modules, hidden_size = {}, config.get_text_config().hidden_size
    if config.scope == "gate" and config.extended_layers:
        size = shapes[f"layers.{min(config.extended_layers)}.router.weight"][-1]
        modules["gate"] = TokenGate(size, config.gate_hidden_size, device="meta")
    for modality, sense in config.senses.items():
        modules[f"{MODALITIES[modality]}projector"] = Projector(sense, hidden_size, device="meta")
    for part, module in modules.items():
        shapes |= {f"{part}.{name}": tuple(tensor.shape) for name, tensor in module.named_parameters()}
    return shapes


def row_paths(rule):
    """What new router rows copy from the base's router: role -> path there."""
    return {"weight": rule.rows, "bias": bias_path(rule), "scale": rule.expert_scale}


def moved_to_layers(tensors, layers, sites, device, dtype):
    """An adapter's tensors where they belong, beside the base's, or on `device`; in `dtype` or their own, whichever is
    wider. They are taken out of `tensors`, one by one, so that memory never holds all of them twice."""
    found, lowest = {}, min((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=None)
    for name in list(tensors):
        tensor, site = tensors.pop(name), sites.get(name.rpartition(".")[0])
        role, number, part = (*name.split("."), "")[:3]
        target = device
        if site is not None:
            target = execution_device(site.module)
        elif not role.endswith("projector"):
            layer = layers[lowest if role == "gate" else int(number)]
            with onloaded(layer.experts if part == "experts" else layer.router) as module:
                target = next(module.parameters()).device
        found[name] = tensor.to(target, torch.promote_types(tensor.dtype, dtype))
    return found


def split_by_part(tensors, sites):
    """An adapter's tensors by layer (`int`), name of a delta's site, "gate" and projectors, each by role."""
    parts = {}
    for name, tensor in tensors.items():
        part, key = name.rsplit(".", 1) if name.rpartition(".")[0] in sites else name.split(".", 1)
        if part == "layers":
            part, key = key.split(".", 1)
        parts.setdefault(int(part) if part.isdecimal() else part, {})[key] = tensor
    return parts


def stored_dtype(name, dtype):
    """What a tensor is stored in: the gate always in float32, for its rounding would move tokens across the line."""
    return torch.float32 if name.startswith("gate.") else dtype


class AdapterTensors:
    """What a model says of the tensors of its adapters: mixed into `MoExtendPreTrainedModel`."""

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """Every new tensor of one adapter by role, in file order: what is saved, counted, frozen and trained is chosen
        from these. `adapter_name`: default: the one that trains, or the only active one."""
        reshard(self)
        return tensors_of(self.adapters[self.resolve_name(adapter_name)])

    def adapter_bytes(self, dtype: torch.dtype | None = None, adapter_name: str | None = None) -> int:
        """Bytes of the adapter's tensors in `dtype` (default: the base's)."""
        dtype = dtype or self.base.dtype
        tensors = self.adapter_tensors(adapter_name).items()
        return sum(tensor.numel() * stored_dtype(name, dtype).itemsize for name, tensor in tensors)

    def print_trainable_parameters(self) -> None:
        """Trainable and all parameters, in PEFT's words."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def set_trainable(
        self, stage: str = "finetune", train_projector: bool | None = None, adapter_name: str | None = None
    ) -> dict[str, torch.nn.Parameter]:
        """Freezes and unfreezes for a stage, and returns what trains: `modeling_moextend.training.trainable`."""
        trainable = from_package("training.trainable", "Training by stages")
        return trainable.set_trainable(self, stage, train_projector, adapter_name)

    def require_gradients(self, adapter_names: list[str]) -> None:
        """The tensors of these adapters that any stage trains ask for gradients, and no others do."""
        for name in self.adapters:
            self.require_gradients_of(name, name in adapter_names)

    def require_gradients_of(self, adapter_name: str, required: bool = True) -> None:
        for name, tensor in self.adapter_tensors(adapter_name).items():
            tensor.requires_grad_(required and (name.startswith("projector.") or self.learns(name, adapter_name)))

    def learns(self, name: str, adapter_name: str | None = None) -> bool:
        """Whether stage finetune moves this tensor: one that a gradient reaches. The gate is trained before it."""
        if name.endswith(NEVER_TRAINED) or name.startswith(("gate.", "projector.")):
            return False
        config = self.adapters[self.resolve_name(adapter_name)].config
        sole_row = config.selection == "exclusive" and ".router." in name and self.num_rows_at(name, adapter_name) == 1
        return not sole_row

    def num_rows_at(self, name: str, adapter_name: str | None = None) -> int:
        """How many new rows share the layer of the tensor `name`: the adapter's own and those of active ones."""
        layer, sharing = int(name.split(".")[1]), {self.resolve_name(adapter_name), *self.passes.current.active}
        return sum(len(self.adapters[one].config.extended_layers.get(layer, ())) for one in sharing)

    def fingerprints(self) -> dict[str, str | None]:
        """Adapter name -> fingerprint of its tensors, of every adapter."""
        return {name: self.fingerprint_of(name) for name in self.adapters}

    def fingerprint_of(self, adapter_name: str) -> str | None:
        """Without the gate, which is stored in float32 whatever the others are stored in."""
        tensors = self.adapter_tensors(adapter_name).items()
        return tensors_fingerprint({name: tensor for name, tensor in tensors if not name.startswith("gate.")})


def fingerprint(module: torch.nn.Module) -> str | None:
    """1,024 values at fixed indices over the weights of `module` (matrices and stacks), float32, base64.

    Quantised tensors are left out (NaN in their slots). `None` where the weights are on the meta device.
    """
    owners = {name: (owner, key) for name, owner, key in named_owners(module) if owner._parameters[key].dim() >= 2}

    def read(name, indices):
        owner, key = owners[name]
        with onloaded(owner):
            return values_at(owner._parameters[key].detach(), indices)

    return sample_values({name: owner._parameters[key].numel() for name, (owner, key) in owners.items()}, read)


def tensors_fingerprint(tensors):
    """`fingerprint` of tensors by name: which adapter this is, whatever dtype it was saved in."""
    stacks = {name: tensor.detach() for name, tensor in tensors.items() if tensor.dim() >= 2}
    sizes = {name: tensor.numel() for name, tensor in stacks.items()}
    return sample_values(sizes, lambda name, indices: values_at(stacks[name], indices))


def sample_values(sizes, read):
    """The text of a fingerprint. `sizes`: name -> number of values of each weight; `read`: called with a name and
    indices into the flattened weight, gives the values, or `None` on the meta device."""
    names = sorted(sizes)
    names = names[:: max(1, -(-len(names) // FINGERPRINT_SIZE))]
    found = torch.full((FINGERPRINT_SIZE,), torch.nan)
    for number, name in enumerate(names):
        slots = torch.arange(number, FINGERPRINT_SIZE, len(names))
        indices = torch.linspace(0, sizes[name] - 1, len(slots) + 2, dtype=torch.float64)[1:-1].long()
        values = read(name, indices)
        if values is None:
            return None
        found[slots] = values.float().cpu()
    return base64.b64encode(found.numpy().tobytes()).decode()


def snapshot(module):
    """name -> (shape, values at `value_indices`, `bits_of` it) of every tensor saved with `module`, new ones left out:
    what shows a change of it. `None` in place of both of one that is quantised, sharded, or on the meta device."""
    found = {}
    for prefix, owner in module.named_modules() if module is not None else ():
        if "moextend" in prefix.split("."):
            continue
        with onloaded(owner):
            for name, tensor in {**owner._parameters, **owner._buffers}.items():
                if tensor is None or name in owner._non_persistent_buffers_set:
                    continue
                content = None, None
                if is_plain(tensor) and not tensor.is_meta:
                    content = values_at(tensor.detach(), value_indices(tensor.shape)).cpu(), bits_of(tensor)
                found[f"{prefix}.{name}".lstrip(".")] = tensor.shape, *content
    return found


def value_indices(shape):
    """Indices into a flattened tensor: one in each row, along the diagonal, so that no row and, where there are as
    many rows, no column changes unseen; of one with few rows, up to 4096 evenly spread."""
    count, width = shape.numel(), shape[-1] if shape else 1
    if count < 256 * width:
        return torch.linspace(0, max(count - 1, 0), min(count, 4096), dtype=torch.float64).long()
    rows = torch.arange(count // max(width, 1))
    return rows * width + rows % max(width, 1)


def bits_of(tensor):
    """A number that is another where any value changed, or rows changed places; read at the speed of memory."""
    rows = tensor.detach().contiguous().reshape(-1, max(1, tensor.shape[-1]) if tensor.dim() else 1)
    if rows.storage_offset() * rows.itemsize % 8 or rows.stride(-1) != 1:  # it can't be viewed as int64
        rows = rows.clone(memory_format=torch.contiguous_format)
    words = rows.view(torch.int64 if rows.shape[1] * rows.itemsize % 8 == 0 else torch.uint8)
    sums = words.sum(-1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum().item()  # odd: no bit gets lost


def changed_tensors(before, after):
    """Names in which two snapshots differ by more than a cast to another dtype makes them."""
    shared = before.keys() & after.keys()
    return sorted((before.keys() ^ after.keys()) | {name for name in shared if differ(before[name], after[name])})


def differ(one, other):
    (shape, values, bits), (other_shape, others, other_bits) = one, other
    if shape != other_shape or values is None or others is None:
        return shape != other_shape
    if values.dtype == others.dtype:
        return bits != other_bits
    steps = [torch.finfo(part.dtype).eps for part in (values, others)]
    return not torch.allclose(values.double(), others.double(), rtol=max(steps), atol=6e-8, equal_nan=True)


def values_at(tensor, indices):
    """Values of a tensor for `sample_values`; NaN of one that is quantised, `None` of one without data."""
    if tensor.is_meta:
        return None
    if not is_plain(tensor):
        return torch.full((len(indices),), torch.nan)
    return tensor.reshape(-1)[indices.to(tensor.device)]


def is_plain(tensor):
    """Whether a weight is an ordinary tensor of floating-point numbers: not quantised, packed or sharded."""
    return tensor.dtype in PLAIN and not is_traceable_wrapper_subclass(tensor)


def named_owners(module):
    """(name, owner module, key) of every base parameter, new ones left out."""
    for prefix, owner in module.named_modules():
        if "moextend" in prefix.split("."):
            continue
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".lstrip("."), owner, key


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one checkpoint: loads in one dtype give the same values; in two, they differ
    by half a step of the coarser one (and a rounding of the finer one before it), or by fp16's least step, 6e-8."""
    one, other = decode_fingerprint(one), decode_fingerprint(other)
    both = ~(one.isnan() | other.isnan())
    if not both.any():
        return True
    steps = rounding(one[both]), rounding(other[both])
    relative = 0.0 if steps[0] == steps[1] else 0.6 * max(steps)
    return torch.allclose(one[both], other[both], rtol=relative, atol=6e-8 if max(steps) > 1e-6 else 0.0)


def decode_fingerprint(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def rounding(values):
    """The relative step of the coarsest dtype that holds `values` exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


def reshard(model):
    """Puts shards back in the place of whole tensors, which FSDP2 leaves in its root module after a forward pass: what
    is read from those copies may be rounded, and what is written to them is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def not_finite(tensors):
    """Names of those tensors that hold NaN or infinity, sorted."""
    ends = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items() if tensor.numel()}  # NaN wins
    return sorted(name for name, pair in ends.items() if not pair.isfinite().all())


def check_finite(tensors, change):
    """Refuses to save or publish tensors that hold NaN or infinity: to `change` the folder or repository."""
    names = not_finite(tensors)
    if names:
        dtype = str(tensors[names[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"The adapter can't be {change}: NaN or infinity in {', '.join(names[:8])} ({len(names)} tensors, as "
            f"{dtype}). What was there before is untouched. Load the last good checkpoint and train with a lower "
            "learning_rate; where float16 is too small for the numbers, save with adapter_dtype='float32'."
        )


def gather(tensors: dict[str, torch.Tensor], dtype: torch.dtype, keep: bool = True) -> dict[str, torch.Tensor]:
    """name -> whole tensor in `dtype` (see `stored_dtype`) on the CPU; empty where not `keep`. Every process has to
    call this, for sharded tensors are made whole by all of them together."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # from the CPU, where offloaded
        if keep:
            whole[name] = tensor.to("cpu", stored_dtype(name, dtype))
    return whole
