"""Every way to generate gives what plain greedy, sampling or beam search without a cache gives."""

import copy

import pytest
import torch
from conftest import COMMON, batch, make_base, make_encoder, shake
from test_gate_moextend import open_gate
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.modeling_moextend import BASE_FLAGS
from modeling_moextend.senses_moextend import WithPlaceholderColumn

IMAGE = 96  # the first id past the vocabulary; an image has four features
NEW = 10
CHOICES = {
    "paper": {"paper": True},
    "modality": {"scope": "modality", "selection": "compete", "calibration": "none"},
    "exclusive": {"scope": "modality", "selection": "exclusive", "calibration": "none"},
    "gate": {"scope": "gate", "selection": "exclusive", "calibration": "none", "deltas": ()},
}


def seeing(choice="modality", family="mixtral", seed=0):
    torch.manual_seed(5)
    base = make_base(family)
    base.generation_config.eos_token_id = None
    model = MoExtendForCausalLM.from_base(base, {1: [0, 3], 3: [2]}, encoder=make_encoder(), **CHOICES[choice])
    shake(model, seed=seed)
    return open_gate(model, seed) if choice == "gate" else model


@pytest.fixture(params=sorted(CHOICES))
def model(request):
    return seeing(request.param)


def pixels(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ids(*rows):
    """Rows of text ids, `"image"` for an image, left-padded to one length."""
    flat = [[t for item in row for t in ([IMAGE] * 4 if item == "image" else [item])] for row in rows]
    width = max(map(len, flat))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in flat])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in flat])
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model, *, seed=None, **inputs):
    if seed is not None:
        torch.manual_seed(seed)
    inputs = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **inputs}
    return model.generate(**inputs)


PROMPT = ids([5, 6, "image", 7, 8])
TWO_ROWS = ids([5, 6, "image", 7, "image", 8], [9, "image", 10])


# ---------------------------------------------------------------- with and without a cache


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"num_beams": 3}, marks=pytest.mark.slow), {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["text", "one image", "images in rows"])
def test_a_cache_changes_no_token(model, options, prompt):
    inputs = {
        "text": lambda: batch(rows=2, length=6),
        "one image": lambda: {**PROMPT, "pixel_values": pixels(1)},
        "images in rows": lambda: {**TWO_ROWS, "pixel_values": pixels(3)},
    }[prompt]()
    expected = generate(model, use_cache=False, **inputs, **options)
    assert torch.equal(generate(model, use_cache=True, **inputs, **options), expected)


def test_images_and_new_experts_change_what_is_generated(model):
    """Otherwise every equality in this file would be cheap."""
    seen = generate(model, **PROMPT, pixel_values=pixels(1))
    assert not torch.equal(seen, generate(model, **PROMPT, pixel_values=pixels(1, seed=1)))
    other = shake(copy.deepcopy(model), seed=9, std=2.0)
    assert not torch.equal(seen, generate(other, **PROMPT, pixel_values=pixels(1)))


def test_generation_in_every_family_with_an_image(family):
    model = seeing(family=family)
    inputs = {**PROMPT, "pixel_values": pixels(1)}
    assert torch.equal(generate(model, **inputs), generate(model, **inputs, use_cache=False))


def test_text_is_generated_as_the_base_generates_it_under_scope_modality():
    for choice in ("modality", "exclusive"):
        assert torch.equal(generate(seeing(choice), **batch()), generate(seeing(choice).detach(), **batch()))


def test_sampling_follows_the_seed_with_and_without_a_cache(model):
    inputs = {**PROMPT, "pixel_values": pixels(1), "do_sample": True}
    first = generate(model, seed=3, **inputs)
    assert torch.equal(generate(model, seed=3, **inputs), first)
    assert torch.equal(generate(model, seed=3, **inputs, use_cache=False), first)
    assert any(not torch.equal(generate(model, seed=seed, **inputs), first) for seed in (4, 5))


