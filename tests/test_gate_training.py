"""The gate's own training: what it learns from, what it learns, and what stays as it was."""

import pytest
import torch
from conftest import batch, make_base, make_encoder
from test_gate_moextend import LOWEST, gated, listen, opened, random_gate, text

from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.gate_moextend import TokenGate
from modeling_moextend.training.gate import TOKENS_A_STEP, fit_gate, gate_inputs, run_gate, sample_batch, shared_prefix

SIZE = 6


def caught(model, inputs):
    """What the gate got in a full pass: [B, S, H]."""
    heard = []
    handle = model.gate.register_forward_pre_hook(lambda gate, args: heard.append(args[0].detach().clone()))
    with torch.no_grad():
        model(**inputs, use_cache=False)  # beside a cache, packed rows would not be told apart
    handle.remove()
    return heard[0]


def assert_sequences(found, expected):
    assert len(found) == len(expected)
    for (ids, hidden), (wanted_ids, wanted) in zip(found, expected, strict=True):
        assert ids.tolist() == wanted_ids.tolist()
        assert torch.equal(hidden, wanted)


# ------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_those_that_the_gate_sees(family, dtype):
    """In rows with padding on the left; padding is dropped."""
    model = opened(base=make_base(family, dtype))
    parts = [batch(3, 10, seed=0), batch(2, 7, seed=1)]
    expected = []
    for part in parts:
        hidden = caught(model, part)
        for row, mask in enumerate(part["attention_mask"].bool()):
            expected.append((part["input_ids"][row][mask], hidden[row][mask]))
    found = gate_inputs(model, iter(parts))
    assert_sequences(found, expected)
    assert {hidden.dtype for _, hidden in found} == {dtype}
    assert not any(hidden.requires_grad for _, hidden in found)


def test_padding_on_the_right_is_dropped():
    model, ids = opened(), text(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    hidden = caught(model, {"input_ids": ids, "attention_mask": mask})
    expected = [(ids[0], hidden[0]), (ids[1, :5], hidden[1, :5])]
    assert_sequences(gate_inputs(model, [{"input_ids": ids, "attention_mask": mask}]), expected)


def test_packed_sequences_come_apart_in_order():
    model, ids = opened(), text(1, 12)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(3), *range(4)]])}
    hidden = caught(model, packed)
    parts = [(0, 5), (5, 8), (8, 12)]
    expected = [(ids[0, first:last], hidden[0, first:last]) for first, last in parts]
    assert_sequences(gate_inputs(model, [packed]), expected)


def test_packed_rows_with_padding_come_apart_without_it():
    model, ids = opened(), text(2, 8)
    positions = torch.tensor([[*range(5), *range(3)], [*range(3), *range(3), 0, 0]])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = gate_inputs(model, [{"input_ids": ids, "position_ids": positions, "attention_mask": mask}])
    expected = [ids[0, :5], ids[0, 5:], ids[1, :3], ids[1, 3:6]]
    assert [given.tolist() for given, _ in found] == [wanted.tolist() for wanted in expected]


def test_images_are_seen():
    model = opened(encoder=make_encoder(), image_token_id=96)
    ids = text(2, 10)
    ids[:, 2:6] = 96
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels}
    hidden = caught(model, inputs)
    found = gate_inputs(model, [inputs])
    assert_sequences(found, [(ids[0], hidden[0]), (ids[1], hidden[1])])
    other = gate_inputs(model, [{**inputs, "pixel_values": pixels.flip(0)}])
    assert not torch.equal(found[0][1][2:], other[0][1][2:])


@pytest.mark.parametrize("training", [True, False])
def test_the_pass_ends_at_the_lowest_extended_layer_and_leaves_nothing_behind(training):
    model = opened().train(training)
    layers, calls = model.get_decoder().layers, []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *args, index=index, layer=layer: calls.append((index, layer.training)))
    model.base.lm_head.register_forward_pre_hook(lambda *args: calls.append("head"))
    heard = listen(model)
    gate_inputs(model, [batch(2, 6), batch(2, 6)])
    assert calls == [(index, False) for _ in range(2) for index in range(LOWEST + 1)]
    assert heard == []  # nor does the gate itself run
    assert model.training == model.base.training == training
    assert model.passes.thread.plan is None
    assert not find_moe_layers(model.get_decoder())[LOWEST].router._forward_pre_hooks


@pytest.mark.parametrize("where", ["data", "model"])
def test_an_error_leaves_no_hook_and_the_mode_as_it_was(where, monkeypatch):
    model = opened().train()
    router = find_moe_layers(model.get_decoder())[LOWEST].router

    def fail(*args, **kwargs):
        raise KeyError("broken")

    def rows():
        yield batch(2, 6)
        if where == "model":
            monkeypatch.setattr(model.get_decoder().layers[0], "forward", fail)
            yield batch(2, 6)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        gate_inputs(model, rows())
    assert not router._forward_pre_hooks and model.training
    assert model.passes.thread.plan is None


