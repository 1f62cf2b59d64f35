"""docs/troubleshooting.md: every error that it quotes, made to happen, in the words that it quotes."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, make_base, make_encoder
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from modeling_moextend import MoExtendForCausalLM, MoExtendSFTConfig, MoExtendSFTTrainer, RouterShift, load_llava

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


def extended(plan=None, base=None, **options):
    return MoExtendForCausalLM.from_base(base or make_base(), plan or {1: [0]}, **{"scope": "all", **options})


def seeing():
    options = {"scope": None, "encoder": make_encoder(), "image_token_id": 5}
    return extended(**options)


def dense(folder, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    extended(base=LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))


def layer(folder, monkeypatch):
    extended({99: [0]})


def source(folder, monkeypatch):
    extended({1: [99]})


def no_encoder(folder, monkeypatch):
    extended(scope="modality")


def exclusive_calibrated(folder, monkeypatch):
    extended(selection="exclusive", calibration="all")


def peft_base(folder, monkeypatch):
    extended(base=get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])))


def saved(folder):
    """An adapter in `folder`, whose base lies in `folder`/base."""
    make_base().save_pretrained(folder / "base")
    extended(base=str(folder / "base")).save_pretrained(folder / "adapter")
    return folder / "adapter"


def untrusted(folder, monkeypatch):
    """As in a process that has not imported the package, whose classes Auto classes would find."""
    for auto in ("configuration_auto", "modeling_auto"):
        module = sys.modules[f"transformers.models.auto.{auto}"]
        for mapping in [value for value in vars(module).values() if hasattr(value, "_extra_content")]:
            kept = {key: value for key, value in mapping._extra_content.items() if "oextend" not in str(key).lower()}
            monkeypatch.setattr(mapping, "_extra_content", kept)
    AutoModelForCausalLM.from_pretrained(saved(folder))


def not_an_adapter(folder, monkeypatch):
    saved(folder)
    MoExtendForCausalLM.from_pretrained(folder / "base")


def moved_base(folder, monkeypatch):
    adapter = saved(folder)
    shutil.move(folder / "base", folder / "elsewhere")
    MoExtendForCausalLM.from_pretrained(adapter)


def other_base(folder, monkeypatch):
    adapter = saved(folder)
    torch.manual_seed(9)
    MixtralForCausalLM(make_base().config).save_pretrained(folder / "other")
    MoExtendForCausalLM.from_pretrained(adapter, base=str(folder / "other"))


def truncated(folder, monkeypatch):
    adapter = saved(folder)
    file = adapter / "moextend_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    MoExtendForCausalLM.from_pretrained(adapter)


def name_twice(folder, monkeypatch):
    adapter = saved(folder)
    MoExtendForCausalLM.from_pretrained(adapter).load_adapter(adapter, adapter_name="default")


def unlike(folder, monkeypatch):
    model = extended(selection="exclusive")
    model.add_adapter("b", extended_layers={1: [0]}, scope="all", selection="compete", calibration="none")
    model.set_adapter(["default", "b"])


def image_tokens(folder, monkeypatch):
    seeing()(input_ids=torch.tensor([[5, 7, 8]]), pixel_values=torch.zeros(1, 3, 16, 16))


def images_while_off(folder, monkeypatch):
    model = seeing()
    with model.disable_adapter():
        model(**batch(), pixel_values=torch.zeros(1, 3, 16, 16))


def llava(folder, **more):
    turns = [{"from": "human", "value": "<image>\nq" if "image" in more else "q"}, {"from": "gpt", "value": "a"}]
    (folder / "data.json").write_text(json.dumps([{"id": "a", "conversations": turns, **more}]))
    load_llava(folder / "data.json")


def missing_image(folder, monkeypatch):
    llava(folder, image="x.png")


def unread_key(folder, monkeypatch):
    llava(folder, tools=["x"])


def arguments(folder, **more):
    return MoExtendSFTConfig(str(folder / "out"), use_cpu=True, bf16=False, report_to="none", **more)


def plain_model(folder, monkeypatch):
    MoExtendSFTTrainer(make_base(), arguments(folder), train_dataset=Dataset.from_list([{"text": "a"}]))


def no_markers(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-moe")
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = Dataset.from_list([{"messages": chat}])
    options = arguments(folder, assistant_only_loss=True)
    MoExtendSFTTrainer(extended(), options, train_dataset=data, processing_class=tokenizer)


def processes(folder, monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("the error of a machine without accelerators")
    monkeypatch.setenv("WORLD_SIZE", "2")
    MoExtendSFTConfig(str(folder / "out"), bf16=False)


def not_finite(folder, monkeypatch):
    model = extended()
    next(iter(model.adapter_tensors().values())).data[0] = float("nan")
    model.save_pretrained(folder / "adapter")


def changed_base(folder, monkeypatch):
    model = extended()
    next(model.base.parameters()).data.add_(1)
    model.save_pretrained(folder / "adapter")


def unpublished_base(folder, monkeypatch):
    MoExtendForCausalLM.from_pretrained(saved(folder)).push_to_hub("me/adapter")


def no_matplotlib(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    RouterShift([1, 2], [[1, 2], [2, 1]], [[2, 1], [1, 2]]).plot(folder / "shift.png")


CASES = (  # in the order of the page
    *(dense, layer, source, no_encoder, exclusive_calibrated, peft_base),
    *(untrusted, not_an_adapter, moved_base, other_base, truncated, name_twice, unlike),
    *(image_tokens, images_while_off, missing_image, unread_key),
    *(plain_model, no_markers, processes, not_finite, changed_base, unpublished_base, no_matplotlib),
)


def as_pattern(quoted):
    """The quoted text with `...` for anything, whatever its white space."""
    words = re.sub(r"\s+", " ", quoted)
    return re.escape(words).replace(r"\.\.\.", ".*")


def test_the_page_quotes_twenty_errors_and_each_has_a_case():
    assert len(QUOTED) == len(CASES) >= 20


@pytest.mark.parametrize(
    ("quoted", "case"), list(zip(QUOTED, CASES, strict=False)), ids=[case.__name__ for case in CASES[: len(QUOTED)]]
)
def test_the_error_reads_as_the_page_says(quoted, case, tmp_path, monkeypatch):
    with pytest.raises(Exception) as raised:
        case(tmp_path, monkeypatch)
    said = re.sub(r"\s+", " ", str(raised.value))
    assert re.search(as_pattern(quoted), said), said
