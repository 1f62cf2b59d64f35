"""The comparison with the base, answers and thresholds, against the same done one by one."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import PAPER, make_base, make_encoder, shake
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor
from modeling_moextend.data.files import read_documents, read_questions
from modeling_moextend.evaluation.compare import (
    answer,
    base_retention,
    compare_with_base,
    expert_use,
    routing_of,
    score,
    threshold_curve,
)
from modeling_moextend.routing_moextend import RoutingRecord

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "USER:", "ASSISTANT:"]
TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
PLAN = {1: [0], 2: [3, 1]}
TEXTS = ["a b c d e f g", "h i", "j k l m n o p q r s t", "u v w x"]
DOCUMENTS = [{"domain": "xy"[i % 2], "text": text} for i, text in enumerate(TEXTS)]
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]


def make_tokenizer():
    words = WORDS + [f"w{i}" for i in range(96 - len(WORDS))]  # a word for every row of the base's embedding
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)


def make_model(family="mixtral", plan=PLAN, **choices):
    torch.manual_seed(7)
    return shake(MoExtendForCausalLM.from_base(make_base(family), plan, **{**PAPER, **choices})).eval()


def compare(model, documents=DOCUMENTS, **options):
    options = {"batch_size": 2, "progress": False, **options}
    return compare_with_base(model, make_tokenizer(), documents, **options)


# ---------------------------------------------------------------- compare_with_base


@pytest.mark.parametrize("choices", [{}, {"calibration": "none", "selection": "exclusive"}])
def test_rows_are_what_each_document_alone_gives(choices):
    model, tokenizer = make_model(**choices), make_tokenizer()
    for document, row in zip(DOCUMENTS, compare(model), strict=True):
        ids = tokenizer(document["text"], return_tensors="pt").input_ids
        with torch.no_grad(), model.record_routing() as records:
            logits = model(input_ids=ids).logits[0, :-1]
        with torch.no_grad(), model.disable_adapter():
            base_logits = model(input_ids=ids).logits[0, :-1]
        assert row["domain"] == document["domain"]
        for name, part in (("nll", logits), ("base_nll", base_logits)):
            assert row[name] == pytest.approx(F.cross_entropy(part, ids[0, 1:], reduction="none").tolist(), rel=1e-4)
        kl = F.kl_div(logits.log_softmax(-1), base_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        assert row["kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        assert max(row["kl"]) > 1e-4 and not row["bit_equal"]
        assert row["top1"] == logits.argmax(-1).tolist() and row["base_top1"] == base_logits.argmax(-1).tolist()
        for layer, record in records.items():
            counts = torch.bincount(record.index[record.index >= 0], minlength=record.logits.shape[1])
            assert row["experts"][layer] == counts.tolist()
            if layer in PLAN:
                assert row["captured"][layer] == (record.index >= 6).any(-1).int().tolist()
        assert row["captured"].keys() == PLAN.keys() and "gate" not in row


def test_every_token_is_captured_where_all_are_in_exclusive_scope():
    for text, row in zip(TEXTS, compare(make_model(selection="exclusive", calibration="none")), strict=True):
        assert row["captured"] == {layer: [1] * len(text.split()) for layer in PLAN}
        assert sum(row["experts"][0]) == 2 * len(text.split())  # two experts a token; padding counts nowhere


def test_text_is_bit_equal_where_only_images_open_the_new_experts():
    options = {"scope": "modality", "selection": "exclusive", "calibration": "none", "image_token_id": len(WORDS)}
    rows = compare(make_model(encoder=make_encoder(), **options))
    assert all(row["bit_equal"] and set(row["kl"]) == {0.0} and row["nll"] == row["base_nll"] for row in rows)
    assert not any(any(tokens) for row in rows for tokens in row["captured"].values())


def test_a_gates_margins_say_which_tokens_are_captured():
    model = make_model(scope="gate", selection="exclusive", calibration="none")
    margins = sorted(z for row in compare(model) for z in row["gate"][1])  # one gate, in the lowest extended layer
    model.gate_threshold = (margins[11] + margins[12]) / 2  # half of the 24 tokens
    rows = compare(model)
    for row in rows:
        opened = [int(z > model.gate_threshold) for z in row["gate"][1]]
        assert row["captured"] == {1: opened, 2: opened}
    assert sum(sum(row["captured"][2]) for row in rows) == 12


def test_any_two_causal_models_can_be_compared():
    base, model = make_base(), make_base()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    rows = compare(model, base=base)
    assert base_retention(rows)["kl"] > 0.01 and not any(row["bit_equal"] for row in rows)
    assert not {"captured", "experts", "gate"} & set(rows[0])
    same = compare(base, base=base)
    assert base_retention(same)["perplexity_ratio"] == 1.0 and all(row["bit_equal"] for row in same)
    assert base_retention(same)["captured_mean"] is None
    with pytest.raises(ValueError, match="MixtralForCausalLM is no MoExtend model: say what to compare it with"):
        compare(model)
    with pytest.raises(ValueError, match="96 tokens, the base's 90"):
        compare(model, base=make_small_base())


def make_small_base():
    base = make_base()
    base.resize_token_embeddings(90)
    return base


def test_modes_are_given_back_even_after_an_error():
    model = make_model().train()
    model.get_decoder().layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    compare(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="broken"):
        compare(model, [{"domain": "x", "text": "a b"}] * 2, base=Broken())
    assert modes == {name: module.training for name, module in model.named_modules()}


class Broken(torch.nn.Module):
    device = "cpu"

    def forward(self, **inputs):
        raise RuntimeError("broken")


def test_a_chat_is_read_as_its_template_writes_it():
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (row,) = compare(make_model(), [{"domain": "x", "messages": chat}])
    (text,) = compare(make_model(), [{"domain": "x", "text": "USER: a b ASSISTANT: c d"}])
    assert row == text and len(row["nll"]) == 5


def test_documents_are_cut_at_max_length():
    rows = compare(make_model(), max_length=3)
    assert [len(row["nll"]) for row in rows] == [2, 1, 2, 2]
    assert [len(row["captured"][1]) for row in rows] == [3, 2, 3, 3]


@pytest.mark.parametrize(
    "documents, message",
    [([], "There are no documents"), ([{"domain": "law", "text": "a"}], r"Document 0 \('law'\) has 1 tokens")],
)
def test_documents_without_a_token_to_predict_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        compare(make_model(), documents)


def test_routing_of_one_row_leaves_padding_and_empty_slots_out():
    index = torch.tensor([[0, 1], [1, 2], [0, 0], [3, -1], [2, 1], [0, 0]])  # two rows of three tokens
    record = RoutingRecord(torch.zeros(6, 4), index, None, 2, 2, {"default": torch.arange(6) / 4})
    plain = RoutingRecord(torch.zeros(6, 2), index.clamp(0, 1), None, 2, 0)
    found = routing_of({5: record, 6: plain}, item=1, length=2, width=3)
    assert found["captured"] == {5: [1, 1]}
    assert found["experts"] == {5: [0, 1, 1, 1], 6: [1, 3]}
    assert found["gate"] == {5: [0.75, 1.0]}


def test_expert_use_is_a_share_by_domain_and_layer():
    rows = [
        {"domain": "b", "experts": {0: [1, 3], 1: [0, 1, 1]}},
        {"domain": "a", "experts": {0: [1, 0], 1: [0, 0, 2]}},
        {"domain": "b", "experts": {0: [4, 0], 1: [0, 0, 2]}},
    ]
    assert expert_use(rows) == {
        "a": {0: [1.0, 0.0], 1: [0.0, 0.0, 1.0]},
        "b": {0: [0.625, 0.375], 1: [0.0, 0.25, 0.75]},
    }
    assert expert_use([{"domain": "a"}]) == {}


# ---------------------------------------------------------------- answers


def greedy(model, ids, number, end=2):
    """Greedy tokens without cache, padding or batch."""
    found = []
    for _ in range(number):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax()))
        if found[-1] == end:
            break
    return found


def test_answers_are_greedy_whatever_stands_beside_them():
    model, tokenizer = make_model().train(), make_tokenizer()
    given = answer(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3, progress=False)
    assert model.training
    model.eval()
    for text, found in zip(TEXTS, given, strict=True):
        ids = tokenizer(f"USER: {text} ASSISTANT:", add_special_tokens=False).input_ids
        assert found == tokenizer.decode(greedy(model, ids, 5), skip_special_tokens=True).strip()
    assert len(set(given)) > 1


def test_tokens_past_the_embedding_are_named():
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert answer(model, tokenizer, PROMPTS[:1], max_new_tokens=1, progress=False)
    named = r"'<tool>' has the id 96, but the base's embedding has 96 rows"
    prompts = [PROMPTS[0], [{"role": "user", "content": "a <tool> b"}]]
    with pytest.raises(ValueError, match=f"Prompt 1, padded: {named}"):
        answer(model, tokenizer, prompts, progress=False)
    documents = [*DOCUMENTS, {"domain": "z", "text": "a <tool> b"}]
    with pytest.raises(ValueError, match=rf"Document 4 \('z'\): {named}"):
        compare_with_base(model, tokenizer, documents, progress=False)


def test_an_answer_stops_at_the_tokenizers_end():
    model, tokenizer = make_model(), make_tokenizer()
    before = answer(model, tokenizer, PROMPTS[:1], max_new_tokens=4, progress=False)[0].split()
    assert len(before) == 4
    tokenizer.add_special_tokens({"eos_token": before[1]})
    assert answer(model, tokenizer, PROMPTS[:1], max_new_tokens=4, progress=False) == before[:1]


def test_answers_about_images_see_their_own_image():
    model = make_model(
        scope="modality",
        selection="exclusive",
        calibration="none",
        encoder=make_encoder(),
        image_token_id=96,
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = MoExtendProcessor.from_encoder(make_tokenizer(), image_processor, make_encoder().config)
    model.config.image_token_id = processor.image_token_id
    model.projector.linear_2.weight.data.mul_(30)  # loud enough to change an answer
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a b"}]}]
    images = [[Image.new("RGB", (16, 16), colour)] for colour in ("red", "black", "white")]
    options = {"max_new_tokens": 3, "progress": False}
    given = answer(model, processor, [ask] * 3, images=images, **options)
    alone = [answer(model, processor, [ask], images=[image], **options)[0] for image in images]
    assert given == alone and len(set(given)) > 1
    mixed = answer(model, processor, [ask, PROMPTS[0]], images=[images[0], []], **options)
    assert mixed[0] == given[0]


def test_scores():
    assert score(["a", "B "], ["a", "b"]) == 1.0
    assert score(["two", "x"], ["2", ["x"] * 2 + ["y"] * 8], "vqa_accuracy") == pytest.approx(0.8)


# ---------------------------------------------------------------- thresholds


def gated(threshold):
    return SimpleNamespace(config=SimpleNamespace(scope="gate"), gate_threshold=threshold)


def test_the_threshold_curve_measures_at_each_threshold_and_gives_the_models_own_back():
    model = gated(0.25)
    curve = threshold_curve(model, lambda: {"seen": model.gate_threshold}, [1, -1], progress=False)
    assert curve == [{"threshold": 1.0, "seen": 1.0}, {"threshold": -1.0, "seen": -1.0}]
    assert model.gate_threshold == 0.25


def test_the_threshold_is_given_back_after_an_error():
    model = gated(0.25)
    with pytest.raises(ZeroDivisionError):
        threshold_curve(model, lambda: 1 / 0, [1.0], progress=False)
    assert model.gate_threshold == 0.25


def test_a_threshold_curve_needs_a_gate():
    with pytest.raises(ValueError, match="scope='gate', but this one's scope is 'all'"):
        threshold_curve(make_model(), dict, [0.0])


# ---------------------------------------------------------------- files


def test_documents_are_read_line_by_line(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"domain": "a", "text": "b"}, {"domain": "c", "messages": [{"role": "user", "content": "d"}]}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert read_documents(path) == rows
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"text": "b"}))
    with pytest.raises(ValueError, match="Line 2 of .*text.jsonl must be"):
        read_documents(path)
    path.write_text(json.dumps(rows[0]) + '\n{"domain": ')
    with pytest.raises(ValueError, match="Line 2 of .*text.jsonl is not valid JSON"):
        read_documents(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no document"):
        read_documents(path)


def test_questions_end_with_their_answer(tmp_path):
    path = tmp_path / "questions.jsonl"
    system, ask, last = ({"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a")))
    rows = [{"messages": [system, ask, last]}, {"messages": [ask, last], "images": ["1.png"], "answers": ["a", "b"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="Entry 1 of .*questions.jsonl: image .*1.png does not exist"):
        read_questions(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert read_questions(path) == [
        {"prompt": [system, ask], "answer": "a", "images": []},
        {"prompt": [ask], "answer": "a", "images": [str(tmp_path / "1.png")], "answers": ["a", "b"]},
    ]
    assert len(read_questions(path, number=1)) == 1
    path.write_text(json.dumps({"messages": [ask, last], "image": "1.png", "audio": {"path": "1.png"}}))
    (found,) = read_questions(path)
    assert found["images"] == found["audios"] == [str(tmp_path / "1.png")]
    path.write_text(json.dumps({"messages": [last, ask]}))
    with pytest.raises(ValueError, match="Entry 0 of .* must hold `messages` that end with the assistant's"):
        read_questions(path)


@pytest.mark.parametrize(
    "bad, problem",
    [
        (7, "`messages` that end with the assistant's"),
        ({"text": "a"}, "its messages are None, not a list of messages"),
        ({"messages": [{"role": "user", "content": "q"}, "a"]}, "message 1 of its messages is a, without a role"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}, "or without content"),
        (
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "images": [{"bytes": "x"}],
            },
            r"the paths of its images, not \[None\]",
        ),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_an_entry_that_is_no_question_is_named(tmp_path, bad, problem, number):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [good] * number + [bad])))
    with pytest.raises(ValueError, match=f"Entry {number} of .*q.jsonl must hold .*{problem}"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("relative", [True, False])
def test_questions_of_a_llava_file(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/1.png")
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "q.json").write_text(json.dumps([{"id": 1, "image": "1.png", "conversations": turns}]))
    folder = "images" if relative else str(tmp_path / "images")
    (found,) = read_questions("q.json", folder)
    assert found["answer"] == "no" and (tmp_path / found["images"][0]).samefile(tmp_path / "images/1.png")
    assert [part["type"] for part in found["prompt"][0]["content"]] == ["image", "text"]
