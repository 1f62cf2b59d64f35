"""The choices of a new adapter: who may use new experts, how they are chosen, whose weights are calibrated."""

from collections.abc import Collection

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
