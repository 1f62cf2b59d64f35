"""Every MoE family of transformers, extended: off it is the base, on it is the family's own rule with more rows.

The matrix is family x dtype x experts implementation; a family's variants (what its config can switch) run in float32
and eager. All of it is marked slow, but for one family a rule. `make families` writes the table in the README.
"""

import functools
import re

import pytest
import torch
from conftest import batch, shake
from families import COMMON, FAMILIES, make_config, make_family
from plain_routing import ROUTING, compete, exclusive
from torch import nn
from torch.nn import functional as F

from modeling_moextend import MoExtendForCausalLM

REFUSED = {  # family -> the reason, as its refusal gives it
    "diffusion_gemma": "no causal LM",
    "openai_privacy_filter": "no causal LM",
    "dbrx": "experts",
    "jetmoe": "experts",
    "llama4": "experts",
    "inkling": "shared",
    "zaya": "router",
}
SUPPORTED = sorted(FAMILIES.keys() - REFUSED.keys())
FAST = {  # one family a rule
    "mixtral",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "jamba",
    "deepseek_v2",
    "gpt_oss",
    "deepseek_v3",
    "minimax_m2",
    "lfm2_moe",
    "deepseek_v4",
    "kolibri1",
    "muse_spark",
    "gemma4",
    "phimoe",
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
NEW = [1, 3, 1]  # source experts of each extended layer: N = 3 > K = 2
FEW = [3]  # fewer than K: slots stay empty
ROUTING_OF = {"compete": compete, "exclusive": exclusive}


def variants_of(name):
    """Names of a family's variants; `"multimodal"` where the default is the language model alone."""
    alone = FAMILIES[name].whole and make_config(name).model_type == FAMILIES[name].model_type
    return [*FAMILIES[name].variants, *(["multimodal"] if alone else [])]


def cases(matrix):
    """pytest parameters, marked slow but for two of the families in `FAST`."""
    quick = ("eager", torch.float32), ("grouped_mm", torch.bfloat16)
    return [
        pytest.param(
            *(name, *case),
            marks=[] if name in FAST and case in quick else [pytest.mark.slow],
            id="-".join([name, *map(label, case)]),
        )
        for name in SUPPORTED
        for case in matrix(name)
    ]


def label(part):
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(part, part)


# ---------------------------------------------------------------- the reference: a base with E + N experts of its own


def moe_modules(model):
    """layer -> (router, experts) of the language model; not those of a vision tower or for vision tokens."""
    found = {}
    for path, module in model.named_modules():
        experts = module._modules.get("experts")
        if experts is not None and "vision" not in path and "down_proj" in experts._parameters | {"up_proj": 0}:
            router = module._modules.get("gate") or module._modules.get("router")
            found[int(re.search(r"layers\.(\d+)", path).group(1))] = router, experts
    return found


def native(name, variant, adapter, selection):
    """The base with its routers and experts widened by the tensors of `adapter`, its routers in plain torch."""
    model = make_family(name, variant, experts_implementation="eager")
    for layer, (router, experts) in moe_modules(model).items():
        new = {
            key.removeprefix(f"layers.{layer}."): t for key, t in adapter.items() if key.startswith(f"layers.{layer}.")
        }
        if not new:
            continue
        for key, parameter in list(experts.named_parameters(recurse=False)):
            setattr(experts, key, nn.Parameter(torch.cat([parameter, new[f"experts.{key}"]])))
        experts.num_experts = len(experts.down_proj)
        router.forward = functools.partial(plain_forward, router, new, name, model.config.get_text_config(), selection)
    return model


def plain_forward(router, new, name, config, selection, hidden, *bias):
    """(logits, weights, index) of a router with the rows `new` beside its own."""
    routing = ROUTING[name]
    hidden = routing.prepare(router, hidden.reshape(-1, hidden.shape[-1]))
    rows = torch.cat([router.get_parameter(routing.rows), new["router.weight"]])
    offset = torch.cat([router.bias, new["router.bias"]]) if "router.bias" in new else None
    logits = routing.bend(F.linear(hidden, rows, offset), config)
    num_base = len(rows) - len(new["router.weight"])
    correction = correction_bias(router, bias, new)
    weights, index = ROUTING_OF[selection](
        routing, config, logits, correction, num_base, COMMON["num_experts_per_tok"]
    )
    if "router.per_expert_scale" in new:
        weights = weights * torch.cat([router.per_expert_scale, new["router.per_expert_scale"]])[index]
    return logits, weights, index


def correction_bias(router, given, new):
    """[E + N] or `None`: the router's own, or the one that its block hands it."""
    if "router.correction_bias" not in new:
        return None
    owner = router.moe_statics if hasattr(router, "moe_statics") else router
    base = given[0] if given else owner.e_score_correction_bias.reshape(-1)
    return torch.cat([base, new["router.correction_bias"]])


# ---------------------------------------------------------------- what must hold of every family


def logits_of(model, inputs=None, **kwargs):
    with torch.no_grad():
        return model(**(inputs or batch()), **kwargs).logits


def plan_of(base, selection):
    """New experts in every layer that can have some; with exclusive selection, one in the first: slots stay empty."""
    layers = [layer for layer, (router, _) in moe_modules(base).items() if not hasattr(router, "tid2eid")]
    plan = dict.fromkeys(layers, NEW)
    return {**plan, layers[0]: FEW} if selection == "exclusive" and len(layers) > 1 else plan


def extend(base, selection):
    torch.manual_seed(0)
    plan = plan_of(base, selection)
    model = MoExtendForCausalLM.from_base(base, plan, scope="all", selection=selection, calibration="none")
    return shake(model).eval()


def check_off(model, expected):
    """Adapter off: bit-equal to the base. On: finite and different."""
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    found = logits_of(model)
    assert found.isfinite().all() and not torch.equal(found, expected)
    return found


def check_rule(model, name, variant, selection, found):
    """On: what the family's rule gives over E + N rows."""
    adapter = {key: tensor.detach().clone() for key, tensor in model.adapter_tensors().items()}
    expected = logits_of(native(name, variant, adapter, selection))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.record_routing() as records:
        model(**batch())
    used = torch.cat(
        [(records[layer].index >= records[layer].num_base).flatten() for layer in plan_of(model.base, "")]
    )
    assert used.any() and (selection == "exclusive" or not used.all()), "the batch can't tell new experts from old"


def check_gradient(model):
    """Every new tensor that trains has a finite gradient, nothing else has one. The balance loss is finite."""
    trained = model.set_trainable()
    inputs = batch()
    output = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    output.loss.backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in trained.values()}
    assert all(p.grad.isfinite().all() for p in trained.values())
    for part in (".experts.", ".router.weight"):
        assert any(p.grad.any() for key, p in trained.items() if part in key)
    if getattr(model.base.config.get_text_config(), "router_aux_loss_coef", 0):
        assert output.aux_loss.isfinite() and output.aux_loss > 0


