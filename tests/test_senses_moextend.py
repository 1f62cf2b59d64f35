"""Images: which features are taken, where they go, what is refused, and that the encoder never changes."""

import copy
from functools import partial

import pytest
import torch
from conftest import PAPER, batch, frozen_copy, make_base, make_encoder, shake
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.senses_moextend import (
    Projector,
    encode,
    expand_inputs,
    inputs_per_item,
    load_encoder,
    merge_features,
    select_inputs,
)
from modeling_moextend.tools.hashes import base_tensors_hash

IMAGE = 96  # the first id past the embedding of the bases in conftest
TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
EYES |= {"image_size": 16, "patch_size": 8}


def sense_of(encoder_config, **entries):
    """What a config says of images, for an encoder."""
    return MoExtendConfig(encoder_config=encoder_config, image_token_id=IMAGE, **entries).senses["image"]


def whole(kind):
    torch.manual_seed(2)
    config_class, model_class = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    extra = {"projection_dim": 8} if kind == "clip" else {}
    text = TEXT | {"max_position_embeddings": 8}
    return model_class(config_class(text_config=text, vision_config=EYES | extra, **extra)).eval()


def pixels(number=2, seed=0):
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def seeing(plan=None, family="mixtral", **choices):
    torch.manual_seed(3)
    model = MoExtendForCausalLM.from_base(
        make_base(family), {1: [0]} if plan is None else plan, encoder=make_encoder(), **{**PAPER, **choices}
    )
    return shake(model)


