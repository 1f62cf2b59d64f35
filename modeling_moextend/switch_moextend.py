"""Switching an adapter on, off and in degrees, without touching a tensor."""

import contextlib

from .configuration_moextend import check_threshold
from .layers_moextend import find_moe_layers


class AdapterSwitch:
    """What a user sets on a loaded model: whether the adapter takes part, and how readily its gate opens."""

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside the block the model is the base, bit for bit; images are refused."""
        with self.routing.using(enabled=False):
            yield

    def disable_adapters(self):
        """Switches the adapter off until `enable_adapters`."""
        self.routing.switched_on = False

    def enable_adapters(self):
        self.routing.switched_on = True

    def active_adapters(self):
        """Names of the adapters that take part: `["default"]`, or `[]` while switched off."""
        return ["default"] if self.routing.enabled else []

    def load_adapter(self, *args, **kwargs):
        raise NotImplementedError(
            "A MoExtend model holds one adapter for now. To replace its tensors use load_adapter_tensors(folder)."
        )

    set_adapter = delete_adapter = add_adapter = load_adapter

    @property
    def gate_threshold(self):
        """With `scope="gate"`: a token may use new experts when its routing margin is above this (default 0).

        Kept in the config and saved with the adapter. Higher: less of the new task, less forgetting; see
        `evaluation.threshold_curve`. Setting it raises `ValueError` for another scope or what is no finite number.
        """
        return self.config.gate_threshold

    @gate_threshold.setter
    def gate_threshold(self, value):
        if self.config.scope != "gate":
            raise ValueError(f"gate_threshold belongs to scope='gate', this adapter has scope={self.config.scope!r}.")
        self.config.gate_threshold = check_threshold(value)

    @property
    def gate(self):
        """The `TokenGate`, or `None` where there is none (another scope, or no extended layer yet)."""
        layers = find_moe_layers(self.get_decoder())
        lowest = next(iter(self.config.extended_layers), None)
        return None if lowest is None else layers[lowest].router.moextend.gate
