"""The choices of a new adapter: who may use new experts, how they are chosen, whose weights are calibrated."""

import contextlib
import copy
from collections.abc import Collection

from torch import nn

from ..configuration_moextend import DELTAS, MoExtendConfig
from ..deltas_moextend import find_sites
from ..validation_moextend import ENTRIES

PAPER = {"scope": "all", "selection": "compete", "calibration": "all"}


def routing_choices(
    scope: str | None = None,
    selection: str | None = None,
    calibration: str | None = None,
    paper: bool = False,
    has_encoder: bool = False,
    deltas: Collection[str] = (),
) -> dict[str, str]:
    """The three choices of a new adapter as a `dict`, those left at `None` filled in.

    | | `None` means | with `paper` |
    |---|---|---|
    | scope | `"modality"` with an encoder, else `"gate"` | `"all"` |
    | selection | `"exclusive"` | `"compete"` |
    | calibration | `"none"` with exclusive selection, else `"routed"` | `"all"` |

    Raises:
        ValueError: `paper`, and a choice that is not the paper's, or deltas, which it does not have.
    """
    choices = {"scope": scope, "selection": selection, "calibration": calibration}
    if paper:
        others = {name: value for name, value in choices.items() if value not in (None, PAPER[name])}
        others |= {"deltas": list(deltas)} if deltas else {}
        if others:
            raise ValueError(f"paper=True means {PAPER}, but {others} was given: leave out one or the other.")
        return dict(PAPER)
    if scope is None:
        choices["scope"] = "modality" if has_encoder else "gate"
    if selection is None:
        choices["selection"] = "exclusive"
    if calibration is None:
        choices["calibration"] = "none" if choices["selection"] == "exclusive" else "routed"
    return choices


def default_deltas(config: MoExtendConfig, decoder: nn.Module) -> dict[str, int]:
    """The deltas {kind: rank} of a new adapter with `config` that names none: with a gate, those of `DELTAS` that this
    base can have in decoder layers above the gate's; else none."""
    chosen, trial = {}, copy.copy(config)
    if config.scope != "gate" or not config.extended_layers:
        return chosen
    for kind, rank in DELTAS.items():
        trial.deltas = {kind: rank}
        with contextlib.suppress(ValueError):
            find_sites(trial, decoder)
            chosen[kind] = rank
    return {} if chosen.keys() == {"output"} else chosen  # alone, it was not measured


def check_rank(expert_rank: int | None, paper: bool = False) -> None:
    """Refuses what is no rank, and any with `paper`.

    Raises:
        ValueError: no whole number from 1 on; the paper's new experts are whole copies (Eq. 8).
    """
    test, words = ENTRIES["expert_rank"]
    if expert_rank is not None and not test(expert_rank):
        raise ValueError(f"expert_rank={expert_rank!r} must be {words}, or None for whole copies.")
    if paper and expert_rank is not None:
        raise ValueError(
            f"paper=True means new experts that are whole copies, but expert_rank={expert_rank!r} was given: leave "
            f"out one or the other. The paper's routing with low-rank experts is {PAPER} without paper=True."
        )
