"""Which adapter a request names: vLLM's LoRA requests carry it, for their names reach every process, and keep cached
prefixes of different adapters apart. Nothing of LoRA itself is used."""

import contextlib

import torch
from torch import nn
from vllm.v1.worker import lora_model_runner_mixin

from .adapters import place
from .serving_pass import BASE

OF_VLLM = lora_model_runner_mixin.LRUCacheWorkerLoRAManager


class AdapterManager:
    """In the place of vLLM's LoRA manager: requests name adapters by their folder or Hub id, `lora_path`."""

    is_enabled = True

    def __init__(self, vllm_config, device, embedding_modules):
        self.num_tokens, self.device = vllm_config.scheduler_config.max_num_batched_tokens, device
        self.numbers, self.names = {}, {}  # number of the adapter, by vLLM's number for it and by its name
        self.dummies = set()  # paths of what vLLM warms up with

    def create_lora_manager(self, model: nn.Module, vllm_config) -> nn.Module:
        self.serving = model.moextend[0]
        self.places = [place(one.source.name) for one in self.serving.adapters]
        self.serving.owners = torch.full((self.num_tokens,), BASE, device=self.device)
        return model

    def add_adapter(self, request) -> bool:
        path = place(request.lora_path)
        if path not in self.places:
            raise ValueError(
                f"{request.lora_path} is none of the adapters that this server was started with "
                f"({', '.join(self.places)}): name it in moextend_adapters and start anew."
            )
        number = self.places.index(path)
        if self.names.setdefault(request.lora_name, number) != number:  # vLLM keeps cached prefixes apart by name
            raise ValueError(f"{request.lora_name!r} names another adapter already: give {request.lora_path} another.")
        self.numbers[request.lora_int_id] = number
        return True

    def set_active_adapters(self, requests, mapping) -> None:
        for request in requests:
            if request.lora_path not in self.dummies:
                self.add_adapter(request)
        numbers = [self.numbers[one] if one else BASE for one in mapping.index_mapping]
        self.serving.owners.fill_(BASE)
        self.serving.owners[: len(numbers)] = torch.tensor(numbers, dtype=torch.long, device=self.device)

    def add_dummy_lora(self, request, rank: int) -> bool:
        self.numbers[request.lora_int_id] = BASE
        self.dummies.add(request.lora_path)
        return True

    @contextlib.contextmanager
    def dummy_lora_cache(self):
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def pin_adapter(self, adapter_id: int) -> bool:
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return self.numbers.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        self.numbers.clear()

    def list_adapters(self) -> set[int]:
        return set(self.numbers)

    def supports_tower_connector_lora(self) -> bool:
        return False


def manager(vllm_config, device, embedding_modules):
    ours = hasattr(vllm_config.model_config.hf_config, "moextend_content")
    return (AdapterManager if ours else OF_VLLM)(vllm_config, device, embedding_modules)


def carry_adapters() -> None:
    """Has vLLM's worker ask us instead of its LoRA manager where adapters are served."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
