"""Adapters on top of adapters: three tasks in a row leave the first two as they were; what depends on what is kept."""

import json

import pytest
import torch
from conftest import batch, make_base, make_encoder, new_spans, shake
from datasets import Dataset
from safetensors import safe_open
from test_sft_trainer import WORDS, config, make_tokenizer

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.attaching.extending import describe_adapters
from modeling_moextend.families_moextend import find_moe_layers, in_order
from modeling_moextend.publishing.card import create_card
from modeling_moextend.tools.hashes import base_tensors_hash
from modeling_moextend.tools.merge import merge
from modeling_moextend.training.resuming import load_adapter_tensors
from modeling_moextend.training.trainer import MoExtendSFTTrainer

PLAN = {1: [0, 3], 2: [2, 5]}
GATED = {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_hidden_size": 16}
COMPETE = {"scope": "all", "selection": "compete", "calibration": "none"}
EXCLUSIVE = {"scope": "all", "selection": "exclusive", "calibration": "none"}
TASKS = {"a": 0, "b": 6, "c": 12}  # the first of six letters that the task's texts are made of
REST = 18  # of eight letters that no task has


def lines(first, letters=6, number=24, length=8):
    return [
        " ".join(WORDS[4 + first + (i + j * (1 + i % 2)) % letters] for j in range(length + i % 3))
        for i in range(number)
    ]


def ids_of(first, letters=6):
    """One [1, S] a text."""
    tokenizer = make_tokenizer()
    return [tokenizer(line, return_tensors="pt").input_ids for line in lines(first, letters)]


def train(model, folder, name, **settings):
    """Trains the task `name`; the gate leaves to others what the other tasks and the rest are made of."""
    others = [line for task, first in TASKS.items() if task != name for line in lines(first)] + lines(REST, 8)
    gated = model.config.scope == "gate"
    settings = (
        {"gate_steps": 150, "gate_learning_rate": 2e-2, "retention_tokens": 800, **settings} if gated else settings
    )
    trainer = MoExtendSFTTrainer(
        model=model,
        args=config(
            folder, **{"max_steps": 12, "per_device_train_batch_size": 8, "router_aux_loss_coef": 0.01} | settings
        ),
        train_dataset=Dataset.from_dict({"text": lines(TASKS[name])}),
        retention_dataset=Dataset.from_dict({"text": others}) if gated else None,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return trainer


@torch.no_grad()
def logits_of(model, first, letters=6):
    model.eval()
    return [model(ids).logits for ids in ids_of(first, letters)]


@torch.no_grad()
def loss_of(model, first):
    model.eval()
    return sum(float(model(ids, labels=ids).loss) for ids in ids_of(first)) / 24


@torch.no_grad()
def uses(model, ids, names):
    """Whether any token selects an expert of the adapters `names`, in any layer."""
    with model.record_routing() as records:
        model(ids)
    for layer, record in records.items():
        spans = new_spans(model, layer)
        for first, stop in (spans[name] for name in names if name in spans):
            if bool(((record.index >= first) & (record.index < stop)).any()):
                return True
    return False


def copies(model, name):
    return {key: tensor.detach().clone() for key, tensor in model.adapter_tensors(name).items()}


@pytest.mark.slow
def test_three_tasks_in_a_row_leave_the_first_two_unchanged(tmp_path):
    torch.manual_seed(0)
    model = MoExtendForCausalLM.from_base(make_base(), PLAN, adapter_name="a", **GATED)
    base_hashes, base = base_tensors_hash(model), make_base()
    plain = {name: logits_of(base, first) for name, first in TASKS.items()}
    kept, tensors, losses = {}, {}, {}
    for number, (name, first) in enumerate(TASKS.items()):
        if number:
            model.add_adapter(name, PLAN, **GATED)
        assert model.active_adapters() == list("abc"[: number + 1])
        before = loss_of(model, first)
        trainer = train(model, tmp_path / name, name, verify_base=True)
        assert set(trainer.trainable) == set(model.set_trainable()) and trainer.gate_report.routed > 0.5
        trainer.save_model()
        losses[name] = before, loss_of(model, first)
        kept[name], tensors[name] = logits_of(model, first), copies(model, name)
    assert all(after < before - 0.3 for before, after in losses.values())
    assert base_tensors_hash(model) == base_hashes
    for name in "ab":  # neither the tensors nor, where no later expert is selected, a bit of what they compute
        now = model.adapter_tensors(name)
        assert all(torch.equal(tensor, now[key]) for key, tensor in tensors[name].items())
        later, found = "abc"["abc".index(name) + 1 :], logits_of(model, TASKS[name])
        free = [not uses(model, ids, later) for ids in ids_of(TASKS[name])]
        assert sum(free) >= 12
        assert all(torch.equal(*pair) for *pair, unused in zip(kept[name], found, free, strict=True) if unused)
        assert loss_of(model, TASKS[name]) < losses[name][1] + 0.1
    rest = logits_of(model, REST, 8)  # and the base's own text stays the base's
    free = [not uses(model, ids, "abc") for ids in ids_of(REST, 8)]
    assert sum(free) >= 12
    assert all(torch.equal(*p) for *p, unused in zip(rest, logits_of(base, REST, 8), free, strict=True) if unused)
    assert not all(torch.equal(*pair) for pair in zip(plain["a"], kept["a"], strict=True))
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "a", base=make_base(), adapter_name="a")
    with pytest.raises(ValueError, match="was trained on top of 'b', which this model does not have"):
        again.load_adapter(tmp_path / "c", adapter_name="c")
    again.load_adapter(tmp_path / "b", adapter_name="b")
    again.load_adapter(tmp_path / "c", adapter_name="c")
    again.set_adapter(["c", "a", "b"])
    for first in TASKS.values():
        assert all(torch.equal(*pair) for pair in zip(logits_of(again, first), logits_of(model, first), strict=True))


# ---------------------------------------------------------------- add_adapter


@pytest.fixture
def stacked():
    torch.manual_seed(1)
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE))
    model.add_adapter("b", {0: [1, 2], 1: [4]}, **EXCLUSIVE)
    return model


