"""The models as a whole: what `from_base` takes and refuses, what trains, and what transformers may do to them."""

import copy
import threading

import pytest
import torch
from conftest import COMMON, FAMILIES, PAPER, batch, frozen_copy, make_base, make_encoder, shake
from families import make_family
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_moextend import MoExtendForCausalLM, MoExtendModel, adapters_moextend
from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.routing_moextend import Rule, balance_loss
from modeling_moextend.scope_moextend import sequence_starts

IMAGE = 96
PLAN = {1: [0, 3], 2: [2]}
MODALITY = {"scope": "modality", "calibration": "none"}
EXCLUSIVE = {"scope": "modality", "selection": "exclusive", "calibration": "none"}


def extended(family="mixtral", plan=None, base=None, **choices):
    torch.manual_seed(5)
    if choices.get("scope") == "modality":
        choices["encoder"] = make_encoder()
    base = make_base(family) if base is None else base
    return shake(MoExtendForCausalLM.from_base(base, PLAN if plan is None else plan, **{**PAPER, **choices}))


def image_batch(seed=0):
    """Row 0: an image; row 1: text only."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (2, 9), generator=generator)
    ids[0, 2:6] = IMAGE
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


def gradients(model, trained):
    found = {name: None if tensor.grad is None else tensor.grad.clone() for name, tensor in trained.items()}
    model.zero_grad()
    return found


# ---------------------------------------------------------------- what from_base refuses


def small_config(family, **changes):
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], "num_hidden_layers": 2, **changes})


def test_a_layer_that_is_no_moe_layer_is_refused_with_a_list_of_those_that_are():
    dense_first = AutoModelForCausalLM.from_config(small_config("deepseek_v3", first_k_dense_replace=1))
    with pytest.raises(ValueError, match=r"Layers \[0\] are not MoE layers of this base; its MoE layers are \[1\]"):
        MoExtendForCausalLM.from_base(dense_first, {0: [0]})
    one_dense = AutoModelForCausalLM.from_config(small_config("qwen3_moe", mlp_only_layers=[1]))
    with pytest.raises(ValueError, match=r"Layers \[1, 7\] are not MoE layers of this base; its MoE layers are \[0\]"):
        MoExtendForCausalLM.from_base(one_dense, {7: [0], 0: [0], 1: [0]})


def test_a_model_whose_layers_are_all_dense_is_refused():
    dense = AutoModelForCausalLM.from_config(small_config("qwen3_moe", mlp_only_layers=[0, 1]))
    with pytest.raises(ValueError, match="Qwen3MoeModel \\(qwen3_moe\\) has no MoE layers"):
        MoExtendForCausalLM.from_base(dense, {0: [0]})


@pytest.mark.parametrize("source", [6, -1])
def test_a_source_expert_out_of_range_is_refused(source):
    with pytest.raises(ValueError, match=rf"Source experts \[{source}\] of layer 2 .*: it has experts 0 to 5"):
        MoExtendForCausalLM.from_base(make_base(), {2: [1, source]})


@pytest.mark.parametrize("plan", [None, {}])
def test_an_extension_by_nothing_is_refused(plan):
    with pytest.raises(ValueError, match="Nothing to add: extended_layers is empty and there is no encoder"):
        MoExtendForCausalLM.from_base(make_base(), plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([1, 2], "must map a layer index to a list of source experts"),
        ({"first": [1]}, "must map a layer index to a list of source experts"),
        ({1: 3}, "must map a layer index to a list of source experts"),
        ({1: []}, r"no source expert for layers \[1\]"),
    ],
)
def test_a_misshapen_plan_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(make_base(), plan)


def no_causal_lm():
    config = make_base().config
    t5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    return {
        "MixtralModel": lambda: MixtralModel(config),
        "MixtralForSequenceClassification": lambda: MixtralForSequenceClassification(config),
        "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(T5Config(**t5)),
    }


@pytest.mark.parametrize("name", sorted(no_causal_lm()))
def test_a_model_that_is_no_causal_lm_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is no causal LM"):
        MoExtendForCausalLM.from_base(no_causal_lm()[name](), {0: [0]})


def test_a_folder_whose_model_has_no_causal_head_is_refused(tmp_path):
    no_causal_lm()["T5ForConditionalGeneration"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no causal LM: transformers has no causal head for it"):
        MoExtendForCausalLM.from_base(str(tmp_path), {0: [0]})


@pytest.mark.parametrize("name", ["MixtralModel", "MixtralForSequenceClassification"])
def test_a_folder_that_holds_no_language_model_head_is_refused(name, tmp_path):
    no_causal_lm()[name]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is incomplete, or no model of the kind: it lacks lm_head.weight"):
        MoExtendForCausalLM.from_base(str(tmp_path), {0: [0]})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"scope": "some"}, "scope='some' must be one of 'all', 'modality', 'gate'"),
        ({"selection": "both"}, "selection='both' must be one of 'compete', 'exclusive'"),
        ({"calibration": "maybe"}, "calibration='maybe' must be one of 'all', 'routed', 'none'"),
        ({"calibration": "all"}, "selection='exclusive' with calibration='all' has no meaning.*selection='compete'"),
        (
            {"selection": "exclusive", "calibration": "all"},
            "selection='exclusive' with calibration='all' has no meaning",
        ),
        ({"selection": "exclusive", "calibration": "routed"}, "with calibration='routed' has no meaning"),
        ({"paper": True, "scope": "gate"}, "paper=True means .*, but {'scope': 'gate'} was given"),
        ({"scope": "modality"}, "scope='modality' needs an encoder"),
    ],
    ids=str,
)
def test_choices_without_meaning_are_refused_and_leave_the_base_alone(choices, message):
    base = make_base()
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(base, PLAN, **choices)
    assert not any("moextend" in name for name, _ in base.named_modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_extended_model_is_no_base_and_a_layer_is_extended_once():
    model = extended()
    with pytest.raises(ValueError, match=r"is extended already: use model.extend\(plan\)"):
        MoExtendForCausalLM.from_base(model, PLAN)
    with pytest.raises(ValueError, match=r"Layers \[1\] have new experts already"):
        model.extend({0: [1], 1: [0]})
    assert model.config.extended_layers == PLAN


def test_the_base_of_an_extended_model_is_refused_as_a_base():
    model = extended()
    with pytest.raises(ValueError, match="is extended already"):
        MoExtendForCausalLM.from_base(model.base, PLAN)


# ---------------------------------------------------------------- from_base and extend


def test_a_base_by_path_passes_its_options_on(tmp_path):
    make_base().save_pretrained(tmp_path)
    options = {"experts_implementation": "eager", "attn_implementation": "eager", "dtype": torch.bfloat16}
    model = MoExtendForCausalLM.from_base(str(tmp_path), PLAN, **options)
    assert runs(model.base.config) == runs(model.config) == ("eager", "eager")
    assert model.base.dtype == model.config.dtype == torch.bfloat16
    assert model.config.base_model_name_or_path == str(tmp_path)
    assert model(**batch(), output_attentions=True).attentions[0].shape == (3, 4, 10, 10)


def test_a_refused_or_failed_from_base_leaves_the_models_as_they_were(monkeypatch):
    base, encoder = make_base().train(), make_encoder().train()
    base.model.layers[0].eval()
    base.lm_head.weight.requires_grad_(False)

    def shape(model):
        modules = [(type(module), module.training, [*module._modules]) for module in model.modules()]
        return modules, [(name, p.requires_grad) for name, p in model.named_parameters()]

    before = shape(base), shape(encoder)

    def fail(message, **choices):
        with pytest.raises((ValueError, RuntimeError), match=message):
            MoExtendForCausalLM.from_base(base, PLAN, encoder=encoder, **choices)
        assert (shape(base), shape(encoder)) == before

    fail("projector_hidden_act='nope' must be one of", projector_hidden_act="nope")
    fail("encoder_select_layer=9 is out of range", encoder_select_layer=9)
    monkeypatch.setattr(adapters_moextend, "Projector", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MoExtendForCausalLM.from_base(base, PLAN, encoder=encoder)
    assert (shape(base), shape(encoder)) == before
    monkeypatch.undo()
    router = type(base.model.layers[0].mlp.gate)
    monkeypatch.setattr(router, "forward", lambda self, hidden: None)
    fail("does not follow the router interface")
    monkeypatch.undo()
    MoExtendForCausalLM.from_base(base, PLAN, encoder=encoder)


def test_experts_spread_over_processes_are_refused():
    base = make_base()
    base.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="experts are spread over processes"):
        MoExtendForCausalLM.from_base(base, {1: [0]})


def test_the_row_of_a_layers_only_exclusive_expert_is_frozen_from_the_start(tmp_path):
    model = extended(**EXCLUSIVE)
    model.save_pretrained(tmp_path)
    for each in (model, MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=make_encoder())):
        frozen = [name for name, tensor in each.adapter_tensors().items() if not tensor.requires_grad]
        assert frozen == ["layers.2.router.weight"]


def runs(config):
    return config._attn_implementation, config._experts_implementation


def test_implementations_are_the_bases_and_every_config_says_so():
    model = extended(**MODALITY)
    for experts, attention in (("batched_mm", "sdpa"), ("eager", "eager"), ("grouped_mm", "sdpa")):
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        configs = [model.config, model.config.text_config, model.config.get_text_config(), model.model.config]
        assert {runs(config) for config in (*configs, model.base.config)} == {(attention, experts)}
        new = model.base.model.layers[1].mlp.experts.moextend.adapters["default"]
        assert new.config._experts_implementation == experts


@pytest.mark.parametrize("auto", [False, True])
def test_the_config_says_what_runs_however_the_model_was_made(auto, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    options = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, scope="all", **options)
    model.save_pretrained(tmp_path / "adapter")
    load = AutoModelForCausalLM if auto else MoExtendForCausalLM
    loaded = load.from_pretrained(tmp_path / "adapter", **options)
    make = AutoModelForCausalLM.from_config if auto else MoExtendForCausalLM._from_config
    drawn = make(loaded.config, **options)
    for each in (model, loaded, drawn):
        assert runs(each.config) == runs(each.base.config) == ("eager", "batched_mm")
    plain = load.from_pretrained(tmp_path / "adapter")
    assert runs(plain.config) == runs(plain.base.config) == ("sdpa", "grouped_mm")


def test_the_vocabulary_stays_and_its_own_size_is_no_error():
    model = extended(**MODALITY)
    embedding, size = model.get_input_embeddings(), 96
    for args in ((), (size,), (size, 32), (None, 48)):
        assert model.resize_token_embeddings(*args) is embedding
    for args in ((size + 1,), (size, 64), (None, 64), (8,), (0,)):
        with pytest.raises(ValueError, match="The base's vocabulary of 96 tokens stays as it is"):
            model.resize_token_embeddings(*args)


def test_what_a_quantised_base_refuses_the_model_refuses():
    model = extended()
    model.base.is_quantized = True
    for move in ("half", "float"):
        with pytest.raises(ValueError, match=f"`.{move}\\(\\)` is not supported for quantized model"):
            getattr(model, move)()
    model.base.is_quantized = False
    assert model.half().dtype == torch.float16 and model.to(torch.bfloat16).base.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.float().state_dict().values()} == {torch.float32}


def test_text_reaches_the_base_as_ids_and_ties_only_a_projector_that_trains():
    model = extended(**MODALITY)
    seen = []
    model.base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.set_trainable("finetune", train_projector=False)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert model.projector.linear_1.weight.grad is None
    model.set_trainable("align")
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert not model.projector.linear_1.weight.grad.any()
    assert all(inputs["input_ids"] is not None and "inputs_embeds" not in inputs for inputs in seen)
    assert not model.get_input_embeddings()._forward_hooks


def test_extending_later_gives_what_extending_at_once_gives():
    choices = {**PAPER, "calibration": "none"}
    at_once = MoExtendForCausalLM.from_base(make_base(), PLAN, **choices)
    later = MoExtendForCausalLM.from_base(make_base(), {2: [2]}, **choices)
    later.extend({1: [0, 3]})
    assert later.config.extended_layers == at_once.config.extended_layers
    assert list(later.adapter_tensors()) == list(at_once.adapter_tensors())
    assert torch.equal(later(**batch()).logits, at_once(**batch()).logits)


def test_a_detached_base_can_be_extended_again():
    model = extended()
    again = extended(base=model.detach())
    assert torch.equal(again(**batch()).logits, extended()(**batch()).logits)


@pytest.mark.parametrize("choices", [MODALITY, {**MODALITY, "calibration": "all"}, EXCLUSIVE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("batched_mm", marks=pytest.mark.slow), "grouped_mm"])
def test_batches_without_an_image_are_bit_equal_to_the_base(family, implementation, dtype, choices):
    base = make_base(family, dtype, experts_implementation=implementation)
    expected = frozen_copy(base)(**batch()).logits
    model = extended(family, base=base, **choices)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(model(**batch()).logits, expected)


# ---------------------------------------------------------------- what trains


def test_set_trainable_names_exactly_what_each_stage_trains():
    model = extended(**MODALITY)
    projector = {name for name in model.adapter_tensors() if name.startswith("projector.")}
    experts = set(model.adapter_tensors()) - projector
    for stage, options, expected in (
        ("align", {}, projector),
        ("finetune", {}, projector | experts),
        ("finetune", {"train_projector": False}, experts),
    ):
        trained = model.set_trainable(stage, **options)
        assert set(trained) == expected
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    with pytest.raises(ValueError, match="stage='extend' is not known; allowed: 'align', 'finetune'"):
        model.set_trainable("extend")
    with pytest.raises(ValueError, match="stage='align' has nothing to train"):
        extended().set_trainable("align")


def test_new_tensors_train_in_float32_over_a_bf16_base():
    model = extended(base=make_base(dtype=torch.bfloat16), calibration="all")
    model.to(torch.bfloat16)
    trained = model.set_trainable()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert model.base.dtype == torch.bfloat16
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.AdamW(trained.values(), lr=2e-5).step()
    moved = [(tensor != before[name]).float().mean() for name, tensor in trained.items() if "experts" in name]
    assert min(moved) > 0.9


def test_the_row_of_a_layers_only_exclusive_expert_is_stored_and_not_trained():
    model = extended(**EXCLUSIVE)
    frozen = set(model.adapter_tensors()) - set(model.set_trainable())
    assert frozen == {"layers.2.router.weight"}
    gpt_oss = extended("gpt_oss", **EXCLUSIVE)
    assert set(gpt_oss.adapter_tensors()) - set(gpt_oss.set_trainable()) == {
        "layers.2.router.weight",
        "layers.2.router.bias",
    }
    deepseek = extended("deepseek_v3")
    assert set(deepseek.adapter_tensors()) - set(deepseek.set_trainable()) == {
        "layers.1.router.correction_bias",
        "layers.2.router.correction_bias",
    }


# ---------------------------------------------------------------- router logits and the balance loss


def test_router_logits_of_every_moe_layer_have_the_new_columns(family):
    model = extended(family, **MODALITY)
    widths = [(30, 6), (30, 8), (30, 7), (30, 6)]
    body = MoExtendModel.from_base(make_base(family).model, PLAN, calibration="none")
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert [tuple(t.shape) for t in model(**batch(), output_router_logits=True).router_logits] == widths
            assert [tuple(t.shape) for t in body(**batch(), output_router_logits=True).router_logits] == widths
            assert [tuple(t.shape) for t in model.model(**batch(), output_router_logits=True).router_logits] == widths
    assert model(**batch()).router_logits is None


def test_recorded_logits_are_rows_times_hidden_states():
    model = extended(calibration="none")
    layer, seen = find_moe_layers(model.get_decoder())[1], []
    layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 32)))
    found = model(**batch(), output_router_logits=True).router_logits[1]
    rows = torch.cat([layer.router.weight, layer.router.moextend.adapters["default"].weight])
    torch.testing.assert_close(found, seen[0] @ rows.T)


def test_the_balance_loss_enters_the_loss_with_the_bases_coefficient():
    base = make_base()
    base.config.router_aux_loss_coef = 0.25
    model = extended(base=base, paper=True)
    inputs = {**batch(), "labels": batch()["input_ids"]}
    plain, both = model(**inputs), model(**inputs, output_router_logits=True)
    with model.record_routing() as records:
        model(**inputs)
    expected = balance_loss(records, Rule(**model.config.routing_rule), "compete", inputs["attention_mask"])
    torch.testing.assert_close(both.aux_loss, expected)
    torch.testing.assert_close(both.loss, plain.loss + 0.25 * expected)
    assert plain.aux_loss is None and model.router_aux_loss_coef == 0.25


def test_a_base_without_a_balance_loss_gets_none():
    model = extended("deepseek_v3")
    inputs = {**batch(), "labels": batch()["input_ids"]}
    found = model(**inputs, output_router_logits=True)
    assert model.router_aux_loss_coef == 0 and found.aux_loss is None and len(found.router_logits) == 4
    assert torch.equal(found.loss, model(**inputs).loss)


def test_a_recording_hears_passes_that_return_router_logits():
    """Also where nobody but the base's config asks for them: to record nothing then would look like no use at all."""
    model = extended(calibration="none")
    with model.record_routing() as records:
        model(**batch())
        expected = [record.logits for record in records.values()]
        for how in ({"output_router_logits": True}, {"output_router_logits": False}, {}):
            model.config.get_text_config().output_router_logits = not how  # {}: as the config says
            records.clear()
            model(**batch(), **how)
            assert sorted(records) == [0, 1, 2, 3]
            assert all(map(torch.equal, expected, (record.logits for record in records.values())))
    assert model.passes.thread.records is None


