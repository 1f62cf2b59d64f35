"""The retention loss on text: which pieces, what the base says of them, and what it does in training."""

import pytest
import torch
from conftest import make_base, shake
from test_gate_moextend import open_gate
from test_sft_trainer import GATED, gated_trainer, losses, make_model, open_wide, tensors

from modeling_moextend.training import retention_text as module
from modeling_moextend.training.retention_text import (
    DRAWN,
    KEPT,
    LENGTH,
    LIKELIEST,
    PIECES_A_STEP,
    cut_pieces,
    read_base,
    text_distance,
    with_rest,
)

DELTAS = {"embedding": 4, "attention": 2, "output": 0}
TEXT = {"retention_loss": "text"}


def texts(number=12, length=50, seed=0):
    ids = torch.randint(3, 96, (number, length), generator=torch.Generator().manual_seed(seed))
    return ids.tolist()


def test_pieces_are_beginnings_and_middles_of_the_first_texts_and_the_same_each_time():
    pieces = cut_pieces(iter(texts()), 200, seed=1)
    assert pieces == cut_pieces(texts(), 200, seed=1) != cut_pieces(texts(), 200, seed=2)
    assert len(pieces) == DRAWN and {len(piece) for piece in pieces} == {LENGTH}
    used = texts()[:4]  # 200 tokens
    beginnings = [piece for piece in pieces if any(text[:LENGTH] == piece for text in used)]
    assert DRAWN // 2 <= len(beginnings) < 0.7 * DRAWN
    strings = [str(text)[1:-1] for text in used]
    assert all(any(str(piece)[1:-1] in text for text in strings) for piece in pieces)
    assert {len(piece) for piece in cut_pieces([[5, 6, 7]], 200, seed=0)} == {3}
    with pytest.raises(ValueError, match="no sample of two tokens or more: give longer text"):
        cut_pieces([[5], []], 200, seed=0)


def test_a_distribution_in_parts_sums_to_one():
    log_probs = torch.randn(3, 5, 90).log_softmax(-1)
    index = log_probs.topk(7).indices
    parts = with_rest(log_probs, index)
    torch.testing.assert_close(parts.exp().sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(parts[..., :-1], log_probs.topk(7).values)


def test_the_pieces_that_look_most_like_the_task_are_kept_with_what_the_base_says():
    model = open_gate(shake(make_model(**GATED)))
    pieces = [*texts(KEPT + 40, LENGTH), *texts(10, 7, seed=1)]
    kept = read_base(model, pieces, 64)
    base = make_base()
    with torch.no_grad():
        real = kept.attention_mask.bool()
        logits = base(input_ids=kept.input_ids, attention_mask=kept.attention_mask).logits.log_softmax(-1)
    expected = with_rest(logits, kept.index)
    torch.testing.assert_close(kept.log_probs[real], expected[real], rtol=1e-4, atol=1e-4)
    assert kept.index.shape[-1] == LIKELIEST and len(kept.input_ids) == KEPT
    margins = []
    handle = model.gate.register_forward_hook(lambda gate, args, output: margins.append(output))
    with torch.no_grad():
        for ids in pieces:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    best = sorted((float(margin.max()) for margin in margins), reverse=True)
    of_kept = [
        float(margins[pieces.index(ids[mask.bool()].tolist())].max()) for ids, mask in zip(*kept[:2], strict=True)
    ]
    assert of_kept == pytest.approx(best[:KEPT], abs=1e-4) and of_kept[0] > of_kept[-1]


def test_the_distance_by_hand_and_that_it_runs_with_the_gate_open():
    model = shake(make_model(**GATED | {"deltas": DELTAS}))
    model.gate_threshold = 1e9  # what the gate decides does not count
    pieces = [*texts(6, LENGTH), *texts(2, 9, seed=1)]
    text = read_base(model, pieces, 8)
    assert text_distance(model, text) > 1e-3
    model.gate_threshold = -1e9
    with torch.no_grad():
        found = text_distance(model, text)
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits.log_softmax(-1)
    q, p = with_rest(logits, text.index).exp(), text.log_probs.exp()
    expected = (p * (p / q).log()).sum(-1)[text.attention_mask.bool()].mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_drawn_depends_on_step_micro_batch_and_process_alone():
    model = shake(make_model(**GATED))
    text = read_base(model, texts(40, LENGTH), 64)
    drawn = {
        key: text.draw(*key).input_ids.tolist() for key in ((0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1))
    }
    assert len({str(ids) for ids in drawn.values()}) == 4
    assert text.draw(0, 1, 0, 0).input_ids.tolist() == drawn[0, 1, 0, 0]
    assert text.draw(3).log_probs.shape == (PIECES_A_STEP, LENGTH, LIKELIEST + 1)


@pytest.mark.parametrize("retention", ["text", None])
def test_training_has_it_in_its_loss_from_a_dataset_and_from_the_base(tmp_path, retention):
    model = make_model(**GATED | {"deltas": DELTAS})
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, **TEXT}
    trainer = gated_trainer(tmp_path, model, retention_dataset=retention, **settings)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        parts = entry["task_loss"] + 0.01 * entry["balance_loss"] + 2.0 * entry["retention_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4) and entry["retention_loss"] > 1e-4


def test_it_keeps_text_nearer_to_the_base(tmp_path):
    last = {}
    for weight in (1e-6, 100.0):
        model = make_model(**GATED | {"deltas": DELTAS})
        settings = {"learning_rate": 1e-2, "max_steps": 20, "retention_weight": weight, **TEXT}
        trainer = gated_trainer(tmp_path / str(weight), model, **settings)
        trainer.train()
        last[weight] = [entry["retention_loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last[100.0] < 0.5 * last[1e-6]


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2, **TEXT}
    whole = gated_trainer(tmp_path, make_model(**GATED | {"deltas": DELTAS}), **settings)
    whole.train()
    resumed = gated_trainer(tmp_path, make_model(**GATED | {"deltas": DELTAS}), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(tensor, tensors(whole.model)[name]) for name, tensor in tensors(resumed.model).items())


def test_without_its_weight_nothing_reads_text(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_base", None)
    trainer = gated_trainer(
        tmp_path, open_wide(make_model(**GATED)), **{**TEXT, "gate_steps": 0}, retention_weight=0.0
    )
    trainer.train()
    assert trainer.retention_text is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention_loss": "both"}, "retention_loss must be one of 'prompts', 'text', not 'both'"),
        ({"retention_loss": "text", "retention_weight": -1.0}, "retention_weight must be a finite number of at least"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        gated_trainer(tmp_path, **settings)


def test_a_gate_that_is_trained_already_may_have_text_for_the_loss_alone(tmp_path):
    settings = {**TEXT, "gate_steps": 0, "max_steps": 1}
    model = open_gate(make_model(**GATED))
    data = gated_trainer(tmp_path, make_model(**GATED)).retention_dataset
    trainer = gated_trainer(tmp_path, model, retention_dataset=data, **settings)
    trainer.train()
    assert len(losses(trainer)) == 1 and trainer.retention_text is not None
