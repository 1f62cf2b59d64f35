"""MoExtendProcessor: image tokens, counts, chat templates, assistant masks, saving and loading."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AddedToken,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from trl.chat_template_utils import is_chat_template_stop_token_trained, qwen3_chat_template

from modeling_moextend.data.llava import load_llava
from modeling_moextend.data.processors import default_chat_template, load_processor, with_image_parts
from modeling_moextend.evaluation.compare import encode
from modeling_moextend.processing_moextend import MoExtendProcessor, to_rgb

# The instruct format of a base that knows text only.
TEXT_ONLY = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog"}]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def build_tokenizer(chat_template=None, **kwargs):
    """One token a character, but " a" is one token: 3 special tokens, 256 bytes, 1 merge, so 260 in all."""
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special, **kwargs)


def build_processor(chat_template=None, image_token="<image>"):
    """4 image tokens an image: 32 pixels, patches of 16."""
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return MoExtendProcessor.from_encoder(
        build_tokenizer(),
        CLIPImageProcessorPil(**size),
        CLIPVisionConfig(image_size=32, patch_size=16),
        image_token=image_token,
        chat_template=chat_template,
    )


def picture(color=RED):
    return Image.new("RGB", (40, 50), color)


def channels(pixel_values):
    """Which channel is the brightest, image by image."""
    return pixel_values.mean(dim=(2, 3)).argmax(dim=1).tolist()


def conversation(text, answer, image=None):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image, "text": None})  # as TRL hands it on from an Arrow table
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


# Image tokens


@pytest.mark.parametrize(
    "config, select_feature, expected",
    [
        (CLIPVisionConfig(image_size=336, patch_size=14), "patch", 576),  # LLaVA-1.5: 24 x 24
        (CLIPVisionConfig(image_size=336, patch_size=14), "full", 577),
        (SiglipVisionConfig(image_size=32, patch_size=16), "full", 4),  # has no class token
        (CLIPConfig(vision_config={"image_size": 30, "patch_size": 16}), "patch", 1),  # the rest is cut off
    ],
)
def test_features_of_an_image(config, select_feature, expected):
    size = getattr(config, "vision_config", config).image_size
    image_processor = CLIPImageProcessorPil(crop_size={"height": size, "width": size})
    processor = MoExtendProcessor.from_encoder(
        build_tokenizer(), image_processor, config, select_feature=select_feature
    )
    assert processor.num_image_tokens == expected


def test_unknown_select_feature_is_refused():
    with pytest.raises(ValueError, match="select_feature='cls' must be one of 'patch', 'full'"):
        MoExtendProcessor.from_encoder(
            build_tokenizer(), CLIPImageProcessorPil(), CLIPVisionConfig(), select_feature="cls"
        )


def test_image_token_is_added_once_behind_the_vocabulary():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 260
    first = MoExtendProcessor(CLIPImageProcessorPil(), tokenizer, num_image_tokens=4)
    again = MoExtendProcessor(CLIPImageProcessorPil(), tokenizer, num_image_tokens=4)
    assert (first.image_token_id, again.image_token_id, len(tokenizer)) == (260, 260, 261)
    assert tokenizer("a<image>b")["input_ids"][1] == 260
    assert tokenizer.decode([260], skip_special_tokens=True) == ""


def test_a_tokenizers_own_image_token_is_kept():
    tokenizer = build_tokenizer(extra_special_tokens=[AddedToken("<pic>", lstrip=True)])
    processor = MoExtendProcessor(CLIPImageProcessorPil(), tokenizer, image_token="<pic>", num_image_tokens=2)
    assert (processor.image_token_id, len(tokenizer)) == (260, 261)
    assert processor.apply_chat_template(conversation("Hi", "Yo", picture())) == ("<s>USER: <pic>Hi ASSISTANT: Yo</s>")
    assert processor(images=picture(), text="  <pic>")["input_ids"] == [[260, 260]]  # lstrip is kept, too


@pytest.mark.parametrize("number", [None, 0, "4", 2**16 + 1, 10**12])
def test_number_of_image_tokens_is_needed(number):
    with pytest.raises(ValueError, match=f"num_image_tokens={number!r} must be the number of features.*from_encoder"):
        MoExtendProcessor(CLIPImageProcessorPil(), build_tokenizer(), num_image_tokens=number)


def test_image_processor_of_another_size_is_refused():
    with pytest.raises(ValueError, match="makes images of 224x224 pixels, the encoder takes 336x336"):
        MoExtendProcessor.from_encoder(
            build_tokenizer(), CLIPImageProcessorPil(), CLIPVisionConfig(image_size=336, patch_size=14)
        )


# Calls


def test_each_placeholder_becomes_the_images_tokens():
    processor = build_processor()
    images = [[picture(RED)], [], [picture(GREEN), picture(BLUE)]]
    batch = processor(images=images, text=["x<image>y", "z", "<image><image>"], padding=True, return_tensors="pt")
    x, y, z = processor.tokenizer.convert_tokens_to_ids(["x", "y", "z"])
    assert batch["input_ids"].tolist() == [
        [x, 260, 260, 260, 260, y, 0, 0],
        [z, 0, 0, 0, 0, 0, 0, 0],
        [260] * 8,
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 1, 8]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert channels(batch["pixel_values"]) == [0, 1, 2]
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize(
    "images, text",
    [
        (picture(GREEN), "<image>"),
        ([picture(GREEN)], ["<image>"]),
        ([[picture(GREEN)]], ["<image>"]),
        (np.asarray(picture(GREEN)), "<image>"),
        (torch.tensor(np.asarray(picture(GREEN))).permute(2, 0, 1), "<image>"),
        ([[], [picture(GREEN)]], ["x", "<image>"]),
        ([picture(GREEN)], ["x", "<image>"]),  # flat: in reading order of the whole batch
    ],
)
def test_every_form_of_images(images, text):
    batch = build_processor()(images=images, text=text, padding=True, return_tensors="pt")
    assert channels(batch["pixel_values"]) == [1]
    assert (batch["input_ids"][-1] == 260).sum() == 4


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_without_images_there_are_no_pixel_values(images):
    batch = build_processor()(images=images, text=["x", "yz"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}


def test_token_type_ids_are_left_out():
    tokenizer = build_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    assert "token_type_ids" in tokenizer("x")
    processor = MoExtendProcessor(CLIPImageProcessorPil(), tokenizer, num_image_tokens=4)
    assert set(processor(text="x")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "images, text, message",
    [
        ([[picture()], []], ["<image>", "<image>"], "Sample 1 has 0 images but 1 '<image>' in its text"),
        # the totals agree, but each image would land in the other's sample
        ([[picture()], [picture()]], ["<image><image>", "x"], "Sample 0 has 1 images but 2 '<image>'"),
        (None, ["x", "<image>"], "0 images were given, but text has 1 '<image>' in all"),
        ([picture()], ["x", "y"], "1 images were given, but text has 0 '<image>' in all"),
        ([[picture()]], ["<image>", "x"], "images holds 1 lists, but text has 2 samples"),
    ],
)
def test_images_and_placeholders_must_agree(images, text, message):
    with pytest.raises(ValueError, match=message):
        build_processor()(images=images, text=text)


def test_truncation_never_cuts_image_tokens_silently():
    processor = build_processor()
    batch = processor(images=picture(), text="<image>xyz", truncation=True, max_length=5)
    assert batch["input_ids"] == [[260] * 4 + processor.tokenizer.convert_tokens_to_ids(["x"])]
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count.*ids=\[3\] and text=\[4\].*max_length"):
        processor(images=picture(), text="<image>xyz", truncation=True, max_length=3)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("LA", (2, 2), (9, 0)), (9, 9, 9)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (picture(BLUE).convert("P"), BLUE),
        (Image.fromarray(np.full((2, 2), 0x4000, dtype=np.uint16)), (64, 64, 64)),  # of 65,536: a quarter of white
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_any_mode_becomes_rgb(image, expected):
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).getpixel((0, 0)) == expected
    batch = build_processor()(images=[[image]], text=["<image>"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_a_palette_with_alpha_is_converted_without_a_warning():
    image = picture(BLUE).convert("P")
    image.info["transparency"] = bytes(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(image).getpixel((0, 0)) == BLUE


# What is stored -> what is seen, by the EXIF orientation: a camera held otherwise stores the picture turned.
SEEN = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}
QUARTERS = np.kron(np.array([[RED, GREEN], [BLUE, (255, 255, 255)]], dtype=np.uint8), np.ones((16, 24, 1), np.uint8))


def photo(folder, orientation, kind="PNG", exif=None, pixels=QUARTERS):
    """A file that shows `pixels` turned by its EXIF, and the image that people see."""
    if exif is None:
        exif = Image.Exif()
        exif[0x0112] = orientation
    path = folder / f"photo.{kind.lower()}"
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    Image.fromarray(pixels).save(path, kind, exif=exif, **lossless)
    return path, SEEN[orientation](pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", SEEN)
def test_photos_are_seen_upright_by_every_way_in(tmp_path, orientation, kind):
    path, upright = photo(tmp_path, orientation, kind)
    processor = build_processor()
    (tmp_path / "data.json").write_text(
        json.dumps(
            [
                {
                    "image": path.name,
                    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
                }
            ]
        )
    )
    [llava] = load_llava(tmp_path / "data.json")[0]["images"]
    [streamed] = next(iter(load_llava(tmp_path / "data.json", streaming=True)))["images"]
    column = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    text = base64.b64encode(path.read_bytes()).decode()
    images = {
        "opened": Image.open(path),
        "converted": Image.open(path).convert("RGBA"),
        "file": path,
        "name": str(path),
        "base64": text,
        "data URL": f"data:image/png;base64,{text}",
        "LLaVA": llava,
        "LLaVA, streamed": streamed,
        "datasets": column[0]["image"],
        "twice": to_rgb(to_rgb(path)),
    }
    expected = processor(images=Image.fromarray(np.ascontiguousarray(upright)), text="<image>", return_tensors="pt")
    close = {"atol": 0.1 if kind == "JPEG" else 0, "rtol": 0}  # what JPEG loses differs, turned or not
    for way, image in images.items():
        for given in (image, [image], [[image]]):
            batch = processor(images=given, text=["<image>"], return_tensors="pt")
            torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], **close, msg=way)
        batch = encode(processor, ["<image>"], [[image]])
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], **close, msg=way)
    for key, image in [("path", str(path)), ("url", str(path)), ("base64", text), ("image", Image.open(path))]:
        chat = [{"role": "user", "content": [{"type": "image", key: image}, {"type": "text", "text": "What?"}]}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = processor.apply_chat_template(chat, **options)
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], **close, msg=key)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL says what is damaged
def test_damaged_exif_turns_nothing_or_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9000: b"0230"}
    whole, rng = bytearray(exif.tobytes()), np.random.default_rng(0)
    turned = 0
    for number in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=number % 3 + 1):
            damaged[place] = rng.integers(256)
        path, _ = photo(tmp_path, 1, "PNG", exif=bytes(damaged))
        seen = to_rgb(path)
        assert any(np.array_equal(seen, look(QUARTERS)) for look in SEEN.values())
        assert np.array_equal(seen, to_rgb(seen)) and np.array_equal(seen, to_rgb(Image.open(path)))
        turned += seen.size != (48, 32)
    assert 30 < turned < 170  # both kinds were among them


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_by_every_way_in(tmp_path, kind):
    pixels = np.arange(4 * 6, dtype=np.uint16).reshape(4, 6) * 256
    path, _ = photo(tmp_path, 6, kind, pixels=pixels)
    expected = np.repeat(np.rot90(pixels // 256, -1)[:, :, None], 3, axis=2)
    for image in (path, str(path), Image.open(io.BytesIO(path.read_bytes()))):
        assert np.array_equal(to_rgb(image), expected)
    text, batch = "<image>", build_processor()(images=str(path), text="<image>")
    upright = build_processor()(images=Image.fromarray(expected.astype(np.uint8)), text=text)
    assert np.array_equal(batch["pixel_values"], upright["pixel_values"])


def test_given_images_stay_as_they_are(tmp_path):
    image = Image.open(photo(tmp_path, 6)[0])
    image.load()
    before = image.tobytes(), image.size, dict(image.info)
    to_rgb(image)
    assert before == (image.tobytes(), image.size, image.info)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}' has no fixed range of values"):
        to_rgb(Image.new(mode, (2, 2)))


# Chat templates


def test_default_template():
    processor = build_processor()
    messages = [{"role": "system", "content": "Be kind."}, *conversation("\nWhat?", "A dog", picture())]
    assert processor.apply_chat_template(messages) == "<s>Be kind. USER: <image>\nWhat? ASSISTANT: A dog</s>"
    prompt = processor.apply_chat_template(messages[1:2], add_generation_prompt=True)
    assert prompt == "<s>USER: <image>\nWhat? ASSISTANT:"
    assert is_chat_template_stop_token_trained(processor)


def test_default_template_names_what_it_does_not_know():
    with pytest.raises(Exception, match="Unknown content type: video"):
        build_processor().apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(Exception, match="Unknown role: tool"):
        build_processor().apply_chat_template([{"role": "tool", "content": "4"}])


def test_a_template_that_takes_images_is_kept():
    own = with_image_parts(TEXT_ONLY)
    processor = MoExtendProcessor(CLIPImageProcessorPil(), build_tokenizer(chat_template=own), num_image_tokens=4)
    assert processor.chat_template == own


@pytest.mark.parametrize(
    "template, problem",
    [
        (TEXT_ONLY, "it never writes it"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{# <image> #}", "it never writes it"),
        ("{% for m in messages %}<image>", "TemplateSyntaxError: "),
        ("{{ " + "(" * 100_000 + "'<image>'", "RecursionError: "),
    ],
    ids=["text only", "in a comment", "syntax", "deep"],
)
def test_a_template_without_images_is_refused_with_the_ways_out(template, problem):
    message = f"cannot render a message with an image as '<image>': {problem}.*with_image_parts.*default_chat_template"
    with pytest.raises(ValueError, match=message):
        build_processor(template)


@pytest.mark.parametrize(
    "template",
    [
        "<image>{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ '<image>' }}{{ messages[0]['role'] * 10**10 }}",
        "{{ '<image>' }}{{ '%9999999999s' | format('x') }}{{ 'x' * 10**10 }}",  # a compiler would work it out at once
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}<image>{{ m() }}",
        "{% generation %}{{ '<image>' ~ 10**10**10 }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}<image>{% endfor %}",
    ],
)
def test_a_template_is_never_run_when_a_processor_is_built_or_loaded(template, tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("it was run")

    for name in ("render", "generate", "from_code"):
        monkeypatch.setattr(f"jinja2.Template.{name}", run)
    monkeypatch.setattr("jinja2.Environment.compile", run)
    processor = build_processor(template)
    processor.save_pretrained(tmp_path)
    assert MoExtendProcessor.from_pretrained(tmp_path).chat_template == template


def test_with_image_parts_keeps_the_bases_format():
    processor = build_processor(chat_template=with_image_parts("\n" + TEXT_ONLY))
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rendered = processor.apply_chat_template(text)
    assert rendered == processor.tokenizer.apply_chat_template(text, chat_template="\n" + TEXT_ONLY, tokenize=False)
    messages = conversation("\nWhat?", "A dog", picture())
    assert processor.apply_chat_template(messages) == "\n<s>[INST] <image>\nWhat? [/INST]A dog</s>"


# Assistant masks


def masked_text(processor, batch):
    """The text of the tokens marked as the assistant's, sample by sample."""
    masks = batch["assistant_masks"].bool()
    return [processor.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], masks, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_assistant_mask_is_right_behind_expanded_images(side):
    processor = build_processor()
    several = conversation("What?", "a dog", picture()) + conversation("And", "a", picture())
    batch = processor.apply_chat_template(
        [several, conversation("Hi", "Yo"), conversation("Hey", "b", picture())],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side, "add_special_tokens": False},
    )
    assert masked_text(processor, batch) == [" a dog</s> a</s>", " Yo</s>", " b</s>"]
    # "Ġa", " ", "d", "o", "g", "</s>" and "Ġa", "</s>"; one token a character otherwise
    assert batch["assistant_masks"].sum(dim=1).tolist() == [6 + 2, 4, 3]
    assert (batch["input_ids"] == 260).sum(dim=1).tolist() == [8, 0, 4]
    assert batch["pixel_values"].shape[0] == 3


