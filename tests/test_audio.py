"""Audio: which encoders hear, how many tokens a clip takes, where features go, what is refused, the guarantees."""

import copy
import json
import math
import os
import shutil
import wave
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import soundfile
import torch
from conftest import COMMON, EVERY_FAMILY, batch, frozen_copy, make_base, make_encoder, shake
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_file_moextend import check_opened, kill_at_every_step
from test_batching import in_batches, one_by_one
from test_processing_moextend import build_tokenizer
from test_push_to_hub import BASE, REPO
from test_push_to_hub import hub as hub
from test_threads import InTheMiddle
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    DynamicCache,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    MixtralConfig,
    MixtralForCausalLM,
    SEWConfig,
    SEWModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_moextend import (
    MoExtendConfig,
    MoExtendForCausalLM,
    MoExtendProcessor,
    MoExtendSFTConfig,
    MoExtendSFTTrainer,
)
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.data.collators import AudioInMessages
from modeling_moextend.data.llava import load_llava
from modeling_moextend.evaluation.report import accuracy
from modeling_moextend.publishing.hub import publish_folder
from modeling_moextend.senses_moextend import load_encoder
from modeling_moextend.tools.hashes import base_tensors_hash
from modeling_moextend.tools.inspection import inspect_adapter
from modeling_moextend.tools.merge import merge
from modeling_moextend.tools.verification import verify_adapter
from moextend_cli import main