def test_a_further_adapter_trains_alone_on_top_of_frozen_ones(stacked, tmp_path):
    assert stacked.active_adapters() == ["b", "default"]
    assert stacked.config.extended_layers == {0: [1, 2], 1: [4]}
    assert not any(tensor.requires_grad for tensor in stacked.adapter_tensors("default").values())
    below, own, hashes = copies(stacked, "default"), copies(stacked, "b"), base_tensors_hash(stacked)
    trainer = train(stacked, tmp_path, "b", max_steps=3)
    assert all(torch.equal(tensor, below[key]) for key, tensor in stacked.adapter_tensors("default").items())
    moved = {key for key, tensor in stacked.adapter_tensors("b").items() if not torch.equal(tensor, own[key])}
    assert moved == set(own) == set(trainer.trainable)  # layer 1 has one new expert of b, but three that share tokens
    assert base_tensors_hash(stacked) == hashes
    trainer.save_model()
    with safe_open(tmp_path / FILE, "pt") as file:
        assert set(file.keys()) == set(own)
        stored = json.loads(file.metadata()["config"])
    assert [entry["name"] for entry in stored["trained_on"]] == ["default"]


def test_trainable_parameters_are_those_of_the_adapter_on_top(stacked, capsys):
    own = sum(tensor.numel() for tensor in stacked.adapter_tensors("b").values())
    assert stacked.num_parameters(only_trainable=True) == own
    stacked.print_trainable_parameters()
    assert f"trainable params: {own:,} ||" in capsys.readouterr().out
    assert stacked.adapter_tensors().keys() == stacked.adapter_tensors("b").keys()
    assert stacked.adapter_bytes() == 4 * own


