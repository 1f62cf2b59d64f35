"""What a training says to people: a named bar, and a table of the few metrics that tell how it goes.

Trackers (`report_to`) and `trainer.state.log_history` get all metrics.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

COLUMNS = {  # metric -> heading; at most six, and only those that a run has
    "loss": "loss",
    "task_loss": "task loss",
    "retention_loss": "retention",
    "new_expert_share": "new experts",
    "learning_rate": "rate",
    "tokens_per_second": "tokens/s",
}
WIDTH = 12
OURS = (  # warnings about what the user did not choose: TRL's default, and torch's loader on a CPU
    ".*gradient_checkpointing. is deprecated",
    ".*'pin_memory' argument is set as true but no accelerator is found",
)


class Progress(ProgressCallback):
    """Takes the place of transformers' bar without a name and its dict of every metric.

    Args:
        title: of the bar, like "stage 3 of 3: finetune".
        bars: whether there are bars; the table is written anyway.
    """

    def __init__(self, title: str, bars: bool = True):
        super().__init__()
        self.title, self.bars, self.columns = title, bars, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.columns, self.current_step = None, 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, desc=self.title, disable=not self.bars, dynamic_ncols=True, unit="step"
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bars:
            super().on_prediction_step(args, state, control, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.set_description("evaluating", refresh=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:
            tqdm.write(f"{self.title}: {state.global_step} steps in {logs['train_runtime']:.0f} s")
        elif "loss" in logs or "eval_loss" in logs:
            kind = "" if "loss" in logs else "eval_"
            lines = self.lines({name.removeprefix(kind): value for name, value in logs.items()}, state, kind)
            tqdm.write("\n".join(lines))

    def lines(self, logs: dict[str, float], state: TrainerState, kind: str) -> list[str]:
        """The line of these metrics, and the headings before the first one."""
        lines = []
        if self.columns is None:
            self.columns = [name for name in COLUMNS if name in logs]
            lines.append(row(["step", *(COLUMNS[name] for name in self.columns)]))
        step = f"{state.global_step}{' (eval)' if kind else ''}"
        return [*lines, row([step, *(shown(name, logs.get(name)) for name in self.columns)])]


def row(cells: list[str]) -> str:
    return "".join(f"{cell:>{WIDTH}}" for cell in cells)


def shown(name: str, value: float | None) -> str:
    """A metric as people read it."""
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if name == "new_expert_share" else f"{value:.4g}"


def show_progress(trainer: Trainer, title: str) -> Progress:
    """Puts a `Progress` in the place of transformers' own bar or printer; a notebook's table, or what a user added in
    their place, stays as it is."""
    progress = Progress(title, bars=not trainer.args.disable_tqdm)
    standard = [c for c in trainer.callback_handler.callbacks if type(c) in (ProgressCallback, PrinterCallback)]
    for callback in standard:
        trainer.remove_callback(callback)
    if standard:
        trainer.add_callback(progress)
    return progress


@contextlib.contextmanager
def without_our_warnings() -> Iterator[None]:
    """Inside, what warns of a choice that the user did not make is silent."""
    with warnings.catch_warnings():
        for message in OURS:
            warnings.filterwarnings("ignore", message=message)
        yield
