"""Every MoE family of transformers, extended: off it is the base, on it is the family's own rule with more rows.

The matrix is family x dtype x experts implementation; a family's variants (what its config can switch) run in float32
and eager. All of it is marked slow, but for one family a rule. `make families` writes the table in docs/families.md.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import batch, frozen_copy, rounding, shake
from families import EVERY, FAMILIES, IMAGE_TOKEN, NEWEST, TOO_OLD, make_config, make_family, variants_of
from family_table import END, PAGE, START, table
from plain_routing import ROUTING, Routing, beside_shared, compete, exclusive
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from modeling_moextend import MoExtendForCausalLM

REFUSED = {  # family -> the reason, as its refusal gives it
    "diffusion_gemma": "no causal LM",
    "openai_privacy_filter": "no causal LM",
    "dbrx": "bare logits",
    "ernie4_5_vl_moe": "a MoE block for text and one for images",
    "jetmoe": "attention heads",
    "llama4": "input scaled by the score",
    "zaya": "from layer to layer",
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
    "inkling",
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
NEW = [1, 3, 1]  # source experts of each extended layer: N = 3 > K = 2
FEW = [3]  # fewer than K: slots stay empty
# Their activation runs on a contiguous tensor of all pairs, the last few elements of which torch's CPU kernels round
# otherwise.
ROUNDED_BY_PLACE = {"deepseek_v4", "minimax_m3_vl", "glm5_next", "gpt_oss", "hy_v4"}
ROUTING_OF = {"compete": compete, "exclusive": exclusive}


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


def widened(model, name, adapter, selection):
    """The base with its routers and experts widened by the tensors of `adapter`, its routers in plain torch."""
    model.set_experts_implementation("eager")
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
    """(logits, weights, index) of a router with the rows `new` beside its own; and shared experts' weights if any."""
    routing = ROUTING[name]
    hidden = routing.prepare(router, hidden.reshape(-1, hidden.shape[-1]))
    own = router.get_parameter(routing.rows)
    num_base = len(own) - (config.n_shared_experts if routing.shared else 0)
    rows = torch.cat([own[:num_base], new["router.weight"], own[num_base:]])
    offset = torch.cat([router.bias, new["router.bias"]]) if "router.bias" in new else None
    logits = routing.bend(F.linear(hidden, rows, offset), config)
    correction = correction_bias(router, bias, new)
    scale = torch.cat([router.per_expert_scale, new["router.scale"]]) if "router.scale" in new else None
    logits, shared = logits.split([num_base + len(new["router.weight"]), len(own) - num_base], dim=-1)
    if routing.shared:
        routing, weights_of_shared = beside_shared(routing, config, router, shared)
    choose = ROUTING_OF[selection]
    weights, index = choose(routing, config, logits, correction, num_base, config.num_experts_per_tok, scale)
    return logits, weights, index, *([weights_of_shared(weights)] if routing.shared else [])


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
    assert not [path for path, _ in model.named_modules() if "vision" in path and "moextend" in path]
    return shake(model).eval()


def check_off(model, expected):
    """Adapter off: bit-equal to the base. On: finite and different."""
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    found = logits_of(model)
    assert found.isfinite().all() and not torch.equal(found, expected)
    return found


def runs_of_experts(model):
    """Layer -> (what its experts got, what they gave) in one pass."""
    seen = {}
    for layer in model.config.extended_layers:
        experts = model.moe_layers[layer].experts
        hook = experts.register_forward_hook(lambda _, args, output, layer=layer: seen.update({layer: (args, output)}))
        logits_of(model)
        hook.remove()
    return seen