def test_a_checkpoint_of_the_adapter_on_top_is_resumed(tmp_path):
    def model():
        torch.manual_seed(1)
        base = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE))
        base.add_adapter("b", {1: [4, 2]}, **EXCLUSIVE)
        return base

    whole = train(model(), tmp_path / "whole", "b", max_steps=4, save_strategy="steps", save_steps=2)
    resumed = model()
    trainer = train(resumed, tmp_path / "part", "b", max_steps=2)
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("default", "b"):
        expected = whole.model.adapter_tensors(name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.adapter_tensors(name).items())


def test_new_experts_on_top_take_part_at_once(stacked):
    alone = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE))
    with torch.no_grad():
        assert not torch.equal(stacked(**batch()).logits, alone(**batch()).logits)
        stacked.set_adapter("default")
        assert torch.equal(stacked(**batch()).logits, alone(**batch()).logits)


def test_gradients_reach_the_adapter_on_top_only(stacked):
    trained = stacked.set_trainable()
    inputs = batch()
    stacked(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    assert [name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.any()] == []
    own = {id(tensor) for tensor in trained.values()}
    assert [name for name, p in stacked.named_parameters() if p.grad is not None and id(p) not in own] == []


def test_an_adapter_that_no_token_selects_gets_gradients_of_zero():
    """A gradient of `None` would part the processes of a distributed run."""
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **COMPETE))
    model.add_adapter("b", {1: [4, 2]}, **COMPETE)
    trained = model.set_trainable()
    layer, x = find_moe_layers(model.get_decoder())[1], torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        row = torch.linalg.lstsq(x, torch.full((16, 1), -60.0)).solution.squeeze(-1)
        trained["layers.1.router.weight"].copy_(row.expand(2, -1))
    _, weights, index = in_order(layer.router(x))
    layer.experts(x, index, weights).sum().backward()
    assert (index >= 8).any() and not ((index >= 6) & (index < 8)).any()  # of default, and none of b
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in trained.values())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (COMPETE, r"must select alike, but these do not: {'default': 'exclusive', 'b': 'compete'}"),
        ({**COMPETE, "calibration": "routed"}, r"Adapters \['b'\] are calibrated for their own new experts"),
        ({"extended_layers": {9: [0]}}, r"Layers \[9\] are not MoE layers of this base"),
        ({"extended_layers": {}}, "Nothing to add"),
        ({"scope": "some"}, "scope='some' must be one of"),
        ({"adapter_name": "default"}, "An adapter 'default' is loaded already"),
    ],
    ids=str,
)
def test_what_cannot_go_on_top_is_refused_and_leaves_the_model_as_it_was(choices, message):
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE))
    before = sorted(model.state_dict())
    given = {"adapter_name": "b", "extended_layers": {1: [0]}, **EXCLUSIVE, **choices}
    with pytest.raises(ValueError, match=message):
        model.add_adapter(**given)
    assert sorted(model.state_dict()) == before and model.active_adapters() == ["default"]
    assert all(tensor.requires_grad for tensor in model.adapter_tensors().values())
    with model.disable_adapter(), pytest.raises(ValueError, match=r"The adapters are off.*enable_adapters\(\)"):
        model.add_adapter("b", {1: [0]}, **EXCLUSIVE)


def test_text_experts_join_an_adapter_with_eyes_and_two_pairs_of_eyes_are_refused():
    choices = {"scope": "modality", "selection": "exclusive", "calibration": "none", "encoder": make_encoder()}
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **choices))
    model.add_adapter("law", {0: [1, 2]}, scope="all")
    assert model.config.encoder_config is None and model.encoder is not None and model.image_token_id == 96
    with pytest.raises(ValueError, match=r"Adapters \['default', 'see'\] have an encoder each"):
        model.add_adapter("see", {0: [3]}, encoder=make_encoder())
    ids = torch.tensor([[5, 96, 96, 96, 96, 7, 8]])
    with torch.no_grad(), model.record_routing() as records:
        model(ids, pixel_values=torch.randn(1, 3, 16, 16))
    assert records[1].scope.tolist() == [False] + [True] * 6 and (records[0].index >= 6).all()


