"""The Extender: counting, the probe that leaves no trace, and the choice of layers and source experts."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_encoder
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessorPil,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor
from modeling_moextend.extender.router_probe import (
    count_output,
    measure_router_shift,
    probe_config,
    router_deltas,
)
from modeling_moextend.extender.router_shift import RouterShift
from modeling_moextend.families_moextend import find_moe_layers

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
LAYERS, EXPERTS, TOP_K = 4, 4, 2


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def base():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
    ).eval()


@pytest.fixture(scope="module")
def texts():
    letters = WORDS[3:]
    return [" ".join(letters[(i * 7 + j * 3) % 26] for j in range(4 + i % 5)) for i in range(20)]


def dataset(texts):
    return Dataset.from_dict({"text": texts})


def probe(tmp_path, **overrides):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "bf16": False}
    return probe_config(str(tmp_path), **{**settings, "use_cpu": True, "disable_tqdm": True, **overrides})


def shift_of(before, after, layers=None):
    return RouterShift(layers or list(range(len(before))), torch.tensor(before), torch.tensor(after))


@pytest.fixture
def shift():
    """Shares move by 0.3, 0, 0.2, 0.1 between two experts; the last layer is moved most in raw counts."""
    before = [[50, 50], [10, 10], [5, 5], [5000, 5000]]
    after = [[80, 20], [10, 10], [3, 7], [6000, 4000]]
    return shift_of(before, after, layers=[1, 3, 5, 7])


# ------------------------------------------------------------------ RouterShift


def test_d_j_is_the_population_deviation_of_the_change_of_shares():
    shift = shift_of([[2, 2, 4]], [[4, 0, 4]])
    change = [-0.25, 0.25, 0.0]  # shares 0.25, 0.25, 0.5 -> 0.5, 0, 0.5
    by_hand = (sum(c * c for c in change) / 3) ** 0.5
    assert shift.per_layer.tolist() == pytest.approx([by_hand])


def test_d_j_compares_shares_not_counts(shift):
    assert shift.per_layer.tolist() == pytest.approx([0.3, 0.0, 0.2, 0.1])


def test_select_takes_the_floor_of_layers_of_largest_shift(shift):
    assert list(shift.select()) == [1, 5]
    assert list(shift.select(fraction=0.75)) == [1, 5, 7]
    assert list(shift.select(fraction=0.7)) == [1, 5]
    assert list(shift.select(fraction=1.0)) == [1, 3, 5, 7]


def test_floor_is_not_thrown_off_by_binary_fractions():
    shift = shift_of([[1, 1]] * 100, [[1, 1]] * 100)
    assert len(shift.select(fraction=0.29)) == 29
    assert list(shift.select(fraction=0.02)) == [0, 1]  # equal shifts: the lower layers


def test_named_choices(shift):
    assert list(shift.select(layers="all")) == [1, 3, 5, 7]
    assert list(shift.select(layers="first-half")) == [1, 3]
    assert list(shift.select(layers="second-half")) == [5, 7]
    assert list(shift.select(layers="interval")) == [3, 7]
    assert list(shift.select(layers=[7, 1])) == [1, 7]


def test_sources_are_the_most_selected_after_training():
    shift = shift_of([[9, 0, 1, 0]], [[1, 0, 5, 4]])
    assert shift.select(layers="all") == {0: [2]}
    assert shift.select(layers="all", num_new=3) == {0: [2, 3, 0]}
    assert shift.select(layers="all", num_new=5) == {0: [2, 3, 0, 2, 3]}  # expert 1 was never selected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0}, r"fraction must lie in \(0, 1\], not 0"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], not 1.5"),
        ({"fraction": "all"}, "write layers='all'"),
        ({"fraction": 0.1}, "less than one layer: give at least 0.25"),
        ({"fraction": 0.5, "layers": "all"}, "either fraction or layers"),
        ({"layers": [1, 2]}, r"\[2\] are no MoE layers of this model; its MoE layers are \[1, 3, 5, 7\]"),
        ({"layers": []}, "no MoE layers"),
        ({"layers": "third"}, "'third' is unknown.*'interval'"),
        ({"num_new": 0}, "num_new must be at least 1"),
    ],
)
def test_select_refuses(shift, arguments, message):
    with pytest.raises(ValueError, match=message):
        shift.select(**arguments)


def test_save_and_load(shift, tmp_path):
    path = tmp_path / "runs" / "shift.json"
    shift.save(path)
    loaded = RouterShift.load(path)
    assert loaded.layers == shift.layers
    assert torch.equal(loaded.counts_before, shift.counts_before)
    assert torch.equal(loaded.counts_after, shift.counts_after)
    assert loaded.counts_after.dtype == torch.int64
    assert [file.name for file in path.parent.iterdir()] == ["shift.json"]


def test_a_failed_save_keeps_the_old_file(shift, tmp_path, monkeypatch):
    path = tmp_path / "shift.json"
    shift.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda path, text, **options: (path.write_bytes(b"{"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        shift.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["shift.json"]


def test_load_refuses_other_files_and_newer_ones(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a router shift"):
        RouterShift.load(path)
    path.write_text('{"moextend_router_shift": 2}')
    with pytest.raises(ValueError, match="has format 2.*Upgrade"):
        RouterShift.load(path)


def test_counts_must_fit_the_layers():
    with pytest.raises(ValueError, match=r"must be \[1 layers, experts\]"):
        shift_of([[1, 1], [1, 1]], [[1, 1], [1, 1]], layers=[0])
    with pytest.raises(ValueError, match="without a single selection"):
        shift_of([[0, 0]], [[1, 1]])


def test_plot_shows_three_panels_and_needs_no_pyplot(shift, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    shift.plot(tmp_path / "shift.png")
    assert (tmp_path / "shift.png").read_bytes()[:4] == b"\x89PNG"
    shift.plot(tmp_path / "plan.svg", plan={3: [0]})
    assert (tmp_path / "plan.svg").stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(shift, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'moextend\[plot\]'"):
        shift.plot(tmp_path / "shift.png")


# ------------------------------------------------------------------ counting


def test_padding_does_not_count():
    index = torch.tensor([[0, 1], [2, 3], [2, 1], [3, 3]])
    answer = (torch.randn(4, 4), torch.rand(4, 2), index)
    assert count_output(answer, None, 4).tolist() == [1, 2, 2, 3]
    assert count_output(answer, torch.tensor([[1, 0], [1, 0]]), 4).tolist() == [1, 2, 1, 0]


def test_counts_are_the_routers_own_selections(base, tokenizer, texts, tmp_path):
    """Batches with padding give the sum of what each text alone gives."""
    held_out = texts[8:]
    shift = measure_router_shift(base, dataset(texts[:8]), dataset(held_out), probe(tmp_path), tokenizer)
    expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    tokens = 0
    for text in held_out:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        tokens += ids.numel()
        with torch.no_grad():
            logits = base.model(ids, output_router_logits=True).router_logits
        for layer, values in enumerate(logits):
            expected[layer] += torch.bincount(values.topk(TOP_K, dim=-1).indices.reshape(-1), minlength=EXPERTS)
    assert torch.equal(shift.counts_before, expected)
    assert (shift.counts_after.sum(dim=1) == tokens * TOP_K).all()
    assert shift.layers == list(range(LAYERS))


# ------------------------------------------------------------------ the probe


def state_of(model):
    """Everything the probe must leave as it was."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "order": list(model.state_dict()),
        "identity": [id(parameter) for parameter in model.parameters()],
        "classes": [type(module) for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "attributes": set(model.__dict__),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def assert_same_state(before, after):
    tensors = before.pop("tensors"), after.pop("tensors")
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    for key in before:
        assert before[key] == after[key], key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_probe_moves_the_routing_and_leaves_no_trace(base, tokenizer, texts, tmp_path, checkpointing):
    next(base.parameters()).requires_grad_(False)  # flags differ, and must come back so
    before = state_of(base)
    args = probe(tmp_path, learning_rate=0.1, gradient_checkpointing=checkpointing)
    shift = measure_router_shift(base, dataset(texts[:8]), dataset(texts[8:]), args, tokenizer)
    assert (shift.per_layer > 0).any()
    assert_same_state(before, state_of(base))
    assert not list(tmp_path.iterdir())  # nothing saved


def test_the_model_comes_back_after_an_exception(base, tokenizer, texts, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    before = state_of(base)
    with pytest.raises(KeyboardInterrupt):
        measure_router_shift(
            base, dataset(texts[:8]), dataset(texts[8:]), probe(tmp_path), tokenizer, callbacks=[Stop()]
        )
    assert_same_state(before, state_of(base))


def test_a_pad_token_past_the_embedding_is_named(base, texts, tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"The tokenizer's pad_token: '\[PAD\]' has the id 29, .* has 29 rows"):
        measure_router_shift(base, dataset(texts[:8]), dataset(texts[8:]), probe(tmp_path), tokenizer)


def test_only_the_deltas_train(base, tokenizer, texts, tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.update({name: p.clone() for name, p in model.named_parameters() if p.requires_grad})

    measure_router_shift(base, dataset(texts[:8]), dataset(texts[8:]), probe(tmp_path), tokenizer, callbacks=[Look()])
    assert len(seen) == LAYERS
    assert all(name.endswith("gate.parametrizations.weight.0.delta") for name in seen)
    assert all(delta.dtype == torch.float32 and delta.any() for delta in seen.values())


def test_training_shifts_what_the_data_asks_for(base, tokenizer, texts, tmp_path):
    """Without a step, before and after are the same counts: whatever differs comes from training."""
    args = probe(tmp_path, learning_rate=0.0)
    shift = measure_router_shift(base, dataset(texts[:8]), dataset(texts[8:]), args, tokenizer)
    assert torch.equal(shift.counts_before, shift.counts_after)
    assert shift.per_layer.tolist() == [0.0] * LAYERS


def test_a_bf16_base_gets_float32_deltas_and_keeps_its_bits(base, tokenizer, texts, tmp_path):
    base = base.to(torch.bfloat16)
    before = state_of(base)
    args = probe(tmp_path, learning_rate=0.1, bf16=True)
    shift = measure_router_shift(base, dataset(texts[:8]), dataset(texts[8:]), args, tokenizer)
    assert (shift.per_layer > 0).any()
    assert_same_state(before, state_of(base))


def test_routers_with_a_bias_train_it_too(tokenizer):
    base = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
    order = list(base.state_dict())
    with router_deltas(base, find_moe_layers(base.get_decoder())):
        trainable = sorted(name.split("router.")[1] for name, p in base.named_parameters() if p.requires_grad)
    deltas = ["parametrizations.bias.0.delta", "parametrizations.weight.0.delta"]
    assert trainable == sorted(deltas * 2)
    assert list(base.state_dict()) == order


def test_empty_datasets_and_models_without_moe_layers(base, tokenizer, texts, tmp_path):
    empty = Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="train_dataset is empty"):
        measure_router_shift(base, empty, dataset(texts), probe(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        measure_router_shift(base, dataset(texts), empty, probe(tmp_path), tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes))
    with pytest.raises(ValueError, match="no MoE layers"):
        measure_router_shift(dense, dataset(texts), dataset(texts[:2]), probe(tmp_path), tokenizer)


def test_counting_on_training_samples_warns(base, tokenizer, texts, tmp_path):
    samples = dataset(texts)
    with pytest.warns(UserWarning, match="same samples"):
        measure_router_shift(base, samples, samples, probe(tmp_path, max_steps=1), tokenizer)


def test_defaults_are_the_papers(tmp_path):
    args = probe_config(str(tmp_path))
    assert (args.max_steps, args.learning_rate, args.weight_decay) == (1000, 1e-3, 0.0)
    assert args.lr_scheduler_type.value == "cosine"
    assert args.get_warmup_steps(args.max_steps) == 30


# ------------------------------------------------------------------ MoExtend models


def test_new_experts_sit_out_and_stay_as_they_are(base, tokenizer, texts, tmp_path):
    samples = dataset(texts[:8]), dataset(texts[8:])
    plain = measure_router_shift(base, *samples, probe(tmp_path, learning_rate=0.1), tokenizer)
    model = MoExtendForCausalLM.from_base(base, extended_layers={1: [0], 2: [3, 1]}, paper=True)
    before = state_of(model)
    shift = measure_router_shift(model, *samples, probe(tmp_path, learning_rate=0.1), tokenizer)
    assert torch.equal(shift.counts_before, plain.counts_before)
    assert torch.equal(shift.counts_after, plain.counts_after)
    assert_same_state(before, state_of(model))
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
    with torch.no_grad(), model.record_routing() as records:
        model(ids)
    assert records[2].num_new == 2  # and they take part again


def test_images_are_seen_with_new_experts_off(tmp_path):
    """The router shift of an extended model on images is that of the aligned one: its projector goes on working."""
    shifts, projector = [], None
    for plan in ({}, {1: [0], 2: [3, 1]}):
        model = MoExtendForCausalLM.from_base(make_base(), extended_layers=plan, encoder=make_encoder())
        projector = projector or model.projector.state_dict()
        model.projector.load_state_dict(projector)  # it starts at random
        settings = {"learning_rate": 0.1, "max_length": 64, "seed": 1}
        samples = image_data(8), image_data(12).select(range(8, 12))
        shifts.append(measure_router_shift(model, *samples, probe(tmp_path, **settings), make_processor(model)))
    assert torch.equal(shifts[0].counts_before, shifts[1].counts_before)
    assert torch.equal(shifts[0].counts_after, shifts[1].counts_after)
    assert (shifts[0].per_layer > 0).any()
    patches = 4
    assert shifts[0].counts_before[0].sum() > 4 * patches * TOP_K  # image tokens count among the others


def image_data(number):
    rows = []
    for i in range(number):
        image = Image.new("RGB", (20, 20), ((i * 40) % 256, (i * 90) % 256, 60))
        letters = " ".join(WORDS[3 + (i * 7 + j * 3) % 26] for j in range(4))
        messages = [{"role": "user", "content": letters}, {"role": "assistant", "content": letters}]
        rows.append({"messages": messages, "images": [image]})
    return Dataset.from_list(rows)


def make_processor(model):
    """The image token's id is the model's: the first one past the base's embedding."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.add_tokens([f"<extra{i}>" for i in range(model.config.image_token_id - len(WORDS))])
    special = {"pad_token": "<pad>", "bos_token": "<unk>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = MoExtendProcessor.from_encoder(tokenizer, image_processor, model.config.encoder_config)
    assert processor.image_token_id == model.config.image_token_id
    return processor