def check_fused(model, name):
    """In the inference form: each layer's experts give the same, and so does the model, to the bit where no sum is
    done in another order; afterwards as before."""
    before, runs, config = logits_of(model), runs_of_experts(model), model.base.config.get_text_config()
    model.fuse()
    for layer, (args, expected) in runs.items():
        experts = model.moe_layers[layer].experts
        with torch.no_grad():
            assert experts.moextend.fused.serves(model.passes.plan.layers[layer].parts)
            found = experts(*args)
        size = expected.abs().max().item()
        terms = config.num_experts_per_tok + 2
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding(terms, dtype=found.dtype) * size)
    eager = config._experts_implementation == "eager"  # adds up a token's experts one by one, in their own order
    rounded = eager and (config.num_experts_per_tok > 2 or model.base.dtype != torch.float32)
    assert rounded or name in ROUNDED_BY_PLACE or torch.equal(logits_of(model), before)
    model.unfuse()
    assert torch.equal(logits_of(model), before)


def check_rule(model, name, variant, selection, found):
    """On: what the family's rule gives over E + N rows."""
    adapter = {key: tensor.detach().clone() for key, tensor in model.adapter_tensors().items()}
    expected = logits_of(widened(make_family(name, variant), name, adapter, selection))
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
    """Saved and loaded, logits are bit-equal (after the cast to the file's dtype). Gives the loaded model."""
    model.save_pretrained(folder)
    for tensor in model.adapter_tensors().values():
        tensor.data = tensor.data.to(base.dtype)
    again = MoExtendForCausalLM.from_pretrained(folder, base=base).eval()
    assert torch.equal(logits_of(again), logits_of(model))
    return again


def check_family(name, variant, implementation, dtype, folder):
    choices = {"dtype": dtype, "experts_implementation": implementation}
    base = make_family(name, variant, **choices)
    try:
        expected = logits_of(frozen_copy(base))
    except RuntimeError as error:
        if NEWEST:
            raise
        pytest.skip(f"transformers {transformers.__version__} can't run the plain base so: {error}")
    for selection in ROUTING_OF:
        model = extend(make_family(name, variant, **choices), selection)
        found = check_off(model, expected)
        if dtype == torch.float32:
            check_rule(model, name, variant, selection, found)
            check_fused(model, name)
        check_gradient(model)
        if selection == "compete":
            if dtype == torch.float32:
                check_generation(model, base)
            again = check_file(model, make_family(name, variant, **choices), folder)
            if dtype != torch.float32:  # before, its new experts were in float32
                check_fused(again, name)


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


def pictures():
    """Two rows with a picture of four tokens each, as the processors of qwen3_vl_moe and glm4v_moe make them."""
    ids = batch(2, 12)["input_ids"]
    ids[:, 3:7] = IMAGE_TOKEN
    pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_omni_moe", "glm4v_moe", "glm5_next"])
def test_a_multimodal_base_keeps_its_own_images(name):
    inputs = pictures()
    expected = logits_of(frozen_copy(make_family(name)), inputs)
    assert not torch.equal(logits_of(make_family(name), {**inputs, "pixel_values": -inputs["pixel_values"]}), expected)
    model = extend(make_family(name), "compete")
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), expected)
    adapter = {key: tensor.detach().clone() for key, tensor in model.adapter_tensors().items()}
    reference = logits_of(widened(make_family(name), name, adapter, "compete"), inputs)
    torch.testing.assert_close(logits_of(model, inputs), reference, rtol=1e-5, atol=1e-5)
    assert not torch.equal(reference, expected)


# ---------------------------------------------------------------- what is refused, and families yet to come


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_family_is_named_with_the_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        MoExtendForCausalLM.from_base(make_family(name), {1: [0]})
    assert name.replace("_", "") in str(refusal.value).lower().replace("_", "")
    assert FAMILIES[name].why


def test_a_hash_layer_is_refused_and_its_neighbours_are_extended():
    base = make_family("deepseek_v4", "hash_first")
    with pytest.raises(ValueError, match="Layer 0 of deepseek_v4.*HashRouter.*input_ids"):
        MoExtendForCausalLM.from_base(base, {0: [1], 1: [1]})
    assert MoExtendForCausalLM.from_base(base, {1: [1]}).config.extended_layers == {1: [1]}