def with_images(counts=(1, 0, 2), patches=4, seed=0):
    """Rows of ids with `counts` images each, one text token before and after every image; right padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count in counts:
        row = torch.randint(3, 90, (14,), generator=generator)
        for image in range(count):
            start = 1 + image * (patches + 1)
            row[start : start + patches] = IMAGE
        rows.append(row)
    return torch.stack(rows)


# ---------------------------------------------------------------- encoder and projector


def test_projector_is_two_linear_layers_with_an_activation_between():
    torch.manual_seed(0)
    for activation, function in (("gelu", F.gelu), ("relu", F.relu)):
        projector = Projector(sense_of(make_encoder().config, projector_hidden_act=activation), 32)
        x, (one, two) = torch.randn(2, 4, 16), (projector.linear_1, projector.linear_2)
        expected = function(x @ one.weight.T + one.bias) @ two.weight.T + two.bias
        torch.testing.assert_close(projector(x), expected, rtol=1e-5, atol=1e-6)
        assert projector(x).shape == (2, 4, 32)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("layer", "feature"), [(-2, "patch"), (-1, "patch"), (-2, "full"), (1, "full")])
def test_select_layer_and_feature(kind, layer, feature):
    tower = whole(kind).vision_model
    sense = sense_of(tower.config, encoder_select_layer=layer, encoder_select_feature=feature)
    projector, images = Projector(sense, 32), pixels()
    hidden = tower(images, output_hidden_states=True).hidden_states[layer]
    assert hidden.shape[1] == (5 if kind == "clip" else 4), "CLIP has a class token in front, SigLIP has none"
    expected = projector(hidden[:, 1:] if kind == "clip" and feature == "patch" else hidden)
    found = encode(sense, tower, projector, {"pixel_values": images})
    assert torch.equal(found, expected.flatten(0, 1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("part", ["whole checkpoint", "vision only"])
def test_encoders_load_from_folders_with_their_own_weights(kind, part, tmp_path):
    model = whole(kind)
    saved = model if part == "whole checkpoint" else model.vision_model
    if part == "vision only" and kind == "siglip":
        saved = SiglipVisionModel(model.config.vision_config)
        saved.load_state_dict(model.vision_model.state_dict())
    saved.save_pretrained(tmp_path)
    attached = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=str(tmp_path))
    expected = frozen_copy(model.vision_model)(pixels(), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(attached.encoder(pixels(), output_hidden_states=True).hidden_states[-2], expected)
    assert attached.config.encoder_name_or_path == str(tmp_path)
    assert attached.config.encoder_config.model_type == f"{kind}_vision_model"
    assert not any(parameter.requires_grad for parameter in attached.encoder.parameters())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_loaded_whole_model_gives_its_vision_tower_and_its_place(kind, tmp_path):
    whole(kind).save_pretrained(tmp_path)
    model = type(whole(kind)).from_pretrained(tmp_path)
    attached = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=model)
    assert attached.config.encoder_config.model_type == f"{kind}_vision_model"
    assert attached.config.encoder_name_or_path == str(tmp_path), "else the saved adapter could not find its encoder"


def test_other_encoders_are_refused_by_name(tmp_path):
    text = BertModel(BertConfig(**TEXT))
    text.save_pretrained(tmp_path)
    for given in (text, str(tmp_path)):
        with pytest.raises(ValueError, match="is a 'bert' model; an encoder must be a model"):
            MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=given)
    with pytest.raises(ValueError, match="is a 'bert' model"):
        load_encoder(tmp_path)


def test_an_incomplete_encoder_is_refused(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is incomplete, or no model of the kind: it lacks .*layers.1.mlp.fc1.weight"):
        load_encoder(tmp_path)


def test_encoder_with_pickled_weights_only_is_refused_unless_asked_for(tmp_path):
    encoder = make_encoder()
    encoder.config.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=str(tmp_path))
    make_base().save_pretrained(tmp_path / "base")
    model = MoExtendForCausalLM.from_base(
        str(tmp_path / "base"), {1: [0]}, encoder=str(tmp_path), use_safetensors=False
    )
    assert torch.equal(model.encoder(pixels()).pooler_output, frozen_copy(encoder)(pixels()).pooler_output)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_base_and_encoder_are_loaded_in_the_dtype_that_is_asked_for(name, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    make_encoder().save_pretrained(tmp_path / "encoder")
    parts, asked = (str(tmp_path / "base"), {1: [0]}), {name: "float16"}
    model = MoExtendForCausalLM.from_base(*parts, encoder=str(tmp_path / "encoder"), **asked)
    model.save_pretrained(tmp_path / "adapter")
    for found in (model, MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", **asked)):
        assert (found.base.dtype, found.encoder.dtype) == (torch.float16, torch.float16)


# ---------------------------------------------------------------- merging


def test_features_take_the_image_tokens_places_in_reading_order():
    embedding = torch.nn.Embedding(90, 6)
    ids = with_images((2, 0, 1))
    features = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(3, 4, 6)
    merged = merge_features(ids, embedding, [(sense_of(make_encoder().config), features.flatten(0, 1), [4, 4, 4])])
    assert torch.equal(merged[0, 1:5], features[0]) and torch.equal(merged[0, 6:10], features[1])
    assert torch.equal(merged[2, 1:5], features[2])
    is_text = ids != IMAGE
    assert torch.equal(merged[is_text], embedding(ids[is_text]))


def test_the_image_token_never_reaches_the_embedding():
    seen = []

    class Embedding(torch.nn.Embedding):
        def forward(self, ids):
            seen.append(int(ids.max()))
            return super().forward(ids)

    embedding = Embedding(90, 6)
    for token in (IMAGE, 10**6, -200):
        ids = with_images((1,))
        sense = MoExtendConfig(encoder_config=make_encoder().config, image_token_id=token).senses["image"]
        merge_features(ids.masked_fill(ids == IMAGE, token), embedding, [(sense, torch.zeros(4, 6), [4])])
    assert max(seen) < 90


@pytest.mark.parametrize(
    ("counts", "number", "message"),
    [
        ((1, 0, 2), 2, r"8 features \(2 images of 4\), 12 image tokens \(id 96\)"),
        ((1,), 2, r"8 features \(2 images of 4\), 4 image tokens"),
        ((0,), 1, r"4 features \(1 images of 4\), 0 image tokens"),
        ((2,), 0, r"0 features, 8 image tokens"),
    ],
)
def test_a_mismatch_names_both_numbers(counts, number, message):
    model = seeing()
    with pytest.raises(ValueError, match=f"{message}.*image_token_id=processor.image_token_id"):
        model(input_ids=with_images(counts), pixel_values=pixels(number) if number else None)


def test_a_sample_in_a_batch_is_what_it_is_alone():
    model = seeing(scope="modality").eval()
    ids, images = with_images((1, 0, 2)), pixels(3)
    together = model(input_ids=ids, pixel_values=images).logits
    for row, own in enumerate((images[:1], None, images[1:])):
        alone = model(input_ids=ids[row : row + 1], pixel_values=own).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    swapped = model(input_ids=ids, pixel_values=images[[0, 2, 1]]).logits
    torch.testing.assert_close(swapped[:2], together[:2], rtol=1e-4, atol=1e-5)  # beside other tokens of an expert
    assert not torch.allclose(swapped[2], together[2], rtol=1e-2, atol=1e-2)


def test_labels_with_image_ids_count_as_much_as_ignored_ones():
    model = seeing().eval()
    ids, images = with_images((1, 0, 2)), pixels(3)
    loss = model(input_ids=ids, pixel_values=images, labels=ids).loss
    expected = model(input_ids=ids, pixel_values=images, labels=ids.masked_fill(ids == IMAGE, -100)).loss
    assert torch.equal(loss, expected) and loss.isfinite()


def test_an_id_past_the_embedding_is_named_before_anything_runs():
    text, eyes, ids = MoExtendForCausalLM.from_base(make_base(), {1: [0]}), seeing(), with_images((1,))
    runs = [model.base.register_forward_pre_hook(lambda *_: pytest.fail("it ran")) for model in (text, eyes)]
    runs.append(eyes.encoder.register_forward_pre_hook(lambda *_: pytest.fail("it ran")))
    added = ids.clone()
    added[0, -1] = IMAGE + 1
    message = r"input_ids hold \[97\], but the base's vocabulary has 96 tokens.*convert_ids_to_tokens.*eos_token"
    for run in (eyes, partial(eyes.generate, max_new_tokens=2), eyes.model):
        with pytest.raises(ValueError, match=message):
            run(input_ids=added, pixel_values=pixels(1))
    for ids in (torch.tensor([[5, 97, 6]]), torch.tensor([[97]])):
        for model in (text, eyes):
            for run in (model, partial(model.generate, max_new_tokens=2), model.model):
                with pytest.raises(ValueError, match=message):
                    run(input_ids=ids)
        with text.disable_adapter(), pytest.raises(ValueError, match=message):
            text(input_ids=ids)
    with pytest.raises(ValueError, match=r"input_ids hold \[-1, 96\], but"):
        text(input_ids=torch.tensor([[5, 96, -1, 96]]))
    for hook in runs:
        hook.remove()


@pytest.mark.parametrize("name", ["pixel_values", "input_features"])
@pytest.mark.parametrize("run", ["forward", "generate"])
def test_inputs_without_an_encoder_are_refused(name, run):
    model = MoExtendForCausalLM.from_base(make_base(), {1: [0]})
    with pytest.raises(ValueError, match=f"{name} was given, but this model has no encoder.*encoder="):
        getattr(model, run)(input_ids=with_images((1,)), **{name: pixels(1)})
    with pytest.raises(ValueError, match="not used by the model: .'pixel_value'"):
        model.generate(with_images((1,)), pixel_value=pixels(1))


def test_images_beside_embeddings_are_refused():
    model = seeing()
    with pytest.raises(ValueError, match="Give images and audio with input_ids, not with inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 5, 32), pixel_values=pixels(1))


def test_images_while_the_adapter_is_off_are_refused():
    model = seeing()
    for given in ({"pixel_values": pixels(1)}, {}):  # image tokens alone have no embedding either
        with (
            model.disable_adapter(),
            pytest.raises(ValueError, match="were given while the adapter is off"),
        ):
            model(input_ids=with_images((1,)), **given)
    model.disable_adapters()
    with pytest.raises(ValueError, match="were given while the adapter is off"):
        model.generate(input_ids=with_images((1,)), pixel_values=pixels(1), max_new_tokens=2)
    model.enable_adapters()
    assert model(input_ids=with_images((1,)), pixel_values=pixels(1)).logits.isfinite().all()


def test_text_is_bit_equal_to_the_base_while_only_the_projector_is_new(family):
    expected = frozen_copy(make_base(family))(**batch()).logits
    aligned = MoExtendForCausalLM.from_base(make_base(family), {}, encoder=make_encoder()).eval()
    assert torch.equal(aligned(**batch()).logits, expected)
    seen = aligned(input_ids=with_images((1,)), pixel_values=pixels(1)).logits
    assert seen.isfinite().all() and seen.shape == (1, 14, 96)


def test_the_encoder_stays_frozen_in_eval_mode_and_bit_equal_in_training():
    base, encoder = make_base(), make_encoder()
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, encoder=encoder, scope="modality")
    before, features = base_tensors_hash(model), model.encoder(pixels(3)).last_hidden_state
    trained = model.set_trainable("finetune")
    model.train()
    assert model.training and not any(module.training for module in model.encoder.modules())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    ids = with_images((1, 0, 2))
    start = {name: tensor.detach().clone() for name, tensor in trained.items()}
    for _ in range(2):
        model(input_ids=ids, pixel_values=pixels(3), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(trained["projector.linear_1.weight"], start["projector.linear_1.weight"])
    assert base_tensors_hash(model) == before
    assert torch.equal(model.encoder(pixels(3)).last_hidden_state, features)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not any(module.training for module in model.encoder.modules())


# ---------------------------------------------------------------- generation


def test_images_are_repeated_item_by_item_for_beams():
    ids, images = with_images((1, 0, 2)), pixels(3)
    sense = sense_of(make_encoder().config)
    assert inputs_per_item(sense, ids, [4] * 3) == [1, 0, 2]
    expanded = expand_inputs(sense, {"pixel_values": images}, ids, 2)["pixel_values"]
    assert torch.equal(expanded, images[[0, 0, 1, 2, 1, 2]])
    assert inputs_per_item(sense, ids.repeat_interleave(2, dim=0), [4] * 6) == [1, 1, 0, 0, 2, 2]


def test_beam_search_over_a_batch_gives_what_each_sample_gives_alone():
    model = seeing(scope="modality").eval()
    ids, images = with_images((2, 0, 1)), pixels(3)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, pixel_values=images, **options)
    for row, own in enumerate((images[:2], None, images[2:])):
        given = {"input_ids": ids[row : row + 1]} | ({} if own is None else {"pixel_values": own})
        alone = model.generate(**given, **options)
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()


def test_images_of_a_continued_conversation():
    ids, images = with_images((2, 0, 1)), pixels(3)
    sense = sense_of(make_encoder().config)

    def selected(given, length):
        return select_inputs(sense, {"pixel_values": given}, ids, length).get("pixel_values")

    assert selected(images, 0) is images
    assert torch.equal(selected(images, 6), images[[1]]), "row 0's second image is new"
    assert torch.equal(selected(images[[1]], 6), images[[1]]), "only the new ones given"
    assert selected(images, 12) is None
    with pytest.raises(
        ValueError,
        match="Image inputs for 8 tokens were given; the conversation has 12, of which 4 are not",
    ):
        selected(images[:2], 6)


def test_the_caller_keeps_its_tensors():
    model = seeing()
    ids, images = with_images((1, 0, 2)), pixels(3)
    before = copy.deepcopy((ids, images))
    model(input_ids=ids, pixel_values=images, labels=ids)
    assert torch.equal(ids, before[0]) and torch.equal(images, before[1])


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 3, 16, 16), (3, 16, 16), (1, 1, 16, 16)])
def test_pixels_of_another_shape_are_refused_with_the_right_one(shape):
    model = seeing()
    ids = torch.tensor([[5, 96, 96, 96, 96, 7]])
    with pytest.raises(ValueError, match=rf"must be \[N, 3, 16, 16\] .* not \[{', '.join(map(str, shape))}\]"):
        model(ids, pixel_values=torch.zeros(shape))