def test_the_model_computes_what_it_did_before():
    model, inputs = opened(), batch()
    with torch.no_grad():
        before = model(**inputs).logits
        gate_inputs(model, [inputs])
        assert torch.equal(model(**inputs).logits, before)


# ------------------------------------------------------------------ the shared prefix


def rows_of(*sequences):
    return [(torch.tensor(ids), torch.zeros(len(ids), SIZE)) for ids in sequences]


def test_shared_prefix_by_hand():
    assert shared_prefix(rows_of([1, 5, 6, 7], [1, 5, 8], [1, 5, 6])) == 2
    assert shared_prefix(rows_of([1, 5], [1, 5, 8])) == 2
    assert shared_prefix(rows_of([1, 5], [2, 5])) == 0


def test_image_tokens_share_an_id_and_nothing_else():
    rows = rows_of([1, 9, 9, 4, 5], [1, 9, 9, 4, 6])
    assert shared_prefix(rows, [9]) == 1
    assert shared_prefix(rows) == shared_prefix(rows, [5]) == 4
    assert shared_prefix(rows_of([1, 9, 4], [1, 9, 4]), [9]) == 1  # one question about many images


def test_samples_that_are_all_the_same_tell_nothing():
    with pytest.raises(ValueError, match="can't learn from this training data: all its samples are the same"):
        shared_prefix(rows_of([1, 2, 3], [1, 2, 3]))


# ------------------------------------------------------------------ what the gate learns


def data(number, sign, seed, prefix=0):
    """Sequences whose hidden states lie on one side of a plane; those of a prefix are the same on both."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(4 + prefix, 12 + prefix, (number,), generator=generator).tolist():
        hidden = 0.3 * torch.randn(length, SIZE, generator=generator)
        hidden[:, 0] += sign
        hidden[:prefix] = 1.0
        rows.append((torch.arange(length), hidden))
    return rows


def fit(gate=None, task=None, retention=None, **options):
    if gate is None:
        torch.manual_seed(0)
        gate = TokenGate(SIZE, 5)
    options = {"prefix": 0, "steps": 150, "learning_rate": 1e-2, "progress": False, **options}
    task = data(40, 1.0, 1) if task is None else task
    retention = data(40, -1.0, 2) if retention is None else retention
    return gate, fit_gate(gate, task, retention, **options)


def weights(gate):
    return [p.detach().clone() for p in gate.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_can_be_told_apart_is_told_apart():
    gate, report = fit()
    assert report.routed > 0.95 and report.captured < 0.02
    assert report.loss < 0.5
    margins, counts = run_gate(gate, data(10, 1.0, 7), 0)  # sequences that nobody has seen
    assert (margins[counts] > 0).float().mean() > 0.95
    margins, counts = run_gate(gate, data(10, -1.0, 8), 0)
    assert (margins[counts] > 0).float().mean() < 0.05


def test_the_report_is_of_sequences_kept_aside():
    """Every 20th sequence looks like the other kind: had the gate learned from them, it would know."""
    task, retention = data(40, 1.0, 1), data(40, -1.0, 2)
    for place in (0, 20):
        task[place], retention[place] = retention[place], task[place]
    gate, report = fit(task=task, retention=retention)
    assert report.routed < 0.05 and report.captured > 0.95
    assert report.loss < 0.5
    same, _ = fit(task=task[:20] + data(1, 5.0, 9) + task[21:], retention=retention)
    assert equal(weights(gate), weights(same))


def test_the_report_counts_at_the_threshold():
    assert fit(steps=3, threshold=-1e9)[1][1:3] == (1.0, 1.0)
    assert fit(steps=3, threshold=1e9)[1][1:3] == (0.0, 0.0)


def test_one_seed_gives_one_gate_and_another_seed_another():
    first, again, other = (weights(fit(seed=seed, steps=20)[0]) for seed in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)


def test_the_process_stays_as_it_was_and_the_gate_is_frozen_afterwards():
    torch.manual_seed(0)
    gate = TokenGate(SIZE, 5).requires_grad_(False)
    before, start = torch.get_rng_state(), weights(gate)
    with torch.no_grad():  # it switches gradients on for itself
        fit(gate, steps=5)
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert not equal(start, weights(gate))
    assert all(not p.requires_grad and p.grad is None for p in gate.parameters())


def test_zero_steps_leave_the_gate_and_report_on_it():
    gate = random_gate(SIZE, 5)
    before = weights(gate)
    _, report = fit(gate, steps=0)
    assert equal(before, weights(gate))
    assert 0 <= report.routed <= 1 and 0 <= report.captured <= 1


@pytest.mark.parametrize(("task_weight", "retention_weight", "opens"), [(0.1, 10.0, False), (10.0, 0.1, True)])
def test_the_larger_weight_decides_what_cannot_be_told_apart(task_weight, retention_weight, opens):
    same = data(40, 0.0, 1)
    _, report = fit(task=same, retention=same, task_weight=task_weight, retention_weight=retention_weight)
    assert (report.routed, report.captured) == ((1.0, 1.0) if opens else (0.0, 0.0))


def test_the_loss_is_the_two_hinges():
    """One step, of which the loss is taken before: every margin is -1 at first, 2 too low for the task."""
    _, report = fit(steps=1, task_weight=3.0, retention_weight=100.0)
    assert report.loss == pytest.approx(3.0 * 2 + 100.0 * 0)
    gate = TokenGate(SIZE, 5)
    torch.nn.init.constant_(gate.fc2.bias, 0.5)
    assert fit(gate, steps=1, task_weight=3.0, retention_weight=10.0)[1].loss == pytest.approx(3.0 * 0.5 + 10.0 * 1.5)


def test_a_shared_prefix_counts_for_neither():
    """Its hidden states are the retention text's: counted, most of the task would be that."""
    task, retention = data(40, 1.0, 1, prefix=9), data(40, -1.0, 2, prefix=9)
    gate, report = fit(task=task, retention=retention, prefix=9, task_weight=10.0)
    assert report.prefix == 9
    assert report.routed > 0.9 and report.captured < 0.05
    margins, _ = run_gate(gate, task, 0)
    assert (margins[:, :9] < 0).all()  # retention text of the same start keeps it shut
    _, counts = run_gate(gate, task, 9)
    assert not counts[:, :9].any() and counts.sum() == sum(len(ids) - 9 for ids, _ in task)