def test_the_config_says_whether_router_logits_are_returned_and_a_call_wins():
    model = extended(calibration="none")
    for run in (model, model.model):
        model.config.get_text_config().output_router_logits = True
        assert len(run(**batch()).router_logits) == 4
        assert run(**batch(), output_router_logits=False).router_logits is None
        model.config.get_text_config().output_router_logits = False
        assert run(**batch()).router_logits is None


def test_embedding_and_head_of_the_base_cannot_be_replaced():
    model = extended()
    head = model.get_output_embeddings()
    for replace in (model.set_input_embeddings, model.set_output_embeddings, model.model.set_input_embeddings):
        with pytest.raises(ValueError, match="embedding and head can't be replaced in an adapter: change the base"):
            replace(torch.nn.Embedding(4, 32))
    assert model.get_output_embeddings() is head


def test_labels_on_image_tokens_do_not_count():
    model, inputs = extended(**MODALITY), image_batch()
    masked = inputs["labels"].masked_fill(inputs["labels"] == IMAGE, -100)
    assert torch.equal(model(**inputs).loss, model(**{**inputs, "labels": masked}).loss)


# ---------------------------------------------------------------- gradient checkpointing


class CountMatmuls(TorchDispatchMode):
    """Counts matrix products as they are dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("aten.mm", "aten.addmm", "aten.bmm", "_grouped_mm"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("choices", [MODALITY, EXCLUSIVE, {"paper": True, "encoder": "yes"}], ids=str)
def test_checkpointing_gives_the_same_loss_and_gradients_over_several_passes(choices):
    if "encoder" in choices:
        choices = {"paper": True, "encoder": make_encoder()}
    model = extended(**choices).train()
    trained = model.set_trainable()

    def step():
        """Two passes with different scopes before one backward: each recomputation must see its own."""
        losses = [model(**image_batch(seed)).loss for seed in (0, 1)]
        text = batch()
        losses.append(model(**text, labels=text["input_ids"]).loss)
        sum(losses).backward()
        return [loss.item() for loss in losses], gradients(model, trained)

    plain_loss, plain = step()
    model.gradient_checkpointing_enable()
    assert model.base.model.layers[1].gradient_checkpointing
    loss, found = step()
    assert loss == plain_loss
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)
    model.gradient_checkpointing_disable()
    assert step()[0] == plain_loss


def test_a_backward_pass_in_another_thread_recomputes_with_its_own_forwards_scope():
    model = extended(**MODALITY).train()
    trained = model.set_trainable()
    model(**image_batch()).loss.backward()
    expected = gradients(model, trained)
    model.gradient_checkpointing_enable()
    thread = threading.Thread(target=model(**image_batch()).loss.backward, daemon=True)
    thread.start()
    thread.join()
    for name, gradient in gradients(model, trained).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_backward_work_is_done_below_the_lowest_extended_layer(checkpointing):
    base = make_base(experts_implementation="eager")
    model = extended(plan={3: [1]}, base=base, calibration="none").train()
    model.set_trainable()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # as trainers do
    touched = []
    for index, layer in enumerate(model.base.model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: touched.append(index))
    inputs = batch()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in hidden[:4]] == [False] * 4
    with CountMatmuls() as last_layer:
        loss.backward()
    assert set(touched) <= {3}
    full = extended(plan={0: [1]}, base=make_base(experts_implementation="eager"), calibration="none").train()
    full.set_trainable()
    if checkpointing:
        full.gradient_checkpointing_enable()
    loss = full(**inputs, labels=inputs["input_ids"]).loss
    with CountMatmuls() as all_layers:
        loss.backward()
    assert last_layer.count < all_layers.count / 2.5


def test_reentrant_checkpointing_is_refused_and_other_options_keep_the_default():
    model = extended()
    with pytest.raises(ValueError, match="use_reentrant=True is not supported: use {'use_reentrant': False}"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    options = model.base.model.layers[1]._gradient_checkpointing_func.keywords
    assert (options["use_reentrant"], options["preserve_rng_state"]) == (False, False)


# ---------------------------------------------------------------- copies, compilation, dtypes, devices


def test_deep_copies_train_apart_under_checkpointing():
    model = extended(**MODALITY).train()
    model.set_trainable()
    model.gradient_checkpointing_enable()
    inputs = image_batch()
    twin = copy.deepcopy(model)
    alone, mine = copy.deepcopy(model), model.adapter_tensors()
    alone(**inputs).loss.backward()
    expected = {name: tensor.grad for name, tensor in alone.adapter_tensors().items()}
    first, second = model(**inputs).loss, twin(**image_batch(seed=1)).loss  # interleaved: whose scope is replayed?
    first.backward()
    second.backward()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor.grad, expected[name])
    theirs = twin.adapter_tensors()
    assert any(not torch.allclose(theirs[name].grad, tensor.grad) for name, tensor in mine.items())
    with torch.no_grad():
        mine["layers.1.experts.down_proj"].zero_()
    assert theirs["layers.1.experts.down_proj"].any()
    twin.disable_adapters()
    assert model.active_adapters() == ["default"] and twin.active_adapters() == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same_logits(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(small_config("mixtral")).eval()
    model, inputs = extended(plan={1: [0, 3]}, base=base, **MODALITY), image_batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model, backend=backend)(**inputs).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    model = extended(**MODALITY)
    expected = model(**image_batch()).logits
    model.base.set_attn_implementation(attention)
    torch.testing.assert_close(model(**image_batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_goes_where_an_offloaded_embedding_takes_its_ids(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    names = ["model.layers", "model.norm", "lm_head", "model.rotary_emb"]
    options = {"device_map": {**dict.fromkeys(names, "cpu"), "model.embed_tokens": "disk"}}
    options["offload_folder"] = str(tmp_path / "off")
    torch.manual_seed(5)
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, encoder=make_encoder(), **options)
    assert model.get_input_embeddings().weight.is_meta and not model.projector.linear_1.weight.is_meta
    torch.manual_seed(5)
    plain = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, encoder=make_encoder())
    assert torch.equal(model(**image_batch()).logits, plain(**image_batch()).logits)
    model.save_pretrained(tmp_path / "adapter")
    loaded = MoExtendForCausalLM.from_pretrained(
        tmp_path / "adapter", base=str(tmp_path / "base"), encoder=make_encoder(), **options
    )
    assert torch.equal(loaded(**image_batch()).logits, plain(**image_batch()).logits)


@pytest.mark.parametrize("place", ["auto", "disk", "cpu"])
def test_an_offloaded_base_gives_the_same_logits_and_saves_the_same_adapter(place, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    options = {"device_map": "auto"}
    if place != "auto":
        far = {"model.layers.1": place, "model.layers.2": place}
        near = dict.fromkeys(
            ["model.embed_tokens", "model.layers.0", "model.layers.3", "model.norm", "lm_head"], "cpu"
        )
        options = {"device_map": {**near, **far, "model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path / "off")}
    torch.manual_seed(5)
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, paper=True, **options)
    if place == "disk":
        assert model.base.model.layers[1].mlp.experts.down_proj.is_meta
    shake(model)
    torch.manual_seed(5)
    plain = shake(MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, paper=True))
    expected = plain(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)
    assert model.config.base_fingerprint == plain.config.base_fingerprint
    inputs = batch()
    model.set_trainable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(tensor.grad is not None for tensor in model.adapter_tensors().values())
    model.save_pretrained(tmp_path / "adapter")
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "base"), **options)
    assert torch.equal(loaded(**batch()).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, frozen_copy(make_base())(**batch()).logits)
    restored = model.detach()
    assert torch.equal(restored(**batch()).logits, make_base()(**batch()).logits)


def test_the_body_of_the_causal_model_shares_its_tensors():
    model = extended(**MODALITY)
    assert model.base_model is model.model and isinstance(model.model, MoExtendModel)
    inputs = {name: tensor for name, tensor in image_batch().items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(**inputs).logits)
    model.disable_adapters()
    base = frozen_copy(make_base())
    assert torch.equal(model.model(**batch()).last_hidden_state, base.model(**batch()).last_hidden_state)


# ---------------------------------------------------------------- multimodal bases, extended in their language model


def seeing(family="qwen3_vl_moe"):
    """A multimodal base and a batch with an image of its own in each row."""
    base = make_family(family, "multimodal")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 80, (2, 9), generator=generator)
    ids[:, 2], ids[:, 3] = base.config.vision_start_token_id, base.config.image_token_id
    images = {
        "pixel_values": torch.randn(8, 3 * 2 * 4 * 4, generator=generator),  # four patches of two frames an image
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
        "mm_token_type_ids": (ids == base.config.image_token_id).int(),
    }
    return base, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@pytest.mark.parametrize("scope", ["all", "gate"])
@torch.no_grad()
def test_a_multimodal_base_sees_its_own_images_with_the_adapter_off_and_on(scope):
    base, inputs = seeing()
    expected = frozen_copy(base)(**inputs).logits
    model = shake(MoExtendForCausalLM.from_base(copy.deepcopy(base), {1: [3, 0, 5]}, scope=scope))
    if scope == "gate":
        model.gate_threshold = 1e9
        assert torch.equal(model(**inputs).logits, expected)
        model.gate_threshold = -1e9
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    found = model(**inputs).logits
    assert not torch.equal(found, expected)
    assert not torch.equal(model(**{**inputs, "pixel_values": inputs["pixel_values"] * 2}).logits, found)
    for module in model.base.model.visual.modules():
        assert "moextend" not in module._modules


@pytest.mark.parametrize("beams", [1, 2])
def test_a_multimodal_base_generates_from_its_own_images(beams):
    base, inputs = seeing()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    expected = frozen_copy(base).generate(**inputs, **settings)
    model = shake(MoExtendForCausalLM.from_base(copy.deepcopy(base), {1: [3, 0, 5]}, scope="all"))
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, **settings), expected)
    found = model.generate(**inputs, **settings)
    assert torch.equal(found, model.generate(**inputs, **settings, use_cache=False))


def test_a_multimodal_base_is_loaded_whole_by_name_and_from_an_adapter(tmp_path):
    base, inputs = seeing()
    base.save_pretrained(tmp_path / "base")
    model = shake(MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [3, 0, 5]}, scope="all"))
    assert type(model.base) is type(base)
    assert model.config.get_text_config().num_experts == 6  # what trainers ask for
    assert model.router_aux_loss_coef == base.config.get_text_config().router_aux_loss_coef > 0
    model.save_pretrained(tmp_path / "adapter")
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    body = MoExtendModel.from_pretrained(tmp_path / "adapter")
    hidden = body(**inputs).last_hidden_state
    assert torch.equal(loaded.get_output_embeddings()(hidden), loaded(**inputs).logits)


def test_a_multimodal_base_takes_no_second_encoder():
    base, _ = seeing()
    with pytest.raises(ValueError, match="Qwen3VLMoeForConditionalGeneration has an image encoder of its own"):
        MoExtendForCausalLM.from_base(base, {1: [0]}, encoder=make_encoder())


def test_a_gate_reads_the_text_positions_of_a_multimodal_base():
    """Positions [4, B, S]: text, then time, height and width, which stand still inside an image."""
    text = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    still = torch.tensor([[0, 1, 1, 1, 2, 0, 1, 1, 1]])
    real, places = torch.ones(1, 9, dtype=torch.bool), torch.arange(9)[None]
    expected = [[0] * 5 + [5] * 4]
    assert sequence_starts(real, torch.stack([text, still, still, still]), places).tolist() == expected
    assert sequence_starts(real, torch.stack([still, still, still]), places).tolist() == [[-1] * 9]  # nothing known


def test_sparsemixer_takes_no_calibration():
    with pytest.raises(ValueError, match="calibration='all' has no meaning for a base that weighs .* by SparseMixer"):
        MoExtendForCausalLM.from_base(make_family("phimoe"), {1: [0]}, paper=True)