RATE = 16000
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (400, 3), "conv_stride": (320, 2)}
WAVES = {**SMALL, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 100, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
MEL = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
SAMPLES = Wav2Vec2FeatureExtractor(return_attention_mask=True)
ENCODERS = {  # name -> config, model, feature extractor, seconds of a clip -> its features
    "whisper": (WhisperConfig(**WHISPER), WhisperEncoder, MEL, lambda seconds: math.ceil(seconds * 50)),
    "wav2vec2": (Wav2Vec2Config(**WAVES), Wav2Vec2Model, SAMPLES, None),
    "hubert": (HubertConfig(**WAVES), HubertModel, SAMPLES, None),
    "wavlm": (WavLMConfig(**WAVES), WavLMModel, SAMPLES, None),
    "ast": (ASTConfig(**SMALL, max_length=64, num_mel_bins=32), ASTModel, ASTFeatureExtractor(32, RATE, 32, 64), None),
}


def make_wordy_base():
    """A base with an embedding for every token of `build_tokenizer`."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**COMMON, **EVERY_FAMILY["mixtral"].config, "vocab_size": 260})).eval()


def make_ears(kind="whisper"):
    torch.manual_seed(1)
    config, model_class, *_ = ENCODERS[kind]
    return model_class(copy.deepcopy(config)).eval()


def tone(seconds=0.5, seed=0):
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) / 10


def make_processor(kind="whisper", eyes=False, **options):
    config, _, extractor, _ = ENCODERS[kind]
    images = (CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), make_encoder().config)
    return MoExtendProcessor.from_encoder(
        build_tokenizer(),
        *(images if eyes else ()),
        feature_extractor=extractor,
        audio_encoder_config=config,
        **options,
    )


def hearing(kind="whisper", processor=None, eyes=False, plan=MappingProxyType({1: [0]}), **choices):
    torch.manual_seed(3)
    processor = processor or make_processor(kind, eyes)
    encoders = [make_encoder(), make_ears(kind)] if eyes else make_ears(kind)
    ids = {"audio_token_id": processor.audio_token_id, "image_token_id": processor.image_token_id}
    base = make_wordy_base()
    return shake(MoExtendForCausalLM.from_base(base, dict(plan), encoder=encoders, **ids, **choices))


def inputs_of(processor, *clips, text="USER: {} What? ASSISTANT:", **options):
    texts = [text.format("<audio>" * len(own)) for own in clips]
    return processor(audio=[list(own) for own in clips], text=texts, padding=True, return_tensors="pt", **options)


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_family_is_found_loaded_and_heard_with(kind, tmp_path):
    processor, ears = make_processor(kind), make_ears(kind)
    ears.save_pretrained(tmp_path)
    model = hearing(kind, processor)
    again = MoExtendForCausalLM.from_base(
        make_wordy_base(), {}, encoder=str(tmp_path), audio_token_id=processor.audio_token_id
    )
    assert again.config.audio_encoder_name_or_path == str(tmp_path) and again.encoder is None
    for name, tensor in ears.state_dict().items():
        assert name == "masked_spec_embed" or torch.equal(again.audio_encoder.state_dict()[name], tensor)
    given = inputs_of(processor, [tone(0.3)])
    heard = model(**given).logits
    other = model(**{**given, "input_features": given["input_features"] + 1}).logits
    assert torch.isfinite(heard).all() and not torch.allclose(heard, other)


@pytest.mark.parametrize("model_class", [WhisperForConditionalGeneration, Wav2Vec2ForCTC])
def test_the_encoder_inside_a_whole_model_is_taken(model_class, tmp_path):
    config = WhisperConfig(**WHISPER) if model_class is WhisperForConditionalGeneration else Wav2Vec2Config(**WAVES)
    torch.manual_seed(0)
    whole = model_class(config).eval()
    whole.save_pretrained(tmp_path)
    own = whole.get_encoder() if config.is_encoder_decoder else whole.wav2vec2
    tensors = load_encoder(tmp_path).state_dict()
    assert len(tensors) >= len(own.state_dict()) - 1  # a vector for masks in training is left out
    assert all(torch.equal(tensors[name], own.state_dict()[name]) for name in tensors)


@pytest.mark.parametrize(("kind", "patches"), [("siglip2", 16), ("dinov2", 4)])
def test_further_encoders_of_images(kind, patches):
    torch.manual_seed(0)
    if kind == "siglip2":
        encoder = Siglip2VisionModel(Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=4)).eval()
        given = {"pixel_values": torch.randn(2, 16, 48), "spatial_shapes": torch.tensor([[4, 4], [2, 3]])}
        given["pixel_attention_mask"] = (torch.arange(16) < torch.tensor([[16], [6]])).long()
        counts = [16, 6]
    else:
        encoder = Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).eval()
        given, counts = {"pixel_values": torch.randn(2, 3, 42, 28)}, [6, 6]  # not the size of its config
    model = shake(MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=encoder))
    assert model.config.num_image_tokens == patches
    rows = [[5, *[96] * count, 7, *[8] * (16 - count)] for count in counts]
    ids, mask = torch.tensor(rows), torch.tensor([[1] * (count + 2) + [0] * (16 - count) for count in counts])
    together = model(input_ids=ids, attention_mask=mask, **given).logits
    for row, count in enumerate(counts):
        own = {name: tensor[row : row + 1] for name, tensor in given.items()}
        alone = model(input_ids=ids[row : row + 1, : count + 2], **own).logits
        torch.testing.assert_close(together[row : row + 1, : count + 2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_class", "kind"), [(HubertForCTC, "hubert"), (ASTForAudioClassification, "ast")])
def test_a_loaded_model_with_a_head_is_heard_with_without_it(model_class, kind, tmp_path):
    """Or its folder, of which the body is loaded, would be another encoder than the adapter was made on."""
    whole = model_class(copy.deepcopy(ENCODERS[kind][0]))
    whole.save_pretrained(tmp_path / "ears")
    make_base().save_pretrained(tmp_path / "base")
    encoder = model_class.from_pretrained(tmp_path / "ears")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [0]}, encoder=encoder)
    assert model.audio_encoder is encoder.base_model is not encoder
    model.save_pretrained(tmp_path / "adapter")
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.audio_encoder_name_or_path == str(tmp_path / "ears")


def test_an_encoder_that_gives_other_features_than_its_config_tells_is_refused():
    with pytest.raises(ValueError, match="A 'sew' model can't be an encoder of audio, for it gives features of shape"):
        MoExtendForCausalLM.from_base(make_base(), {}, encoder=SEWModel(SEWConfig(**WAVES)))
    untold = Wav2Vec2BertModel(Wav2Vec2BertConfig(**SMALL))
    with pytest.raises(ValueError, match="its config does not tell how many features it makes .*: it needs"):
        MoExtendForCausalLM.from_base(make_base(), {}, encoder=untold)


@pytest.mark.parametrize(
    ("kind", "shape", "taken"), [("whisper", (1, 80, 200), r"\[N, 8, 200\]"), ("ast", (1, 32, 32), r"\[N, 64, 32\]")]
)
def test_features_of_another_shape_are_refused_with_the_right_one(kind, shape, taken):
    processor = make_processor(kind)
    given = inputs_of(processor, [tone()]) | {"input_features": torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"input_features must be {taken} .*, not \[{', '.join(map(str, shape))}\]"):
        hearing(kind, processor)(**given)


@pytest.mark.parametrize(
    ("kind", "extractor", "message"),
    [
        ("whisper", WhisperFeatureExtractor(feature_size=80, chunk_length=2), r"\[80, 200\] .* takes \[8, 200\]"),
        ("whisper", SAMPLES, r"\[16000\] of a second of audio, the encoder takes \[8, 200\]"),
        ("wav2vec2", MEL, r"\[8, 200\] of a second of audio, the encoder takes \[samples\]"),
        ("ast", ASTFeatureExtractor(32, RATE, 32, 128), r"\[128, 32\] .* takes \[64, 32\]"),
    ],
)
def test_a_feature_extractor_of_another_encoder_is_refused(kind, extractor, message):
    with pytest.raises(ValueError, match=f"The feature extractor makes {message}. Load the feature extractor from"):
        MoExtendProcessor.from_encoder(
            build_tokenizer(), feature_extractor=extractor, audio_encoder_config=ENCODERS[kind][0]
        )


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("downsample", [1, 3])
def test_a_clip_takes_as_many_tokens_as_the_encoder_makes_features(kind, downsample):
    config = MoExtendConfig(audio_encoder_config=ENCODERS[kind][0], audio_projector_downsample=downsample)
    processor = make_processor(kind, audio_projector_downsample=downsample)
    for seconds in (0.11, 0.5, 0.64):
        given = inputs_of(processor, [tone(seconds)])
        number = int((given["input_ids"] == processor.audio_token_id).sum())
        if kind == "ast":
            expected = ((64 - 16) // 10 + 1) * ((32 - 16) // 10 + 1)
        else:
            length = int(given["input_features_mask"].sum())
            expected = config.senses["audio"].num_placeholders(length) * downsample
            if kind == "whisper":
                assert length == int(seconds * 100) or length == math.ceil(seconds * 100)
                expected = math.ceil(length / 2)
            else:
                values = torch.zeros(1, length)
                expected = make_ears(kind)(values).last_hidden_state.shape[1]
        assert number == math.ceil(expected / downsample)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "hubert", "wavlm", "ast"])
@pytest.mark.parametrize("downsample", [1, 4])
def test_a_clip_in_a_batch_is_what_it_is_alone(kind, downsample):
    """Whatever stands beside it: padding goes through no norm and no attention."""
    processor = make_processor(kind, audio_projector_downsample=downsample)
    model = hearing(kind, processor, audio_projector_downsample=downsample)
    clips = [tone(0.21, 1), tone(0.6, 2), tone(0.47, 3)]
    together = inputs_of(processor, [clips[0]], [clips[1], clips[2]])
    logits = model(**together).logits
    for row, own in enumerate(([clips[0]], [clips[1], clips[2]])):
        given = inputs_of(processor, own)
        alone = model(**given).logits[0]
        real = together["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row][real], alone, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what a processor takes


def write_wav(path, samples, rate):
    soundfile.write(path, samples, rate)
    return str(path)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_rate_and_stereo_come_to_the_encoders(rate, tmp_path):
    times = np.arange(rate // 2) / rate
    samples = np.sin(2 * np.pi * 440 * times).astype(np.float32)
    processor, expected = make_processor(), np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)
    path = write_wav(tmp_path / "a.wav", np.stack([samples, samples], axis=1), rate)
    wanted = inputs_of(processor, [expected.astype(np.float32)])["input_features"]
    decoded = {"array": samples, "sampling_rate": rate}
    stereo = {"array": np.stack([samples, samples]), "sampling_rate": rate}
    stored = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}
    for clip in (path, decoded, stereo, stored):
        found = inputs_of(processor, [clip])["input_features"]
        torch.testing.assert_close(found[..., 10:40], wanted[..., 10:40], rtol=0, atol=0.1)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_of_soundfile(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(), RATE)
    assert inputs_of(make_processor(), [str(path)])["input_features_mask"].sum() >= 50


def test_what_cannot_be_heard_is_refused_by_number_and_name(tmp_path):
    processor = make_processor()
    (tmp_path / "broken.wav").write_bytes(b"RIFF0000WAVEnothing")
    write_wav(tmp_path / "empty.wav", np.zeros(0), RATE)
    good, refused = tone(), partial(pytest.raises, ValueError)
    with refused(match=r"Audio 1, '.*broken.wav', can't be read: "):
        inputs_of(processor, [good, str(tmp_path / "broken.wav")])
    with refused(match=r"Audio 1, '.*missing.wav', can't be read: FileNotFoundError: there is no such file"):
        inputs_of(processor, [good, str(tmp_path / "missing.wav")])
    with refused(match=r"Audio 0, '.*empty.wav', must be one channel of finite samples: its samples are \[0\]"):
        inputs_of(processor, [str(tmp_path / "empty.wav")])
    with refused(match="Audio 0 must be .* NaN or infinity in it"):
        inputs_of(processor, [np.full(RATE, np.nan, dtype=np.float32)])
    with refused(match=r"Audio 0 is 3600.0 seconds long, and the limit is 2: cut it"):
        inputs_of(processor, [np.zeros(3600 * RATE, dtype=np.float32)])
    long = write_wav(tmp_path / "long.wav", tone(3), RATE)
    chat = [{"role": "user", "content": [{"type": "audio", "path": long}]}]
    for hear in (partial(inputs_of, processor, [long]), partial(processor.apply_chat_template, chat, tokenize=True)):
        with refused(match=r"Audio 0, '.*long.wav', is 3.0 seconds long, and the limit is 2: cut it"):
            hear()
    with refused(match="Sample 0 has 1 clips but 2 '<audio>' in its text"):
        processor(audio=[[good]], text=["<audio><audio>"])
    with refused(match="images was given, and this processor is of an adapter that has no encoder for it"):
        processor(images=[[np.zeros((16, 16, 3))]], text=["what"])
    short = write_wav(tmp_path / "short.wav", tone(0.001), RATE)
    with refused(match=r"Audio 1, '.*short.wav', is too short: 0.001 seconds give no feature"):
        inputs_of(make_processor("wav2vec2"), [good, short])
    silent = inputs_of(processor, [np.zeros(RATE, dtype=np.float32)])
    assert silent["input_features"].isfinite().all()


def test_what_would_be_heard_wrong_is_refused():
    processor, clip = make_processor(), tone()
    with pytest.raises(ValueError, match=r"sampling_rate=44100: bare arrays must be at 16000 Hz"):
        processor(text="<audio>", audio=clip, sampling_rate=44100)
    whole = (np.asarray(clip) * 32767).astype("int16")
    with pytest.raises(ValueError, match="Audio 0 can't be read: .*whole numbers have no fixed range"):
        processor(text="<audio>", audio=whole)
    scaled = processor(text="<audio>", audio={"array": whole, "sampling_rate": RATE}, return_tensors="pt")
    exact = processor(text="<audio>", audio=clip, return_tensors="pt")
    torch.testing.assert_close(scaled["input_features"], exact["input_features"], atol=1e-2, rtol=0)
    for seconds in (math.nan, math.inf, -5, "1"):
        with pytest.raises(ValueError, match="max_audio_seconds"):
            make_processor(max_audio_seconds=seconds)


def test_two_encoders_of_one_sense_are_refused():
    with pytest.raises(ValueError, match="encoder='WhisperEncoder' takes audio, which an earlier one takes: give one"):
        MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=[make_ears(), make_ears()])


def test_two_senses_have_a_token_each():
    with pytest.raises(ValueError, match="image_token_id and audio_token_id are both 7"):
        encoders = [make_encoder(), make_ears()]
        MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=encoders, image_token_id=7, audio_token_id=7)


def test_clips_without_a_place_in_the_messages_are_an_error():
    collate, row = AudioInMessages(lambda examples: examples), {"audio": tone()}
    with pytest.raises(ValueError, match="Sample 1 of the batch has 1 clips, and no user's message for them"):
        collate([{"messages": []}, {"messages": [{"role": "assistant", "content": "b"}], **row}])


def test_long_clips_are_cut_by_choice():
    processor = make_processor()
    processor.cut_audio = True
    found = inputs_of(processor, [tone(3.0)])
    assert torch.equal(found["input_features"], inputs_of(processor, [tone(3.0)[: 2 * RATE]])["input_features"])


def test_chat_template_and_audio_parts(tmp_path):
    processor = make_processor()
    path = write_wav(tmp_path / "a.wav", tone(0.4), RATE)
    parts = [{"type": "audio", "path": path}, {"type": "text", "text": "or"}, {"type": "audio", "audio": tone(0.2)}]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    found = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert found["input_features"].shape[0] == 2
    assert found["input_features_mask"].sum(dim=1).tolist() == [40, 20]
    tokens = (found["input_ids"] == processor.audio_token_id).sum()
    assert int(tokens) == math.ceil(20 / 4) + math.ceil(10 / 4)


def test_a_processor_of_both_senses_is_saved_and_loaded(tmp_path):
    processor = make_processor(eyes=True)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    given = {"audio": [[tone()]], "images": [[np.zeros((16, 16, 3), dtype=np.uint8)]], "text": ["<image><audio>"]}
    one, other = (each(**given, return_tensors="pt") for each in (processor, loaded))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- guarantees


def test_text_without_audio_is_bit_equal_to_the_base():
    model = hearing(scope="modality")
    text = batch()
    assert torch.equal(model(**text).logits, frozen_copy(model.base)(**text).logits)
    with model.disable_adapter():
        assert torch.equal(model(**text).logits, frozen_copy(model.base)(**text).logits)
        with pytest.raises(ValueError, match="while the adapter is off: the base alone can't see or hear"):
            model(**inputs_of(make_processor(), [tone()]))


def test_scope_begins_at_the_first_token_of_any_sense():
    processor = make_processor(eyes=True)
    model = hearing(processor=processor, eyes=True, scope="modality")
    text = "one two <audio> three <image> four"
    given = processor(
        audio=[[tone(0.1)]], images=[[np.zeros((16, 16, 3), dtype=np.uint8)]], text=[text], return_tensors="pt"
    )
    ids = given["input_ids"]
    first = int((ids[0] == processor.audio_token_id).nonzero()[0])
    with model.record_routing() as records:
        model(**given)
    chosen = (records[1].index >= model.config.text_config.num_local_experts).any(dim=-1)
    assert chosen[first:].all() and not chosen[:first].any()
    plain = frozen_copy(model.base)(input_ids=ids[:, :first]).logits
    torch.testing.assert_close(model(**given).logits[:, :first], plain, rtol=1e-5, atol=1e-6)


def test_a_conversation_that_hears_later_keeps_its_cache():
    processor = make_processor()
    model = hearing(processor=processor, scope="modality").eval()
    given = inputs_of(processor, [tone(0.3)], text="some words first {} and after")
    ids, first = given["input_ids"], int((given["input_ids"][0] == processor.audio_token_id).nonzero()[0])
    whole = model(**given).logits
    cache = DynamicCache(config=model.config.text_config)
    begun = model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True).logits
    assert torch.equal(begun, frozen_copy(model.base)(input_ids=ids[:, :first]).logits)
    audio = {name: given[name] for name in ("input_features", "input_features_mask")}
    rest = model(input_ids=ids[:, first:], past_key_values=cache, use_cache=True, **audio).logits
    torch.testing.assert_close(torch.cat([begun, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_generate_over_a_batch_and_with_beams_gives_what_each_gives_alone():
    processor = make_processor()
    model = hearing(processor=processor, scope="modality").eval()
    clips = ([tone(0.2, 1)], [tone(0.5, 2), tone(0.3, 3)])
    together = inputs_of(processor, *clips, padding_side="left")
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
        found = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
        for row, own in enumerate(clips):
            given = inputs_of(processor, own)
            alone = model.generate(**given, **options)[0, given["input_ids"].shape[1] :]
            assert found[row, : len(alone)].tolist() == alone.tolist()
        if options.get("num_beams"):
            continue
        asked = [{"type": "audio"}, {"type": "text", "text": "What?"}]
        ask = [[{"role": "user", "content": asked[:1] * len(own) + asked[1:]}] for own in clips]
        questions = [{"prompt": one, "answer": "a", "audios": own} for one, own in zip(ask, clips, strict=True)]
        _, answers = accuracy(model, processor, questions, "exact_match", max_new_tokens=4)
        assert len(set(answers)) == 2


def test_saved_loaded_and_as_remote_code_bit_equal(tmp_path):
    processor = make_processor(eyes=True)
    base, ears, eyes = make_wordy_base(), make_ears(), make_encoder()
    for name, part in (("base", base), ("ears", ears), ("eyes", eyes)):
        part.save_pretrained(tmp_path / name)
    ids = {"audio_token_id": processor.audio_token_id, "image_token_id": processor.image_token_id}
    places = [str(tmp_path / "ears"), str(tmp_path / "eyes")]
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [0, 1]}, encoder=places, **ids)
    shake(model).eval().save_pretrained(tmp_path / "adapter")
    names = set(model.adapter_tensors())
    assert {"projector.linear_1.weight", "audio_projector.linear_1.weight"} <= names
    assert model.config.audio_encoder_name_or_path == places[0] and model.config.encoder_name_or_path == places[1]
    given = processor(
        audio=[[tone()]],
        images=[[np.zeros((16, 16, 3), dtype=np.uint8)]],
        text=["<image> <audio>"],
        return_tensors="pt",
    )
    expected = model(**given).logits
    for load in (
        MoExtendForCausalLM.from_pretrained,
        partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True),
    ):
        loaded = load(tmp_path / "adapter")
        assert torch.equal(loaded(**given).logits, expected)
        moved = load(tmp_path / "adapter", base=str(tmp_path / "base"), encoder=places[::-1])  # in any order
        assert torch.equal(moved(**given).logits, expected)
    with pytest.raises(ValueError, match="takes image, which an earlier one takes: give one"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", encoder=[places[1], places[1]])
    make_ears("wav2vec2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="encoder"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", encoder=[places[1], str(tmp_path / "other")])


def test_training_changes_neither_base_nor_encoder():
    processor = make_processor()
    model = hearing(processor=processor).train()
    before = base_tensors_hash(model)
    assert any(".audio_encoder." in name for name in before)
    trained = model.set_trainable("align")
    assert set(trained) == {f"audio_projector.{name}" for name, _ in model.audio_projector.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    given = inputs_of(processor, [tone()])
    model(**given, labels=given["input_ids"]).loss.backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in trained.values())
    optimizer.step()
    assert base_tensors_hash(model) == before and not model.audio_encoder.training


def test_the_file_holds_the_new_tensors_alone_and_fits_nothing_else(tmp_path):
    model, load = hearing(), partial(MoExtendForCausalLM.from_pretrained, tmp_path, base=make_wordy_base())
    model.save_pretrained(tmp_path)
    data, tensors = (tmp_path / FILE).read_bytes(), load_file(tmp_path / FILE)
    assert tensors.keys() == model.adapter_tensors().keys()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + sum(tensor.nbytes for tensor in tensors.values())
    with pytest.raises(ValueError, match="does not say where its audio_encoder lies: pass encoder="):
        load()
    other = make_ears()
    other.conv1.weight.data.neg_()
    other.layers[0].fc1.weight.data.neg_()
    with pytest.raises(ValueError, match="This is a different encoder than the adapter was made on"):
        load(encoder=other)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if "checksum" not in key}
    tensors["audio_projector.linear_3.bias"] = tensors.pop("audio_projector.linear_2.bias")
    tensors["audio_projector.linear_1.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(ValueError) as error:
        load(encoder=make_ears())
    for what in ("missing: audio_projector.linear_2.bias", "unexpected: audio_projector.linear_3.bias"):
        assert what in str(error.value) and "shape: audio_projector.linear_1.bias" in str(error.value)


def test_pickled_ears_are_not_opened(tmp_path):
    make_ears().config.save_pretrained(tmp_path)
    torch.save(make_ears().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        MoExtendForCausalLM.from_base(make_wordy_base(), {1: [0]}, encoder=str(tmp_path))


@pytest.mark.slow
def test_only_adapter_base_and_ears_are_opened(tmp_path):
    make_wordy_base().save_pretrained(tmp_path / "base")
    make_ears().save_pretrained(tmp_path / "encoder")
    places = {"encoder": str(tmp_path / "encoder"), "audio_token_id": 96}
    MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [0]}, **places).save_pretrained(tmp_path / "adapter")
    check_opened(tmp_path)


def test_a_killed_save_leaves_the_old_ears_or_the_new_ones(tmp_path):
    old, new = hearing(), shake(hearing(plan={2: [1]}), seed=5)
    kill_at_every_step(old, new, tmp_path, parts=lambda: {"base": make_wordy_base(), "encoder": make_ears()})


def test_ears_and_eyes_are_published_by_where_each_lies(hub, tmp_path):
    """One of several encoders is known by its config; the advice of the refusal is what helps."""
    processor = make_processor(eyes=True)
    for name, part in (("base", make_wordy_base()), ("ears", make_ears()), ("eyes", make_encoder())):
        part.save_pretrained(tmp_path / name)
        hub.add(f"org/{name}", tmp_path / name)
    ids = {"audio_token_id": processor.audio_token_id, "image_token_id": processor.image_token_id}
    places = [str(tmp_path / "eyes"), str(tmp_path / "ears")]
    model = shake(MoExtendForCausalLM.from_base(BASE, {1: [0]}, encoder=places, **ids)).eval()
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    push = partial(publish_folder, tmp_path / "adapter", REPO)
    for given, missing in (({}, "encoder"), ({"encoder": ["org/eyes"]}, "audio_encoder")):
        with pytest.raises(ValueError, match=f"its {missing} is .* a path on this machine.*--encoder owner/name"):
            push(**given)
    with pytest.raises(ValueError, match="takes audio, which an earlier one takes: give one for each"):
        push(encoder=["org/ears", "org/ears"])
    push(encoder=["org/ears", "org/eyes"])
    loaded = MoExtendForCausalLM.from_pretrained(REPO)
    assert {sense.encoder_name_or_path for sense in loaded.config.senses.values()} == {"org/ears", "org/eyes"}
    given = inputs_of(AutoProcessor.from_pretrained(REPO, trust_remote_code=False), [tone()])
    assert torch.equal(loaded(**given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("audio_encoder", 0.01, "The encoder in memory is no longer the one that was loaded: conv1.bias"),
        ("audio_projector", math.nan, "NaN or infinity in audio_projector.linear_1.bias"),
    ],
)
def test_what_was_not_trained_is_not_saved(part, value, message, tmp_path):
    model = hearing()
    for parameter in getattr(model, part).parameters():
        parameter.data.add_(value)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beside_others_it_is_heard_with_by_the_passes_that_began_with_it(tmp_path):
    """Text is as if it were not loaded; a pass keeps its ears, whatever another thread does meanwhile."""
    processor, text = make_processor(), batch()
    ears = hearing(processor=processor, scope="modality")
    ears.save_pretrained(tmp_path)
    given = inputs_of(processor, [tone()])
    model = shake(MoExtendForCausalLM.from_base(make_wordy_base(), {2: [0]}, scope="all"), seed=4)
    alone = model(**text).logits
    model.load_adapter(tmp_path, adapter_name="ears", encoder=make_ears())
    model.set_adapter(["default", "ears"])
    assert torch.equal(model(**text).logits, alone)
    for change in (partial(model.set_adapter, "default"), partial(model.delete_adapter, "ears")):
        model.set_adapter("ears")
        with InTheMiddle(model, lambda model, made, change=change: change(), None):
            assert torch.equal(model(**given).logits, ears(**given).logits)
        with pytest.raises(ValueError, match="input_features was given, but this model has no encoder"):
            model(**given)
    assert torch.equal(model(**text).logits, alone)


def test_continuous_batching_answers_text_and_refuses_audio():
    model = hearing(scope="modality")
    prompts = [[3, 4, 5], [7, 8, 9, 10]]
    assert in_batches(model, prompts) == one_by_one(model, prompts)
    with pytest.raises(ValueError, match="takes no images or audio: use generate"):
        in_batches(model, [[3, model.config.audio_token_id, 4]])


# ---------------------------------------------------------------- data


def llava_file(folder, **entry):
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes((tone(0.5) * 2**14).astype("<i2").tobytes())
    turns = [{"from": "human", "value": "<audio>\nWhat?"}, {"from": "gpt", "value": "a"}]
    (folder / "data.json").write_text(json.dumps([{"id": "7", "audio": "a.wav", "conversations": turns, **entry}]))
    return folder / "data.json"


def test_llava_with_audio(tmp_path):
    data = load_llava(llava_file(tmp_path))
    assert data[0]["messages"][0]["content"] == [{"type": "audio", "text": None}, {"type": "text", "text": "\nWhat?"}]
    clip = data[0]["audios"][0]
    assert clip["sampling_rate"] == 8000 and len(clip["array"]) == 4000, "two channels became one"
    (streamed,) = load_llava(tmp_path / "data.json", streaming=True)
    assert np.allclose(streamed["audios"][0]["array"], clip["array"]) and data[0]["images"] == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"audio": "b.wav"}, "sample '7' .*audio .*b.wav does not exist"),
        ({"audio": ["a.wav", "a.wav"]}, "its conversation has 1 '<audio>' but it has 2 clips"),
        ({"audio": 3}, "'audio' must be a path or a list of paths, not 3"),
    ],
)
def test_bad_entries_name_file_and_sample(entry, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_llava(llava_file(tmp_path, **entry))


def test_broken_clips_name_file_and_sample(tmp_path):
    llava_file(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="sample '7' .*: audio .*a.wav cannot be read"):
        load_llava(tmp_path / "data.json")[0]
    with pytest.raises(ValueError, match="has no sample to train on"):
        load_llava(tmp_path / "data.json", on_error="skip")
    write_wav(tmp_path / "a.wav", tone(3), RATE)
    (clip,) = load_llava(tmp_path / "data.json")[0]["audios"]
    with pytest.raises(ValueError, match=r"Audio 0, '.*a.wav', is 3.0 seconds long, and the limit is 2"):
        inputs_of(make_processor(), [clip])


def test_audio_columns_go_into_messages():
    clip = {"array": tone(), "sampling_rate": RATE}
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
    (found,) = AudioInMessages(lambda examples: examples)([{"messages": chat, "audio": clip}])
    assert found["messages"][0]["content"][0]["audio"] is clip and found["images"] == []
    with pytest.raises(ValueError, match="Audio is trained on in `messages`"):
        AudioInMessages(lambda examples: examples)([{"prompt": chat[:1], "completion": chat[1:], "audio": clip}])
    apart = [{"role": "user", "content": [{"type": "audio"}, {"type": "audio"}]}]
    with pytest.raises(ValueError, match="Sample 0 of the batch has 1 clips and 2 audio parts"):
        AudioInMessages(lambda examples: examples)([{"messages": apart, "audios": [clip]}])


@pytest.mark.parametrize("streaming", [False, True])
def test_audio_for_what_cannot_hear_is_refused_before_training(streaming, tmp_path):
    model = MoExtendForCausalLM.from_base(make_wordy_base(), {1: [0]})
    data = spoken(tmp_path).to_iterable_dataset() if streaming else spoken(tmp_path)
    with pytest.raises(ValueError, match="The train dataset has a column 'audio', and the processing class takes no"):
        make_trainer(tmp_path / "out", model, build_tokenizer(), data, assistant_only_loss=False)


def spoken(folder, column="audio", silent=()):
    """Four conversations about clips of different length; of some, which are `silent`, about none."""
    parts = [{"type": "audio", "text": None}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a word"}]}
    chats = [[{"role": "user", "content": parts[number in silent :]}, answer] for number in range(4)]
    paths = [write_wav(folder / f"{number}.wav", tone(0.2 + number / 10, number), 8000) for number in range(4)]
    paths = [None if number in silent else path for number, path in enumerate(paths)]
    return Dataset.from_dict({"messages": chats, column: paths if column == "audio" else [[path] for path in paths]})


def make_trainer(folder, model, processor, data, **changes):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options |= {"assistant_only_loss": True, "max_length": None, "gradient_checkpointing": False, **changes}
    args = MoExtendSFTConfig(str(folder), **options)
    return MoExtendSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)


@pytest.mark.parametrize("column", ["audio", "audios"])
def test_a_trainer_takes_audio_columns(column, tmp_path):
    """Clips of a dataset reach the encoder, and only the projector moves in stage align."""
    processor = make_processor()
    model = hearing(processor=processor, scope="modality")
    before, start = base_tensors_hash(model), copy.deepcopy(model.get_adapter_state_dict())
    trainer = make_trainer(tmp_path / "out", model, processor, spoken(tmp_path, column), stage="align")
    batch_ = next(iter(trainer.get_train_dataloader()))
    assert batch_["input_features"].shape[0] == 2
    assert not (batch_["labels"] == processor.audio_token_id).any() and (batch_["labels"] >= 0).any()
    trainer.train()
    moved = {name for name, tensor in model.get_adapter_state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved and all(name.startswith("audio_projector.") for name in moved)
    assert base_tensors_hash(model) == before


def test_a_resumed_run_with_audio_is_the_run_that_never_stopped(tmp_path):
    """From a checkpoint by its name, and from the last whole one where a later one is cut off."""
    processor, data, states = make_processor(), spoken(tmp_path), []
    for folder, resumed in (("run", None), ("again", str(tmp_path / "run/checkpoint-1")), ("run", True)):
        model = hearing(processor=processor, scope="modality")
        saving = {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path / folder, model, processor, data, **saving)
        if resumed is True:
            os.truncate(tmp_path / "run/checkpoint-2" / FILE, 1000)
        trainer.train(resume_from_checkpoint=resumed)
        states.append({name: tensor.clone() for name, tensor in model.get_adapter_state_dict().items()})
    start = hearing(processor=processor, scope="modality").get_adapter_state_dict()
    moved = [name for name in start if not torch.equal(start[name], states[0][name])]
    assert any(name.startswith("audio_projector.") for name in moved)
    assert all(torch.equal(states[0][name], other[name]) for name in states[0] for other in states[1:])


@pytest.mark.slow
def test_commands_of_an_adapter_that_hears(tmp_path, capsys):
    """Trained with a gate by a recipe, then inspected, verified, measured, and listed for publishing."""
    data = []
    for number in range(12):
        write_wav(tmp_path / f"{number}.wav", tone(0.4, number), 22050)
        turns = [{"from": "human", "value": "<audio>\nWhat?"}, {"from": "gpt", "value": str(number)}]
        data.append({"id": str(number), "audio": f"{number}.wav", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(data))
    text = [json.dumps({"domain": "words", "text": f"Words of a text, number {n}."}) for n in range(4)]
    (tmp_path / "text.jsonl").write_text("\n".join(text))
    adapter, data = tmp_path / "out", tmp_path / "data.json"

    def run(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    options = {"data": data, "align_data": data, "retention_data": tmp_path / "text.jsonl", "scope": "gate"}
    options |= {"output_dir": adapter, "max_steps": 1, "align_max_steps": 1, "probe_max_steps": 1, "gate_steps": 100}
    run("train", "--config", "spoken_words", *(word for pair in options.items() for word in (f"--{pair[0]}", pair[1])))
    found = run("inspect", adapter)
    assert found["scope"] == "gate" and found["audio_encoder"]["model_type"] == "whisper"
    assert run("verify", adapter, "--audio", tmp_path / "0.wav")["ok"]
    measured = run(
        "evaluate", adapter, "--text", tmp_path / "text.jsonl", "--questions", data, "--output", tmp_path / "report"
    )
    assert measured["results"][0]["measure"] == "exact match, 12 questions"
    files = run("push", adapter, "me/ears", "--base", "me/base", "--encoder", "me/ears", "--dry-run")["files"]
    assert {FILE, "processor_config.json", "processing_moextend.py"} <= set(files)


def test_a_standalone_checkpoint_hears(tmp_path):
    """With encoders of both senses in it, and none of the folders that it was made of."""
    processor = make_processor(eyes=True)
    parts = {"base": make_wordy_base(), "ears": make_ears("whisper"), "eyes": make_encoder()}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    ids = {"audio_token_id": processor.audio_token_id, "image_token_id": processor.image_token_id}
    places = [str(tmp_path / "ears"), str(tmp_path / "eyes")]
    model = shake(MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [0]}, encoder=places, **ids)).eval()
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    for name in (*parts, "adapter"):
        shutil.rmtree(tmp_path / name)
    given = inputs_of(processor, [tone()], [tone(0.3, 2)])
    clip = write_wav(tmp_path / "a.wav", tone(), 8000)
    assert verify_adapter(tmp_path / "merged", audio=clip)["ok"]
    assert inspect_adapter(tmp_path / "merged")["audio_encoder"]["model_type"] == "whisper"
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert set(loaded.senses) == {"image", "audio"}
    assert torch.equal(loaded(**given).logits, model(**given).logits)