def test_a_left_padded_batch_gives_the_rows_tokens(model):
    rows = [([5, 6, "image", 7, "image", 8], pixels(2)), ([9, "image", 10], pixels(1, seed=1)), ([11, 12], None)]
    together = generate(
        model, **ids(*(row for row, _ in rows)), pixel_values=torch.cat([pixels(2), pixels(1, seed=1)])
    )
    for row, (prompt, images) in enumerate(rows):
        alone = generate(model, **ids(prompt), **({} if images is None else {"pixel_values": images}))
        assert together[row, -NEW:].tolist() == alone[0, -NEW:].tolist()


def test_several_returned_sequences_keep_the_images_of_their_row(model):
    inputs = {**TWO_ROWS, "pixel_values": pixels(3), "do_sample": True}
    found = generate(model, seed=7, **inputs, num_return_sequences=3)
    order = torch.arange(2).repeat_interleave(3)
    repeated = {name: tensor[order] for name, tensor in TWO_ROWS.items()}
    images = torch.cat([pixels(3)[:2]] * 3 + [pixels(3)[2:]] * 3)
    assert torch.equal(found, generate(model, seed=7, **repeated, pixel_values=images, do_sample=True))


# ---------------------------------------------------------------- speculative decoding


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_embeddings_generate_as_their_ids_do(model, options):
    inputs = batch(rows=2, length=6)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    if model.config.scope == "modality":
        with pytest.raises(ValueError, match="scope='modality' finds image and audio tokens in input_ids, but only"):
            generate(model, inputs_embeds=embeds, **options)
        return
    found = generate(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(found, generate(model, **inputs, **options)[:, 6:])
    with pytest.raises(ValueError, match="Give images and audio with input_ids, not with inputs_embeds"):
        generate(model, inputs_embeds=embeds, pixel_values=pixels(1))


def test_embeddings_are_refused_where_the_base_refuses_them(monkeypatch):
    model = seeing()
    monkeypatch.setattr(type(model.base), "prepare_inputs_for_generation", lambda self, input_ids, **kwargs: {})
    with pytest.raises(ValueError, match="MixtralForCausalLM doesn't have its forwarding implemented"):
        generate(model, inputs_embeds=torch.randn(1, 3, 32))


def test_an_assistant_changes_no_token_of_text(model):
    inputs = ids([5, 6, 7, 8])
    expected = generate(model, **inputs)
    assert torch.equal(generate(model, **inputs, assistant_model=make_base()), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seeing_assistant_changes_no_token(model, seed):
    """Seed 0 drafts with the same new experts, though blind; 1 with others: rejected candidates crop the cache."""
    assistant = seeing("modality", seed=seed)
    inputs = {**PROMPT, "pixel_values": pixels(1)}
    assert torch.equal(generate(model, **inputs, assistant_model=assistant), generate(model, **inputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        *[
            pytest.param(one, marks=pytest.mark.slow)
            for one in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2})
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "prompt",
    [[5, 6, "image", 7, 5, 6], [5, 6, "image", 5, 6, 7, 5, 6], [5, 6, 7, "image", 8, 5, 6], ["image", 5, "image"]],
    ids=str,
)
def test_prompt_lookup_changes_no_token_and_proposes_no_image(model, prompt, options):
    inputs = {**ids(prompt), "pixel_values": pixels(prompt.count("image")), **options}
    assert torch.equal(generate(model, **inputs, prompt_lookup_num_tokens=4), generate(model, **inputs))


# ---------------------------------------------------------------- processors that index scores by ids


def test_a_repetition_penalty_reaches_the_text_and_nothing_else():
    scores = torch.ones(1, IMAGE)
    prompt = ids([5, 6, "image"])["input_ids"]  # the last token is an image's
    processors = WithPlaceholderColumn([IMAGE], [RepetitionPenaltyLogitsProcessor(2.0)])
    found = processors(prompt, scores)
    assert found.shape == (1, IMAGE)
    assert (found != 1).nonzero()[:, 1].tolist() == [5, 6]


@pytest.mark.parametrize("image_token_id", [None, 90, 5000, -200])
def test_any_image_token_id_generates_alike(image_token_id):
    torch.manual_seed(5)
    model = MoExtendForCausalLM.from_base(
        make_base(), {1: [0, 3]}, encoder=make_encoder(), calibration="none", image_token_id=image_token_id
    )
    place = model.config.image_token_id
    inputs = PROMPT["input_ids"].where(PROMPT["input_ids"] != IMAGE, place)
    options = {"attention_mask": PROMPT["attention_mask"], "pixel_values": pixels(1), "no_repeat_ngram_size": 3}
    found = generate(model, input_ids=inputs, **options, repetition_penalty=1.2, top_k=5)
    assert found.shape == (1, inputs.shape[1] + NEW)
    assert torch.equal(
        found, generate(model, input_ids=inputs, **options, repetition_penalty=1.2, top_k=5, use_cache=False)
    )


# ---------------------------------------------------------------- other caches


def test_a_static_cache_changes_no_token(model):
    inputs = {**TWO_ROWS, "pixel_values": pixels(3)}
    assert torch.equal(generate(model, **inputs, cache_implementation="static"), generate(model, **inputs))


def test_chunked_prefill_changes_no_token_of_text_and_refuses_images(model):
    inputs = batch(rows=2, length=9)
    assert torch.equal(generate(model, **inputs, prefill_chunk_size=4), generate(model, **inputs))
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be used in generate with images"):
        generate(model, **PROMPT, pixel_values=pixels(1), prefill_chunk_size=4)


# ---------------------------------------------------------------- a cache handed on by the user


def next_turn(sequences, *more):
    """The conversation so far, and a new user turn."""
    turn = ids(list(more))["input_ids"].expand(len(sequences), -1)
    tokens = torch.cat([sequences, turn], dim=1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("given", ["all images", "new images"])
@pytest.mark.parametrize(
    ("first", "second"),
    [([5, 6], ["image", 7]), ([5, "image", 6], [7, 8]), ([5, "image", 6], [7, "image", 8]), ([5, 6], [7, 8])],
    ids=["text, image", "image, text", "image, image", "text, text"],
)
def test_turns_over_a_handed_on_cache_are_the_conversation_at_once(model, first, second, given):
    old, new = first.count("image"), second.count("image")
    images = pixels(old + new)
    cache = DynamicCache(config=model.config.text_config)
    seen = generate(model, **ids(first), past_key_values=cache, **({"pixel_values": images[:old]} if old else {}))
    conversation = next_turn(seen, *second)
    whole = {"pixel_values": images} if old + new else {}
    wanted = whole if given == "all images" else {"pixel_values": images[old:]} if new else {}
    found = generate(model, **conversation, past_key_values=cache, **wanted)
    assert torch.equal(found, generate(model, **conversation, use_cache=False, **whole))


def test_a_wrong_number_of_images_beside_a_cache_is_refused():
    model = seeing()
    cache = DynamicCache(config=model.config.text_config)
    seen = generate(model, **PROMPT, past_key_values=cache, pixel_values=pixels(1))
    with pytest.raises(
        ValueError,
        match="Image inputs for 12 tokens were given; the conversation has 8, of which 4 are not",
    ):
        generate(model, **next_turn(seen, "image"), past_key_values=cache, pixel_values=pixels(3))


@torch.no_grad()
def test_a_copied_cache_answers_several_questions_about_one_image(model):
    cache = DynamicCache(config=model.config.text_config)
    prefix = ids([5, "image", 6])
    model(**prefix, pixel_values=pixels(1), past_key_values=cache, use_cache=True)
    for question in ([7, 8], [9, 10, 11]):
        whole = ids([5, "image", 6, *question])
        found = generate(model, **whole, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, generate(model, **whole, pixel_values=pixels(1)))


# ---------------------------------------------------------------- mistakes


def test_images_without_their_tokens_and_tokens_without_images_are_refused(model):
    with pytest.raises(ValueError, match=r"4 features \(1 images of 4\), 0 image tokens"):
        generate(model, **ids([5, 6]), pixel_values=pixels(1))
    with pytest.raises(ValueError, match="0 features, 4 image tokens"):
        generate(model, **PROMPT)


def test_images_while_the_adapter_is_off_are_refused(model):
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="were given while the adapter is off"),
    ):
        generate(model, **PROMPT, pixel_values=pixels(1))


# ---------------------------------------------------------------- families with caches or states of their own

LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 8, "intermediate_size": 24}
STATES = {
    "minimax": {**LINEAR, "num_local_experts": 6, "block_size": 8},
    "qwen3_next": {
        **LINEAR,
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("scope", ["all", "gate"])
@pytest.mark.parametrize("family", sorted(STATES))
def test_generation_goes_by_the_bases_own_flags_and_cache(family, scope):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **STATES[family])).eval()
    base.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7]])}
    expected = generate(base, **inputs)
    flags = {name: getattr(base, name) for name in BASE_FLAGS}
    model = MoExtendForCausalLM.from_base(base, {3: [0]}, scope=scope, selection="compete", calibration="none")
    assert {name: getattr(model, name) for name in BASE_FLAGS} == flags
    shake(model, std=1.0)
    if scope == "gate":
        open_gate(model)
    assert torch.equal(generate(model, **inputs), generate(model, **inputs, use_cache=False))
    with model.disable_adapter():
        assert torch.equal(generate(model, **inputs), expected)
    if base._is_stateful:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(model, **inputs, prompt_lookup_num_tokens=2)