def saved_base(folder, chat_template):
    build_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "template", [None, TEXT_ONLY, {"default": TEXT_ONLY, "other": "x"}], ids=["none", "one", "two"]
)
def test_a_text_only_base_gets_a_template_that_marks_the_assistant(tmp_path, template, caplog):
    base = saved_base(tmp_path, template)
    tokenizer = load_processor(base, assistant_only_loss=True)
    batch = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    marked = [number for number, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == " A dog</s>"
    assert ("does not mark the assistant's text" in caplog.text) == (template is not None)
    assert load_processor(base).chat_template == template  # the base's own stays where nothing has to be marked


def test_no_template_is_run_to_see_whether_it_can_be_marked(tmp_path, monkeypatch):
    base = saved_base(tmp_path, "{% if tools %}{% endif %}{{ messages }}<image>")
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", lambda *args, **kwargs: pytest.fail("it ran"))
    assert load_processor(base, assistant_only_loss=True).chat_template == default_chat_template()


@pytest.mark.parametrize("template", [default_chat_template(), qwen3_chat_template], ids=["marked", "TRL's"])
def test_a_template_that_can_be_marked_stays(tmp_path, template):
    assert load_processor(saved_base(tmp_path, template), assistant_only_loss=True).chat_template == template


def test_assistant_mask_with_truncation():
    processor = build_processor()
    batch = processor.apply_chat_template(
        [conversation("What?", "a dog", picture())],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        # <s>, "USER:", " ", 4 of the image, "What?", " ", "ASSISTANT:" make 1 + 5 + 1 + 4 + 5 + 1 + 9 + 1 = 27
        processor_kwargs={"truncation": True, "max_length": 27 + 4, "add_special_tokens": False},
    )
    assert masked_text(processor, batch) == [" a do"]


# Saving and loading

FRESH = """
import sys
sys.modules["modeling_moextend"] = None  # even where the package is installed
from PIL import Image
from transformers import AutoProcessor
folder, again = sys.argv[1:]
try:
    AutoProcessor.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("code ran without trust_remote_code")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
batch = processor(images=Image.new("RGB", (40, 50), (255, 0, 0)), text="x<image>")
print(batch["input_ids"], processor.image_token_id, batch["pixel_values"][0].shape)
processor.save_pretrained(again)
"""


@pytest.mark.slow
def test_loads_in_a_process_without_the_package(tmp_path):
    folder, again = tmp_path / "adapter", tmp_path / "again"
    processor = build_processor()
    processor.save_pretrained(folder)
    assert (folder / "processing_moextend.py").exists()
    assert json.loads((folder / "processor_config.json").read_text())["auto_map"] == {
        "AutoProcessor": "processing_moextend.MoExtendProcessor"
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", FRESH, str(folder), str(again)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (x,) = processor.tokenizer.convert_tokens_to_ids(["x"])
    assert run.stdout.strip() == f"[[{x}, 260, 260, 260, 260]] 260 (3, 32, 32)"
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert (again / "processor_config.json").read_text() == (folder / "processor_config.json").read_text()


def test_pixels_are_the_same_wherever_torchvision_is_installed():
    """transformers takes torchvision's image processor where it can, which resizes to other pixels than PIL's."""
    by_torchvision = {"backend": property(lambda self: "torchvision")}
    settings = build_processor().image_processor.to_dict() | {"image_mean": [0.1, 0.2, 0.3]}
    installed = type("CLIPImageProcessor", (CLIPImageProcessorPil,), by_torchvision)(**settings)
    found = MoExtendProcessor(installed, build_tokenizer(), num_image_tokens=4).image_processor
    assert type(found) is CLIPImageProcessorPil and found.to_dict() == installed.to_dict()
    other = type("OwnImageProcessor", (CLIPImageProcessorPil,), by_torchvision)(**settings)  # has no like by PIL
    assert MoExtendProcessor(other, build_tokenizer(), num_image_tokens=4).image_processor is other


def test_loads_as_it_was_saved(tmp_path):
    processor = build_processor(chat_template=default_chat_template() + "{# my own #}")
    processor.save_pretrained(tmp_path)
    loaded = MoExtendProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template
    assert (loaded.image_token, loaded.image_token_id, loaded.num_image_tokens) == ("<image>", 260, 4)
    assert len(loaded.tokenizer) == 261
    given = {"images": [[picture(BLUE)]], "text": ["x<image>"], "return_tensors": "pt"}
    before, after = processor(**given), loaded(**given)
    assert all(torch.equal(before[key], after[key]) for key in before)


# A stranger's folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Name -> bytes of every file of a saved processor."""
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoiled(stored, folder, name, content):
    """The folder with other `content` in one file; a `dict`: entries in the JSON that is there."""
    for file, data in stored.items():
        (folder / file).write_bytes(data)
    if isinstance(content, dict):
        content = json.dumps(json.loads(stored[name]) | content).encode()
    (folder / name).write_bytes(content)
    return folder


DAMAGE = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
ENTRIES = [
    ("processor_config.json", {"num_image_tokens": "4"}),
    ("processor_config.json", {"num_image_tokens": 10**9}),
    ("processor_config.json", {"image_token": 3}),
    ("processor_config.json", {"image_token": ""}),
    ("processor_config.json", {"chat_template": [3]}),
    ("processor_config.json", {"image_processor": 3}),
    ("processor_config.json", {"image_processor": {"image_processor_type": ["CLIPImageProcessorPil"]}}),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel"}}),
    ("audio_tokenizer_config.json", b'{"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "/x"}'),
    ("tokenizer_config.json", {"tokenizer_class": 3}),
    ("tokenizer_config.json", {"auto_map": 3}),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ("tokenizer_config.json", {"bos_token": {"content": 3}}),
    ("tokenizer.json", {"model": {"type": "BPE"}}),
    ("tokenizer.json", {"added_tokens": 3}),
]
DAMAGED = [(name, content) for name in ("processor_config.json", "tokenizer_config.json") for content in DAMAGE]
DAMAGED += [("tokenizer.json", content) for content in DAMAGE] + ENTRIES


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_folder_is_one_clear_error(name, content, stored, tmp_path):
    folder = spoiled(stored, tmp_path, name, content)
    for load in (MoExtendProcessor.from_pretrained, load_processor):
        with pytest.raises(
            (ValueError, OSError), match=f"^The processor of {folder} can't be loaded: save or fetch"
        ) as e:
            load(folder)
        assert type(e.value) in (ValueError, OSError) and str(e.value).isprintable()


def test_merges_that_would_end_the_process_are_one_clear_error(tmp_path):
    folder = shutil.copytree(Path(__file__).parents[1] / "assets" / "tiny-moe", tmp_path / "base")
    values = json.loads((folder / "tokenizer.json").read_text())
    for prefix in ("", "\0"):
        values["model"]["continuing_subword_prefix"] = prefix
        (folder / "tokenizer.json").write_text(json.dumps(values))
        if not prefix:
            load_processor(folder)
    with pytest.raises(ValueError, match="merges without its continuing_subword_prefix"):
        load_processor(folder)
    with pytest.raises(OSError, match=f"^{folder} holds a tokenizer and no processor, .* AutoTokenizer loads it"):
        MoExtendProcessor.from_pretrained(folder)
    (folder / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merges without its continuing_subword_prefix"):
        MoExtendProcessor.from_pretrained(folder)


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_tokenizer_or_image_processor_is_one_clear_error(content, stored, tmp_path):
    folder = spoiled(stored, tmp_path, "tokenizer.json", content)
    (folder / "processor_config.json").unlink()
    with pytest.raises((ValueError, OSError), match=f"^The tokenizer of {folder} can't be loaded: save or fetch"):
        load_processor(folder)
    (folder / "tokenizer.json").write_bytes(stored["tokenizer.json"])
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(
        (ValueError, OSError), match=f"^The image processor of {folder} can't be loaded: save or fetch"
    ):
        load_processor(folder, encoder=folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"]
)
def test_links_out_of_the_folder_are_not_followed(name, stored, tmp_path):
    (tmp_path / "inside").mkdir()
    folder = spoiled(stored, tmp_path / "inside", name, stored[name])
    (folder / "same").write_bytes(stored[name])
    (tmp_path / "outside").write_bytes(stored[name])
    (folder / name).unlink()
    (folder / name).symlink_to("same")
    MoExtendProcessor.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("../outside")
    message = f"The processor of {folder} can't be loaded.*{name} is a link to .*outside, outside the adapter's folder"
    with pytest.raises(ValueError, match=message):
        MoExtendProcessor.from_pretrained(folder)