# ---------------------------------------------------------------- trained_on


def saved(tmp_path, dtype=None, choices=EXCLUSIVE):
    torch.manual_seed(1)
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **choices))
    model.save_pretrained(tmp_path / "a", adapter_dtype=dtype)
    model.add_adapter("law", {0: [1, 2], 1: [4]}, **choices)
    model.save_pretrained(tmp_path / "law", adapter_dtype=dtype)
    return model


@pytest.mark.parametrize("choices", [EXCLUSIVE, GATED], ids=["exclusive", "gate"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_an_adapter_is_loaded_on_top_of_those_it_was_trained_on_whatever_they_are_called(tmp_path, dtype, choices):
    saved(tmp_path, dtype, choices)
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "a", base=make_base(), adapter_name="ground")
    model.load_adapter(tmp_path / "law", adapter_name="law")
    model.set_adapter(["ground", "law"])
    assert [entry["name"] for entry in model.adapters["law"].config.trained_on] == ["default"]
    assert model.adapters["law"].depends_on == {"ground"} and model.leading == "law"


def test_an_adapter_is_not_used_without_loaded_ones_that_it_was_trained_on(stacked):
    inputs, message = batch(), r"Adapter 'b' was trained on top of \['default'\].*together: \['b', 'default'\]"
    with torch.no_grad():
        together = stacked(**inputs).logits
        for use in (lambda: stacked.set_adapter("b"), lambda: stacked(**inputs, adapter_names=["default", "b", "b"])):
            with pytest.raises(ValueError, match=message):
                use()
        assert stacked.active_adapters() == ["b", "default"]
        by_row = stacked(**inputs, adapter_names=["default", ["default", "b"], "default"]).logits
        stacked.set_adapter("default")
        torch.testing.assert_close(by_row[0], stacked(**inputs).logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_row[1], together[1], rtol=1e-4, atol=1e-5)
        stacked.set_adapter("b", check_trained_on=False)
        assert not torch.allclose(stacked(**inputs).logits, together, atol=1e-3)


def test_of_a_stack_the_adapter_on_top_trains_and_is_saved(stacked, tmp_path):
    stacked.set_adapter("default")
    assert stacked.leading == "default" and not any(t.requires_grad for t in stacked.adapter_tensors().values())
    stacked.set_adapter(["default", "b"])
    assert not any(tensor.requires_grad for tensor in stacked.adapter_tensors("default").values())
    assert all(tensor.requires_grad for tensor in stacked.adapter_tensors("b").values())
    stacked.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["trained_on"][0]["name"] == "default"
    stacked.delete_adapter("b")
    stacked.set_adapter("default")
    assert all(tensor.requires_grad for tensor in stacked.adapter_tensors().values())


@pytest.mark.parametrize("active", ["default", ["default", "b"]], ids=str)
def test_what_another_adapter_stands_on_does_not_change_below_it(active, stacked, tmp_path):
    stacked.save_pretrained(tmp_path, adapter_name="default")
    stacked.set_adapter(active)
    message = r"Adapters \['b'\] were trained on top of 'default' as it is, so it can't change.*delete_adapter"
    with pytest.raises(ValueError, match=message):
        stacked.set_trainable(adapter_name="default")
    if active == "default":
        with pytest.raises(ValueError, match=message):
            stacked.extend({3: [0]})
        with pytest.raises(ValueError, match=message):
            load_adapter_tensors(stacked, tmp_path)


def test_extending_again_keeps_active_adapters_fit_to_share_tokens():
    choices = {"scope": "modality", "selection": "exclusive", "calibration": "none", "encoder": make_encoder()}
    model = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **COMPETE))
    model.add_adapter("see", {}, **choices)
    before = sorted(model.state_dict())
    with pytest.raises(ValueError, match="must select alike, but these do not"):
        model.extend({0: [2]})
    assert sorted(model.state_dict()) == before and model.config.extended_layers == {}
    model.set_adapter("see", check_trained_on=False)
    model.extend({0: [2]})
    assert model.config.extended_layers == {0: [2]}
    with pytest.raises(ValueError, match="must select alike"):
        model.set_adapter(["default", "see"])