def test_a_step_without_a_token_that_counts_gives_no_nan():
    short = data(40, 1.0, 1)[:3]
    gate, report = fit(task=short, prefix=100, steps=10)
    assert all(torch.isfinite(p).all() for p in gate.parameters())
    assert report.loss == report.loss and report.routed != report.routed  # no share of nothing


def test_one_sequence_is_trained_and_measured_on():
    _, report = fit(task=data(1, 1.0, 1), retention=data(1, -1.0, 2))
    assert (report.routed, report.captured) == (1.0, 0.0)


def test_a_gate_kept_in_bf16_trains_in_float32():
    gate = random_gate(SIZE, 5).to(torch.bfloat16)
    fit(gate, steps=5)
    assert {p.dtype for p in gate.parameters()} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in gate.parameters())


def test_states_in_bf16_train_as_well():
    halved = [[(ids, hidden.bfloat16()) for ids, hidden in data(40, sign, 1)] for sign in (1.0, -1.0)]
    _, report = fit(task=halved[0], retention=halved[1])
    assert report.routed > 0.95 and report.captured < 0.05


def test_padded_rows_have_the_margins_of_rows_alone():
    gate, rows = random_gate(SIZE, 5), data(4, 1.0, 3)
    margins, counts = run_gate(gate, rows, 2)
    for row, given in enumerate(rows):
        alone, _ = run_gate(gate, [given], 0)
        torch.testing.assert_close(margins[row, : len(given[0])], alone[0])
        assert counts[row].nonzero().flatten().tolist() == list(range(2, len(given[0])))


def test_a_step_takes_rows_up_to_its_number_of_tokens():
    generator = torch.Generator().manual_seed(0)
    rows = data(50, 1.0, 1)
    sizes = [sum(len(ids) for ids, _ in sample_batch(rows, generator)) for _ in range(5)]
    assert all(TOKENS_A_STEP - 12 < size <= TOKENS_A_STEP for size in sizes)
    long = [(torch.arange(TOKENS_A_STEP + 5), torch.zeros(TOKENS_A_STEP + 5, SIZE))]
    assert len(sample_batch(long, generator)) == 1


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_the_callers_choice(capfd, progress):
    fit(steps=3, progress=progress)
    assert ("training the gate" in capfd.readouterr().err) == progress


def test_a_trained_gate_decides_the_same_inside_the_model():
    """What was learned on cached states holds in a pass: the margins are those of the cached states."""
    model = gated()
    low = text(30, 8) % 40 + 3
    task = gate_inputs(model, [{"input_ids": low}])
    retention = gate_inputs(model, [{"input_ids": low + 45}])
    fit_gate(model.gate, task, retention, prefix=0, steps=150, learning_rate=1e-2, progress=False)
    with torch.no_grad(), model.record_routing() as records:
        model(torch.cat([low, low + 45]))
    through = records[LOWEST].scope.reshape(60, 8).float()
    assert through[:30].mean() > 0.95 and through[30:].mean() < 0.02
    margins, _ = run_gate(model.gate, task, 0)
    torch.testing.assert_close(records[LOWEST].gate.reshape(60, 8)[:30], margins, rtol=1e-4, atol=1e-4)
