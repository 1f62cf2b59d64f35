"""What the Extender (stage 2 of the paper) finds: how far each layer's choice of experts moved, and the plan from it.

Letters: L MoE layers, E experts of a layer.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from ..evaluation.figures import plot_router_shift
from ..tools.files import write_text

CHOICES = ("all", "first-half", "second-half", "interval")
FILE_FORMAT = 1


@dataclass
class RouterShift:
    """How often each expert is selected on held-out samples, before and after only the routers trained.

    Args:
        layers: decoder layer indices of the L MoE layers, ascending.
        counts_before, counts_after: [L, E] int64, selections by non-padding tokens (r_ij of the paper).
    """

    layers: list[int]
    counts_before: torch.Tensor
    counts_after: torch.Tensor

    def __post_init__(self):
        self.counts_before = torch.as_tensor(self.counts_before, dtype=torch.int64)
        self.counts_after = torch.as_tensor(self.counts_after, dtype=torch.int64)
        shapes = tuple(self.counts_before.shape), tuple(self.counts_after.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(self.layers):
            raise ValueError(
                f"counts_before and counts_after must be [{len(self.layers)} layers, experts], got {shapes[0]} and "
                f"{shapes[1]}."
            )
        if (self.counts_before.sum(dim=1) == 0).any() or (self.counts_after.sum(dim=1) == 0).any():
            raise ValueError("A layer without a single selection has no distribution: no token was counted there.")

    @property
    def per_layer(self) -> torch.Tensor:
        """d_j, [L] float64: standard deviation over experts of the change of their shares (Eq. 5 and 6)."""
        return (shares(self.counts_before) - shares(self.counts_after)).std(dim=1, correction=0)

    def select(
        self, fraction: float | None = None, layers: str | list[int] | None = None, num_new: int = 1
    ) -> dict[int, list[int]]:
        """The plan: which layers to extend, and from which source experts.

        Args:
            fraction: p, by default 0.5; the floor(p * L) layers of largest d_j are extended.
            layers: instead of `fraction`, the layers themselves, or `"all"`, `"first-half"`, `"second-half"` or
                `"interval"` (every other layer): the paper's comparisons.
            num_new: new experts a layer. Sources are the experts most selected after training (Eq. 8; counts after, as
                in the authors' code), in descending order, from the top again where these run out.

        Returns:
            decoder layer index -> source experts, what `from_base` takes.

        Raises:
            ValueError: a fraction outside (0, 1] or too small for one layer, an unknown name, a layer that is no MoE
                layer, or `num_new` below 1.
        """
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, not {num_new}.")
        if layers is None:
            chosen = self._most_shifted(0.5 if fraction is None else fraction)
        elif fraction is not None:
            raise ValueError("Give either fraction or layers, not both.")
        else:
            chosen = self._named(layers) if isinstance(layers, str) else self._checked(layers)
        return {layer: self._sources(layer, num_new) for layer in chosen}

    def _most_shifted(self, fraction):
        """The floor(fraction * L) layers of largest d_j, ascending; of equal ones the lower."""
        if isinstance(fraction, str) or not 0 < fraction <= 1:
            hint = f" For {fraction!r}, write layers={fraction!r}." * (fraction in CHOICES)
            raise ValueError(f"fraction must lie in (0, 1], not {fraction!r}.{hint}")
        number = math.floor(fraction * len(self.layers) + 1e-9)  # 0.29 * 100 is 28.999999999999996
        if number == 0:
            raise ValueError(
                f"fraction={fraction} of {len(self.layers)} MoE layers is less than one layer: give at least "
                f"{1 / len(self.layers):.3g}."
            )
        order = self.per_layer.sort(descending=True, stable=True).indices[:number]
        return sorted(self.layers[index] for index in order.tolist())

    def _named(self, name):
        half = len(self.layers) // 2
        named = {
            "all": self.layers,
            "first-half": self.layers[:half],
            "second-half": self.layers[half:],
            "interval": self.layers[1::2],
        }
        if name not in named:
            raise ValueError(f"layers={name!r} is unknown; give a list or one of {', '.join(map(repr, CHOICES))}.")
        return list(named[name])

    def _checked(self, layers):
        layers = sorted(set(layers))
        wrong = [layer for layer in layers if layer not in self.layers]
        if wrong or not layers:
            raise ValueError(f"{wrong or layers} are no MoE layers of this model; its MoE layers are {self.layers}.")
        return layers

    def _sources(self, layer, num_new):
        counts = self.counts_after[self.layers.index(layer)]
        ranked = [e for e in counts.sort(descending=True, stable=True).indices.tolist() if counts[e] > 0]
        return [ranked[number % len(ranked)] for number in range(num_new)]

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON to `path`; whoever reads meanwhile sees the old file or the new one."""
        content = {
            "moextend_router_shift": FILE_FORMAT,
            "layers": self.layers,
            "counts_before": self.counts_before.tolist(),
            "counts_after": self.counts_after.tolist(),
            "per_layer": self.per_layer.tolist(),  # for readers; `load` works it out again
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: another kind of file, or one of a newer format.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        written = content.get("moextend_router_shift") if isinstance(content, dict) else None
        if written is None:
            raise ValueError(f"{path} is not a router shift: write one with RouterShift.save.")
        if written > FILE_FORMAT:
            raise ValueError(f"{path} has format {written}; this version reads up to {FILE_FORMAT}. Upgrade moextend.")
        return cls(content["layers"], content["counts_before"], content["counts_after"])

    def plot(self, path: str | os.PathLike, plan: dict[int, list[int]] | None = None) -> None:
        """A picture: the shares of the experts before and after as heat maps, and d_j as bars; the plan is marked.

        Args:
            path: image file; its ending says the format.
            plan: default `select()`.

        Raises:
            ImportError: matplotlib is missing.
        """
        chosen = self.select() if plan is None and len(self.layers) > 1 else plan or {}
        before, after = shares(self.counts_before).numpy(), shares(self.counts_after).numpy()
        plot_router_shift(self.layers, before, after, self.per_layer.numpy(), chosen, path)


def shares(counts: torch.Tensor) -> torch.Tensor:
    """[L, E] counts -> [L, E] float64, each layer summing to 1 (Eq. 5)."""
    return counts.double() / counts.sum(dim=1, keepdim=True)