def test_extending_takes_an_adapter_that_is_on_top(tmp_path):
    saved(tmp_path)
    model = MoExtendForCausalLM.from_base(make_base(), {1: [4]}, **EXCLUSIVE)
    model.load_adapter(tmp_path / "a", adapter_name="law")
    model.set_adapter(["default", "law"])
    with pytest.raises(ValueError, match="so it takes a name"):
        model.extend({3: [0]})


def test_the_order_of_loading_does_not_change_what_stands_on_what(tmp_path):
    saved(tmp_path)
    model = MoExtendForCausalLM.from_pretrained(
        tmp_path / "law", base=make_base(), adapter_name="law", check_trained_on=False
    )
    model.load_adapter(tmp_path / "a", adapter_name="ground")
    assert model.adapters["law"].depends_on == {"ground"} and model.adapters["ground"].depends_on == set()
    model.load_adapter(tmp_path / "a", adapter_name="default")  # the same again, by the name that was recorded
    with pytest.raises(ValueError, match="was trained on top of"):
        model.set_adapter("law")
    model.delete_adapter("default")  # nothing depends on the copy
    model.set_adapter(["law", "ground"])
    assert model.resolve_name() == "law"


@pytest.mark.parametrize("given", ["stack", "rows"])
def test_checkpointed_gradients_of_a_stack_and_of_rows_are_the_plain_ones(given, stacked):
    options = {"adapter_names": [["b", "default"], "default", "__base__"]} if given == "rows" else {}
    inputs, found = batch(), []
    for checkpointing in (False, True):
        if checkpointing:
            stacked.train()
            stacked.gradient_checkpointing_enable()
        stacked.zero_grad()
        stacked.set_adapter(["b", "default"])
        loss = stacked(**inputs, labels=inputs["input_ids"], use_cache=False, **options).loss
        if checkpointing:  # the recomputation is of the forward pass, whatever is said meanwhile
            stacked.disable_adapters()
            stacked.passes.change(active=("default",))
        loss.backward()
        stacked.enable_adapters()
        found.append({name: tensor.grad.clone() for name, tensor in stacked.adapter_tensors("b").items()})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert any(gradient.any() for gradient in found[0].values())


def test_an_adapter_without_those_it_was_trained_on_is_refused_with_their_names(tmp_path):
    saved(tmp_path)
    message = "law was trained on top of 'default', which this model does not have.*check_trained_on=False"
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_pretrained(tmp_path / "law", base=make_base())
    other = MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE)  # the same plan, but not what it was
    with pytest.raises(ValueError, match=message):
        other.load_adapter(tmp_path / "law", adapter_name="law")
    other.load_adapter(tmp_path / "law", adapter_name="law", check_trained_on=False)
    alone = MoExtendForCausalLM.from_pretrained(tmp_path / "law", base=make_base(), check_trained_on=False)
    other.set_adapter("law")
    with torch.no_grad():
        assert torch.equal(other(**batch()).logits, alone(**batch()).logits)


