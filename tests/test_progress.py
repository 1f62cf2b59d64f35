"""What a training prints for people, what only trackers get, and what it keeps to itself."""

import re
import warnings

import pytest
import torch
from test_sft_trainer import gated_trainer, make_trainer
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modeling_moextend import MoExtendSFTConfig
from modeling_moextend.quickstart.run import shown as three_answers
from modeling_moextend.tools.progress import COLUMNS, Progress
from modeling_moextend.training.gate import CURVE, curve_of
from modeling_moextend.training.retention import duration

METRICS = {"loss": 1.25, "task_loss": 1.0, "retention_loss": 0.05, "new_expert_share": 0.5, "learning_rate": 1e-3}
METRICS |= {"tokens_per_second": 900.0, "grad_norm": 2.0, "new_expert_share/layer_1": 0.5, "epoch": 0.1}


class Tracker(TrainerCallback):
    """Keeps what trackers are told: (step, metrics)."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_the_table_has_at_most_six_metrics_and_one_line_of_headings():
    assert len(COLUMNS) <= 6
    progress, state = Progress("stage finetune"), TrainerState(global_step=10)
    first, second = progress.lines(METRICS, state, ""), progress.lines(METRICS, state, "eval_")
    assert first[0].split() == "step loss task loss retention new experts rate tokens/s".split()
    assert first[1].split() == ["10", "1.25", "1", "0.05", "50.0%", "0.001", "900"]
    assert len(second) == 1 and second[0].split()[:3] == ["10", "(eval)", "1.25"]
    assert len(first[0]) == len(first[1]) == len(second[0])
    short = Progress("router probe").lines({"loss": 2.0, "grad_norm": 1.0}, state, "")
    assert short[0].split() == ["step", "loss"]


@pytest.mark.parametrize("bars", [True, False])
def test_a_run_prints_a_named_bar_and_a_table_and_no_dict(tmp_path, capsys, bars):
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1, disable_tqdm=not bars)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Progress in kinds and not {ProgressCallback, PrinterCallback} & set(kinds)
    trainer.train()
    said = capsys.readouterr()
    assert re.search(r"^ +step +loss +task loss", said.out, re.MULTILINE)
    assert "stage finetune: 2 steps in" in said.out and "grad_norm" not in said.out + said.err
    assert ("stage finetune: 100%" in said.err) == bars
    assert {"grad_norm", "new_expert_share", "loss"} <= trainer.state.log_history[0].keys(), "trackers get all"


def test_the_gates_own_training_goes_to_trackers_and_not_into_the_log_history(tmp_path):
    tracker = Tracker()
    trainer = gated_trainer(tmp_path, max_steps=1, gate_steps=30, callbacks=[tracker])
    trainer.train()
    curve = [(step, logs["gate/loss"]) for step, logs in tracker.logs if "gate/loss" in logs]
    assert curve == list(trainer.gate_report.curve) and curve[-1][0] == 30
    assert (
        30,
        {"gate/routed": trainer.gate_report.routed, "gate/captured": trainer.gate_report.captured},
    ) in tracker.logs
    assert not any("gate" in name for log in trainer.state.log_history for name in log)
    assert trainer.state.global_step == 1


def test_the_curve_holds_means_of_all_steps():
    assert curve_of([4.0, 2.0]) == ((1, 4.0), (2, 2.0)) and curve_of([]) == ()
    losses = [float(number) for number in range(601)]
    curve = curve_of(losses)
    assert len(curve) <= CURVE and curve[-1][0] == 601 and curve[0] == (31, 15.0)


def test_bf16_is_what_the_machine_can(tmp_path, monkeypatch):
    """On a CPU alone the config is made without further options, and nothing is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = MoExtendSFTConfig(str(tmp_path))
    assert not [str(warning.message) for warning in caught]
    assert args.bf16 is torch.cuda.is_available()
    assert MoExtendSFTConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True, "what is asked for stays"
    monkeypatch.setattr("modeling_moextend.training.config.is_torch_bf16_gpu_available", lambda: True)
    assert MoExtendSFTConfig(str(tmp_path), use_cpu=True).bf16 is False


def test_a_training_warns_of_nothing_that_the_user_did_not_choose(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, max_steps=1).train()
    assert not [str(w.message) for w in caught if re.search("pin_memory|gradient_checkpointing", str(w.message))]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42, "42 s"), (600, "10 minutes"), (3 * 3600, "3.0 hours")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("inputs", "answered"), [("12345", "134"), ("11223", "135"), ("12134", "145")])
def test_three_answers_are_to_three_questions_about_three_inputs(inputs, answered):
    questions = [{"question": text, "audio": path} for text, path in zip("xxyzw", inputs, strict=True)]
    assert [text for _, text in three_answers(questions, list("12345"))] == list(answered)