def test_every_family_of_transformers_is_known():
    folder = Path(transformers.__file__).parent / "models"
    found = {f.parent.name for f in folder.glob("*/modeling_*.py") if "@use_experts_implementation" in f.read_text()}
    unknown = sorted(found - EVERY.keys())
    assert not unknown, (
        f"Give these a tiny config in tests/families.py and a rule in tests/plain_routing.py: {unknown}"
    )
    assert FAMILIES.keys() - found == {"dbrx", "jetmoe", "llama4"}
    assert ROUTING.keys() == {name for name, family in EVERY.items() if not family.why}
    assert not NEWEST or FAMILIES.keys() == EVERY.keys()


def test_a_router_that_an_older_transformers_has_otherwise_is_refused():
    assert not NEWEST or not TOO_OLD
    for name in TOO_OLD:
        with pytest.raises(ValueError, match=r"does not follow the router interface|has experts, but not through"):
            MoExtendForCausalLM.from_base(make_family(name), {1: [0]})


@pytest.mark.parametrize(
    ("switch", "entry"), [("if self.norm_topk_prob:", "norm_topk_prob"), ("self.num_group", "n_group")]
)
def test_every_switch_of_a_router_is_tried_both_ways(switch, entry):
    """A family whose router reads this entry of the config has variants with more than one value of it."""
    folder = Path(transformers.__file__).parent / "models"
    once = []
    for name in set(SUPPORTED) & {path.name for path in folder.iterdir()}:
        if switch in (folder / name / f"modeling_{name}.py").read_text():
            configs = [make_config(name, variant).get_text_config() for variant in (None, *FAMILIES[name].variants)]
            if len({getattr(config, entry) for config in configs}) < 2:
                once.append(name)
    assert not once


@pytest.mark.skipif(not NEWEST, reason="the table of docs/families.md is of the newest transformers that is supported")
def test_the_table_of_families_is_fresh():
    written = PAGE.read_text().split(START)[1].split(END)[0]
    assert written == table(), "make families"


class NewRouter(MixtralTopKRouter):
    """A family of tomorrow that follows a known rule: sigmoid, renormalised, scaled."""

    __module__ = "modeling_tomorrow"

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        weights, index = logits.sigmoid().topk(self.top_k, dim=-1)
        return logits, 1.7 * weights / weights.sum(dim=-1, keepdim=True), index


class NovelRouter(MixtralTopKRouter):
    """A family of tomorrow with a rule that nobody knows: squared logits."""

    __module__ = "modeling_tomorrow"

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        weights, index = logits.square().topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index


def unheard_of(router_class):
    """A causal LM of a family that neither transformers nor MoExtend knows."""

    class NewConfig(MixtralConfig):
        model_type = "tomorrow"

    class NewForCausalLM(MixtralForCausalLM):
        config_class = NewConfig

        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.gate = router_class(config)
            self.post_init()

    base = make_family("mixtral")
    model = NewForCausalLM(NewConfig(**{**base.config.to_dict(), "model_type": "tomorrow"}))
    model.load_state_dict(base.state_dict())
    return model.eval()


def test_a_new_family_with_a_known_rule_works(monkeypatch):
    monkeypatch.setitem(ROUTING, "tomorrow", Routing("", score="sigmoid", scale=1.7))
    model = extend(unheard_of(NewRouter), "compete")
    found = check_off(model, logits_of(frozen_copy(unheard_of(NewRouter))))
    adapter = {key: tensor.detach().clone() for key, tensor in model.adapter_tensors().items()}
    expected = logits_of(widened(unheard_of(NewRouter), "tomorrow", adapter, "compete"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_new_family_with_a_novel_rule_is_refused_at_attach():
    with pytest.raises(ValueError, match="Layer 2 of tomorrow.*NovelRouter"):
        MoExtendForCausalLM.from_base(unheard_of(NovelRouter), {2: [0]})