def test_an_adapter_that_stands_on_others_is_not_merged_alone(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="law was trained on top of 'default'"):
        merge(tmp_path / "law", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_another_adapter_stands_on_is_not_deleted_below_it(stacked):
    with pytest.raises(ValueError, match=r"Adapter 'b' was trained on top of \['default'\]: delete 'b' first"):
        stacked.delete_adapter("default")
    stacked.delete_adapter("b")
    assert stacked.active_adapters() == ["default"] and list(stacked.adapter_tensors())


def test_training_beside_another_active_adapter_is_recorded(tmp_path):
    saved(tmp_path)
    model = MoExtendForCausalLM.from_base(make_base(), {1: [4], 3: [0]}, **EXCLUSIVE)
    model.load_adapter(tmp_path / "a", adapter_name="law", is_trainable=True)
    model.set_adapter(["default", "law"])
    with pytest.raises(ValueError, match="so it takes a name"):
        model.set_trainable()
    for _ in range(2):  # what lay below is recorded as it is now, once
        trained = model.set_trainable(adapter_name="default")
        assert model.adapters["default"].config.trained_on == describe_adapters(model, ["law"])
        assert model.resolve_name() == "default"
        with torch.no_grad():
            next(iter(model.adapter_tensors("law").values())).add_(1)
    own = {id(tensor) for tensor in trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    model.set_adapter("law")
    with pytest.raises(ValueError, match="Adapter 'default' is not active, so it can't train"):
        model.set_trainable(adapter_name="default")


@pytest.mark.parametrize("entries", ["a", [3], [{"name": "a"}], [{"name": 1, "fingerprint": None}], {"name": "a"}])
def test_a_config_whose_trained_on_is_no_list_of_adapters_is_refused(entries):
    with pytest.raises(ValueError, match="trained_on=.* must be a list"):
        MoExtendConfig(trained_on=entries)


def test_the_card_of_an_adapter_on_top_says_how_to_load_all_of_them(stacked, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    for name, adapter in stacked.adapters.items():
        adapter.config.base_model_name_or_path = str(tmp_path / "base")
        stacked.save_pretrained(tmp_path / name, adapter_name=name)
    use = str(create_card(stacked.config)).split("```python")[1].split("```")[0]
    use = use.replace("path/to/default", str(tmp_path / "default")).replace(
        "path/to/this/adapter", str(tmp_path / "b")
    )
    lines, found = [line for line in use.splitlines() if "Tokenizer" not in line], {}
    exec("from transformers import AutoModelForCausalLM\n" + "\n".join(lines), found)
    assert found["model"].active_adapters() == ["default", "top"]
    with torch.no_grad():
        torch.testing.assert_close(found["model"](**batch()).logits, stacked(**batch()).logits)


def test_older_entries_of_trained_on_are_read():
    entries = [{"name": "a", "fingerprint": "0"}, {"name": "b", "fingerprint": None, "name_or_path": "me/b"}]
    assert MoExtendConfig(trained_on=entries).trained_on == entries


def trainer_of(model, folder, **settings):
    return MoExtendSFTTrainer(
        model=model,
        args=config(folder, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}),
        train_dataset=Dataset.from_dict({"text": lines(TASKS["b"])}),
        processing_class=make_tokenizer(),
    )


def test_a_trainer_keeps_to_the_adapter_it_was_made_for(stacked, tmp_path):
    trainer = trainer_of(stacked, tmp_path)
    stacked.set_adapter("default")
    for action in (trainer.train, trainer.save_model, trainer.create_model_card):
        with pytest.raises(ValueError, match=r"trains and saves the adapter 'b', but .* \['default'\]: set_adapter"):
            action()
    stacked.set_adapter(["default", "b"], inference_mode=True)
    with pytest.raises(ValueError, match="What trains has changed since this trainer was made"):
        trainer.train()
    stacked.set_adapter(["default", "b"])
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["extended_layers"] == {"0": [1, 2], "1": [4]}


def test_a_run_is_not_resumed_on_top_of_another_adapter(stacked, tmp_path):
    trainer_of(stacked, tmp_path).train()
    torch.manual_seed(7)
    other = shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **EXCLUSIVE), seed=7)
    other.add_adapter("b", {0: [1, 2], 1: [4]}, **EXCLUSIVE)
    with pytest.raises(ValueError, match="trained_on: the adapter depends on .* the model's on .* as they are now"):
        trainer_of(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