def check_generation(model, base):
    """Greedy text is the same with and without a cache, wherever the base's own is."""
    inputs = {"input_ids": batch()["input_ids"][:1]}
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    texts = [[m.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)] for m in (base, model)]
    if torch.equal(*texts[0]):
        assert torch.equal(*texts[1])


def check_file(model, base, folder):
    """Saved and loaded, logits are bit-equal (after the cast to the file's dtype)."""
    model.save_pretrained(folder)
    for tensor in model.adapter_tensors().values():
        tensor.data = tensor.data.to(base.dtype)
    again = MoExtendForCausalLM.from_pretrained(folder, base=base).eval()
    assert torch.equal(logits_of(again), logits_of(model))


def check_family(name, variant, implementation, dtype, folder):
    choices = {"dtype": dtype, "experts_implementation": implementation}
    base = make_family(name, variant, **choices)
    expected = logits_of(base)
    for selection in ROUTING_OF:
        model = extend(make_family(name, variant, **choices), selection)
        found = check_off(model, expected)
        if dtype == torch.float32:
            check_rule(model, name, variant, selection, found)
        check_gradient(model)
        if selection == "compete":
            if dtype == torch.float32:
                check_generation(model, base)
            check_file(model, make_family(name, variant, **choices), folder)


@pytest.mark.parametrize(
    ("name", "implementation", "dtype"),
    cases(lambda name: [(i, dtype) for i in IMPLEMENTATIONS for dtype in (torch.float32, torch.bfloat16)]),
)
def test_every_family(name, implementation, dtype, tmp_path):
    check_family(name, None, implementation, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), cases(lambda name: [(variant,) for variant in variants_of(name)]))
def test_what_a_config_can_switch_is_honoured(name, variant, tmp_path):
    check_family(name, variant, "eager", torch.float32, tmp_path)
