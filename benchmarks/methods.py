"""The methods that the benchmark compares, and the table of ablations: settings only, `training.py` trains.

Each method has a grid of learning rates of its own, all equally long.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tasks import Task

from modeling_moextend.attaching.choices import PAPER
from modeling_moextend.configuration_moextend import DELTAS

ALL = {"scope": "all", "selection": "exclusive", "calibration": "none"}
GATE = {"scope": "gate", "selection": "exclusive", "calibration": "none"}
GATE_DELTAS = GATE | {"deltas": DELTAS}


def without(kind: str) -> dict[str, int]:
    """The default deltas but for one."""
    return {name: rank for name, rank in DELTAS.items() if name != kind}


@dataclass(frozen=True)
class Method:
    """One method: new experts with a routing, or a way to train the plain base.

    Attributes:
        rates: learning rates of the sweep; the second is what `--quick` takes.
        routing: what `from_base` takes; `None` for methods that train the base itself.
        new_experts: a layer, on all layers; sources are the experts that the task's records select most.
        trainer: more for `MoExtendSFTConfig`.
        retention: "real" (the texts that replay takes too), or `None`.
        trains: for methods on the plain base: "all", "lora" or "routers".
        replay: whether a step takes the base's own text as well.
        variant: a name of `variants.VARIANTS`: a piece that the library does without.
        vision: `True`: only tasks with images; `False`: only without; `None`: all tasks.
    """

    name: str
    rates: tuple
    routing: dict | None = None
    new_experts: int = 4
    trainer: dict = field(default_factory=dict)
    retention: str | None = None
    trains: str | None = None
    replay: bool = False
    variant: str | None = None
    vision: bool | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that a run depends on but its rate."""
        values = {name: value for name, value in asdict(self).items() if name not in ("name", "rates", "vision")}
        return {name: value for name, value in values.items() if name != "variant" or value is not None}

    def fits(self, task: Task) -> bool:
        """Whether the method is for `task`."""
        return self.vision is None or self.vision == task.vision


# Four rates each: three a factor of about three apart, then the next higher one where the best of these three was the
# highest on any task, else one beside the best.
NEW = LORA = (5e-4, 1.5e-3, 4e-3, 1e-2)
DELTA_RATES = (5e-4, 1.5e-3, 3e-3, 6e-3)
METHODS = {
    method.name: method
    for method in (
        Method("paper", NEW, PAPER, new_experts=1),
        Method("modality", (5e-4, 1.5e-3, 2e-3, 4e-3), {**ALL, "scope": "modality"}, vision=True),
        Method("gate", NEW, GATE, retention="real", vision=False),
        Method("gate_self", NEW, GATE, trainer={"retention": "self"}, vision=False),
        Method("gate_deltas", DELTA_RATES, GATE | {"deltas": DELTAS}, retention="real", vision=False),
        Method(
            "gate_deltas_self", DELTA_RATES, GATE | {"deltas": DELTAS}, trainer={"retention": "self"}, vision=False
        ),
        Method("full", (3e-4, 1e-3, 2e-3, 3e-3), trains="all"),
        Method("full_replay", (3e-4, 1e-3, 3e-3, 1e-2), trains="all", replay=True),
        Method("lora", LORA, trains="lora"),
        Method("lora_replay", LORA, trains="lora", replay=True),
        Method("router_only", (1e-3, 3e-3, 1e-2, 3e-2), trains="routers"),
    )
}

# Method -> (name, changes to it): one run each, everything else as it is. See `forgetting.py --ablations`.
GATE_ABLATIONS = (
    ("as it is", {}),
    ("gate sees the hidden state only", {"variant": "hidden_state_only"}),
    ("gate sees a plain running mean", {"variant": "plain_mean"}),
    ("a gate in every layer", {"variant": "gate_a_layer"}),
    ("A = 0", {"trainer": {"gate_task_weight": 0.0}}),
    ("K = 1", {"trainer": {"gate_retention_weight": 1.0}}),
    ("K = 100", {"trainer": {"gate_retention_weight": 100.0}}),
    ("gate trains for 100 steps", {"trainer": {"gate_steps": 100}}),
    ("gate trains for 2,000 steps", {"trainer": {"gate_steps": 2000}}),
    ("no retention loss", {"trainer": {"retention_weight": 0.0}}),
    ("retention loss x 4", {"trainer": {"retention_weight": 20.0}}),
    ("1 new expert", {"new_experts": 1}),
    ("2 new experts", {"new_experts": 2}),
    ("8 new experts", {"new_experts": 8}),
    ("compete", {"routing": {"selection": "compete"}}),
    ("compete, calibration routed", {"routing": {"selection": "compete", "calibration": "routed"}}),
    ("compete, calibration all", {"routing": {"selection": "compete", "calibration": "all"}}),
    ("no gate: all tokens use new experts", {"routing": {"scope": "all"}, "retention": None}),
    ("attention LoRA for routed tokens", {"variant": "gated_lora"}),
)

DELTA_ABLATIONS = (
    ("as it is", {}),
    ("no delta of the embedding", {"routing": {"deltas": without("embedding")}}),
    ("no deltas of attention", {"routing": {"deltas": without("attention")}}),
    ("no delta of the output", {"routing": {"deltas": without("output")}}),
    ("no deltas", {"routing": {"deltas": {}}}),
    ("retention loss on the task's prompts", {"trainer": {"retention_loss": "prompts"}}),
    ("no retention loss", {"trainer": {"retention_weight": 0.0}}),
    ("1 new expert", {"new_experts": 1}),
    ("8 new experts", {"new_experts": 8}),
    ("new experts of rank 32", {"routing": {"expert_rank": 32}}),
)
ABLATIONS = {"gate": GATE_ABLATIONS, "gate_deltas": DELTA_ABLATIONS}


def changed(method: Method, changes: dict[str, Any]) -> Method:
    """A method with other settings; dicts are merged, so that a change names only what differs."""
    values = {
        "variant": None,
        **method.settings(),
        "name": method.name,
        "rates": method.rates,
        "vision": method.vision,
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return Method(**values)
