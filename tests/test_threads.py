"""A pass is one adapter set from its first layer to its last, whatever other threads do to the model meanwhile."""

import collections
import random
import threading
import time
import traceback

import pytest
import torch
from conftest import batch
from test_adapters_moextend import COMPETE, DELTAS, GATED_COMPETE, load, make_once

from modeling_moextend import layers_moextend

INPUTS = batch(rows=3)
ITEMS = ["a", ["a", "b"], "__base__"]
SETS = (["a"], ["b"], ["c"], ["a", "b"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_once(tmp_path_factory)


@pytest.fixture
def model(made):
    """ "a" is active, "b" has a gate and deltas, "c" is loaded beside them and has deltas too."""
    return load(made, ("a", COMPETE), ("b", {**GATED_COMPETE, **DELTAS}), ("c", {**COMPETE, **DELTAS})).eval()


def logits(model, **options):
    return model(**INPUTS, **options).logits.detach()


def generated(model, **options):
    options |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(**INPUTS, output_logits=True, return_dict_in_generate=True, **options).logits


def gradients(model):
    model.zero_grad()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = ([value] if torch.is_tensor(value) else value for value in (one, other))
    return len(one) == len(other) and all(map(torch.equal, one, other))


CHANGES = {  # what another thread may do, and the state in which the model then has to answer
    "set_adapter": lambda model, made: model.set_adapter(["b", "c"]),
    "one more adapter": lambda model, made: model.set_adapter(["a", "b"]),
    "delete_adapter": lambda model, made: (model.set_adapter("c"), model.delete_adapter(["a", "b"])),
    "load_adapter": lambda model, made: (
        model.load_adapter(made("b", COMPETE), adapter_name="d"),
        model.set_adapter(["a", "d"]),
    ),
    "disable_adapters": lambda model, made: model.disable_adapters(),
    "extend": lambda model, made: model.extend({0: [1]}),
    "add_adapter": lambda model, made: model.add_adapter("d", extended_layers={0: [2]}, **COMPETE),
    "gate_threshold": lambda model, made: setattr(model.adapters["b"].config, "gate_threshold", 1e9),
}


def in_another_thread(change, *arguments):
    """Runs `change` to its end beside a pass that waits for it."""
    errors = []

    def work():
        try:
            change(*arguments)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and not errors, errors


class InTheMiddle:
    """Calls `change` in another thread once, when the base's layer 1 has been called `after` times more."""

    def __init__(self, model, change, made, after=0):
        self.layer, self.left = model.get_decoder().layers[1], after

        def hook(module, args, output):
            self.left -= 1
            if self.left == -1:
                in_another_thread(change, model, made)

        self.hook = hook

    def __enter__(self):
        self.handle = self.layer.register_forward_hook(self.hook)

    def __exit__(self, *_):
        self.handle.remove()
        assert self.left < 0, "the change came"


def prepared(model, change):
    model.set_adapter(["a", "b"] if change == "gate_threshold" else ["a"])
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_pass_waits_for_the_next_one(change, model, made):
    expected = logits(prepared(model, change))
    with InTheMiddle(model, CHANGES[change], made):
        found = logits(model)
    assert same(found, expected)
    if change not in ("extend", "add_adapter"):  # copies of base experts: they change little before they train
        assert not same(logits(model), expected), "and then it holds"


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_one_generate_keeps_its_adapters(change, after, model, made):
    expected = generated(prepared(model, change))
    with InTheMiddle(model, CHANGES[change], made, after):
        found = generated(model)
    assert same(found, expected)


@pytest.mark.parametrize("change", ["set_adapter", "disable_adapters", "load_adapter"])
def test_a_pass_by_name_and_one_that_is_switched_off_keep_theirs(change, model, made):
    expected, generated_by_name = logits(model, adapter_names=ITEMS), generated(model, adapter_names=ITEMS)
    with InTheMiddle(model, CHANGES[change], made):
        assert same(logits(model, adapter_names=ITEMS), expected)
    model.enable_adapters()
    with InTheMiddle(model, CHANGES["set_adapter"], made, after=2):
        assert same(generated(model, adapter_names=ITEMS), generated_by_name)
    with model.disable_adapter():
        expected = logits(model)
        with InTheMiddle(model, CHANGES["set_adapter"], made):
            assert same(logits(model), expected)


def test_a_pass_may_come_while_a_layer_gets_its_first_experts(made, monkeypatch):
    """Before and after the experts' class is swapped for one that asks what adapters add."""
    model = load(made, ("a", COMPETE)).eval()
    expected, found = logits(model), []

    def then_a_pass(step):
        def both(*arguments):
            result = step(*arguments)
            in_another_thread(lambda: found.append(logits(model)))
            return result

        return both

    for name in ("Extension", "swap_class"):
        monkeypatch.setattr(layers_moextend, name, then_a_pass(getattr(layers_moextend, name)))
    model.extend({0: [1]})
    assert len(found) == 2 and all(same(one, expected) for one in found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", ["one more adapter", "disable_adapters", "load_adapter", "gate_threshold"])
def test_backward_sees_what_forward_saw(change, checkpointing, model, made):
    """Also where checkpointing computes the layers again, after the change. (What asks for gradients is a property of
    parameters: an adapter that set_adapter freezes meanwhile gets none.)"""
    prepared(model, change).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = gradients(model)
    model.zero_grad()
    loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
    in_another_thread(CHANGES[change], model, made)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected and same(found, expected)


@pytest.mark.parametrize("share", [0.25, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flip", ["set_adapter", "load and delete", "on and off"])
def test_random_threads_never_mix_adapter_sets(flip, share, model, made):
    """Plain passes, passes by name or switched off, and whole generations, beside a thread that changes the model."""
    by_set = {}
    for names in SETS:
        model.set_adapter(names)
        by_set[tuple(names)] = logits(model), generated(model)
    model.set_adapter(["a"])
    by_name, generated_by_name = logits(model, adapter_names=ITEMS), generated(model, adapter_names=ITEMS)
    with model.disable_adapter():
        off = logits(model)
    if flip != "set_adapter":
        by_set = {("a",): by_set["a",]}
    if flip == "on and off":
        with model.disable_adapter():
            by_set["off",] = logits(model), generated(model)
        checks = {}
    else:
        checks = {
            "by name": lambda: same(logits(model, adapter_names=ITEMS), by_name),
            "generate by name": lambda: same(generated(model, adapter_names=ITEMS), generated_by_name),
        }

    def switched_off():
        with model.disable_adapter():
            return same(logits(model), off)

    def plain():
        found = logits(model)
        return any(same(found, known) for known, _ in by_set.values())

    def whole():
        found = generated(model)
        return any(same(found, known) for _, known in by_set.values())

    checks |= {"plain": plain, "generate": whole, "off": switched_off}
    drawn = random.Random(0)  # without sleep, a thread keeps the interpreter 5 ms for each operator of the others
    changes = {
        "set_adapter": lambda: (model.set_adapter(drawn.choice(SETS)), time.sleep(drawn.random() / 500)),
        "load and delete": lambda: (
            model.load_adapter(made("c", COMPETE), adapter_name="x"),
            model.delete_adapter("x"),
        ),
        "on and off": lambda: (model.disable_adapters(), time.sleep(drawn.random() / 500), model.enable_adapters()),
    }
    counts, errors, done = collections.Counter(), [], threading.Event()

    def loop(name, action, number=None):
        try:
            while number is None or counts[name] < number:
                if number is None and done.is_set():
                    return
                assert action() is not False, f"{name}: neither the old adapter set nor the new one"
                counts[name] += 1
        except BaseException:
            errors.append(traceback.format_exc())

    numbers = {"plain": 150, "by name": 100, "off": 100, "generate": 25, "generate by name": 25}
    workers = [
        threading.Thread(target=loop, args=(name, check, int(share * numbers[name])), daemon=True)
        for name, check in checks.items()
    ]
    changer = threading.Thread(target=loop, args=("change", changes[flip]), daemon=True)
    for thread in (changer, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    changer.join()
    assert not errors, errors[0]
    assert counts["change"] >= 5 and counts.total() - counts["change"] >= 250 * share


@pytest.mark.slow
def test_a_compiled_model_keeps_its_adapters_and_follows_the_next_ones(model, made):
    """torch.compile guards what a plan holds: another adapter set is another graph, never a stale one."""
    compiled = torch.compile(model, backend="eager")
    expected = {}
    for names in SETS:
        model.set_adapter(names)
        expected[tuple(names)] = logits(model)
    with model.disable_adapter():
        off = logits(model)
    for names in (*SETS, *reversed(SETS)):
        model.set_adapter(names)
        assert same(logits(compiled), expected[tuple(names)])
        with model.disable_adapter():
            assert same(logits(compiled), off)
    errors, done = [], threading.Event()

    def flip():
        drawn = random.Random(0)
        while not done.is_set():
            model.set_adapter(drawn.choice(SETS))
            time.sleep(0.001)

    changer = threading.Thread(target=flip, daemon=True)
    changer.start()
    try:
        for _ in range(60):
            found = logits(compiled)
            errors += [] if any(same(found, known) for known in expected.values()) else [found]
    finally:
        done.set()
        changer.join()
    assert not errors, f"{len(errors)} of 60 passes are of no adapter set"