# ---------------------------------------------------------------- processors that cannot work with images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale cannot"),
        (
            {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5]])},
            "guidance_scale and negative_prompt_ids cannot",
        ),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty cannot"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size cannot"),
    ],
)
def test_processors_that_cannot_see_images_are_refused_by_name(options, message):
    model = seeing()
    with pytest.raises(ValueError, match=f"{message} be used in generate with images"):
        generate(model, **PROMPT, pixel_values=pixels(1), **options)
    generate(model, **ids([5, 6, 7]), **{k: v for k, v in options.items() if k != "negative_prompt_ids"})


def test_an_image_token_inside_the_vocabulary_leaves_encoder_processors_alone():
    model = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=make_encoder(), image_token_id=95)
    prompt = PROMPT["input_ids"].masked_fill(PROMPT["input_ids"] == IMAGE, 95)
    generate(model, input_ids=prompt, pixel_values=pixels(1), encoder_repetition_penalty=1.2)


# ---------------------------------------------------------------- continuous batching


def in_one_batch(model, prompts):
    """Greedy tokens of each prompt, by `generate_batch`."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(page_size=32, num_blocks=48, max_batch_tokens=256)
    options = {"generation_config": config, "continuous_batching_config": sizes, "warmup": False}
    found = model.generate_batch(inputs=prompts, **options, progress_bar=False)
    return [output.generated_tokens for output in found.values()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("selection", ["compete", "exclusive"])
def test_continuous_batching_gives_the_tokens_of_generate(selection, fused):
    base = make_base(_experts_implementation="grouped_mm")
    options = {"scope": "all", "selection": selection, "calibration": "none"}
    model = shake(MoExtendForCausalLM.from_base(base, {0: [1, 4, 2], 1: [2]}, **options)).eval()
    prompts = [batch(seed=seed)["input_ids"][0, :length].tolist() for seed, length in enumerate((5, 9, 3, 7))]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]
    if fused:
        model.fuse()
    assert in_one_batch(model, prompts) == expected
