"""Retention text sampled from the base, its cache on disk, and the distance that keeps prompts the base's."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import batch, in_processes, leave_group, make_base, make_encoder
from datasets import Dataset
from test_gate_moextend import gated, opened, text
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from modeling_moextend.training import retention
from modeling_moextend.training.retention import (
    batch_size_by_memory,
    batches,
    chat_start,
    closed_gate,
    common_prefix,
    cycle,
    fitting,
    last_hidden_states,
    prompt_distance,
    row_bytes,
    sample_retention,
    start_of,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, "alpha", "beta", "7", "USER:", "ASSISTANT:", *"abcdefghijklmnopqrstuvwxyz"]
USER, ASSISTANT = WORDS.index("USER:"), WORDS.index("ASSISTANT:")
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{{ m['content'] }} {% endfor %}"
)


def make_tokenizer(template=TEMPLATE, **special):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(" ", behavior="removed")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def sample(folder, model=None, tokenizer=None, **options):
    options = {"tokens": 96, "length": 12, "progress": False, **options}
    return sample_retention(model or gated(), tokenizer or make_tokenizer(), cache_dir=folder, **options)


def sharp_base():
    """A base that prefers some tokens by far."""
    base = make_base()
    with torch.no_grad():
        base.lm_head.weight.mul_(16)
    return base


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(*args, **kwargs):
    raise AssertionError("sampled again")


# ------------------------------------------------------------------ where samples start


def test_common_prefix_by_hand():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [3, 2]]) == 0
    assert common_prefix([[], [1]]) == 0
    assert common_prefix([[4, 5]]) == 2


def test_chat_start_is_the_template_up_to_the_users_words():
    assert chat_start(make_tokenizer()) == [1, USER]
    assert chat_start(make_tokenizer(None)) == []
    system = "{{ bos_token }} a b " + TEMPLATE.removeprefix("{{ bos_token }} ")
    assert chat_start(make_tokenizer(system)) == [1, WORDS.index("a"), WORDS.index("b"), USER]
    assert chat_start(make_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")) == []


def test_kinds_come_in_equal_shares_one_after_the_other():
    doc, one, three, chat = retention.STARTS
    assert cycle(retention.STARTS, 6, make_tokenizer()) == [doc, doc, one, one, three, chat]
    assert cycle(retention.STARTS, 4, make_tokenizer(None)) == [doc, doc, one, three]


EMBEDDING = SimpleNamespace(num_embeddings=96)
TEXT_ONLY = SimpleNamespace(image_token_id=None, placeholder_ids=[], get_input_embeddings=lambda: EMBEDDING)


def test_no_start_is_an_image_token():
    generator, tokenizer = torch.Generator().manual_seed(0), make_tokenizer()
    eyes = SimpleNamespace(
        image_token_id=len(SPECIAL), placeholder_ids=[len(SPECIAL)], get_input_embeddings=lambda: EMBEDDING
    )
    drawn = {token for _ in range(200) for token in start_of("3 random tokens", tokenizer, eyes, generator)[1:]}
    assert len(SPECIAL) not in drawn and len(SPECIAL) + 1 in drawn


def test_a_start_is_of_its_kind_and_draws_words_only():
    generator = torch.Generator().manual_seed(0)
    tokenizer, model = make_tokenizer(), TEXT_ONLY
    starts = {kind: [start_of(kind, tokenizer, model, generator) for _ in range(200)] for kind in retention.STARTS}
    assert all(start == [1] for start in starts["document"])
    assert all(start == [1, USER] for start in starts["chat"])
    for kind, number in (("1 random token", 1), ("3 random tokens", 3)):
        assert all(len(start) == 1 + number and start[0] == 1 for start in starts[kind])
        drawn = {token for start in starts[kind] for token in start[1:]}
        assert drawn <= set(range(len(SPECIAL), len(WORDS))) and len(drawn) > 0.9 * (len(WORDS) - len(SPECIAL))


def test_no_start_is_a_token_past_the_embedding():
    generator, tokenizer = torch.Generator().manual_seed(0), make_tokenizer()
    tokenizer.add_tokens([f"added {number}" for number in range(100)])
    drawn = {token for _ in range(300) for token in start_of("3 random tokens", tokenizer, TEXT_ONLY, generator)}
    assert len(WORDS) <= max(drawn) < 96


def test_a_tokenizer_without_a_document_start():
    generator = torch.Generator().manual_seed(0)
    ends = make_tokenizer(bos_token=None)
    assert start_of("document", ends, TEXT_ONLY, generator) == [2]
    neither = make_tokenizer(bos_token=None, eos_token=None)
    assert start_of("document", neither, TEXT_ONLY, generator) == [0]
    start = start_of("3 random tokens", neither, TEXT_ONLY, generator)
    assert len(start) == 3 and min(start) >= 2  # <s> and </s> are words here


def test_batches_hold_starts_of_one_width():
    assert batches([[1], [2], [3], [4, 5], [6], [7, 8]], 3) == [[[1], [2], [3]], [[6]], [[4, 5], [7, 8]]]


def test_samples_go_on_from_all_four_kinds_of_start(tmp_path, monkeypatch):
    given, draw = [], retention.draw
    monkeypatch.setattr(
        retention, "draw", lambda model, starts, *rest: given.extend(starts) or draw(model, starts, *rest)
    )
    rows = sample(tmp_path, tokens=95)  # 7.9 sequences
    assert [len(row) for row in rows] == [12] * 8
    assert [len(start) for start in given] == [1, 1, 2, 2, 4, 4, 2, 2] and given[6:] == [[1, USER]] * 2
    assert all(any(row[: len(start)] == start for row in rows) for start in given)
    assert len({tuple(row[4:]) for row in rows}) == 8


# ------------------------------------------------------------------ sampling


def test_one_seed_gives_one_text_and_another_seed_another(tmp_path):
    first, again, other = (sample(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first == again
    assert first != other and first[0] != other[0]


def test_the_adapter_takes_no_part(tmp_path):
    """Nor is it left off."""
    model = opened()
    assert model.active_adapters() == ["default"]
    model.gate_threshold = -1e9
    rows = sample(tmp_path / "open", model)
    assert model.active_adapters() == ["default"]
    plain = gated()
    assert rows == sample(tmp_path / "closed", plain)
    with torch.no_grad():
        assert not torch.allclose(model(text()).logits, plain(text()).logits, atol=1e-3)


def test_settings_of_the_bases_own_generation_do_not_matter(tmp_path):
    rows, model = sample(tmp_path / "a", gated(base=sharp_base())), gated(base=sharp_base())
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p, own.max_length = False, 0.01, 1, 0.1, 5
    own.eos_token_id = list(range(96))
    assert sample(tmp_path / "b", model) == rows


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 9.0}, {"min_p": 0.5}, {"suppress_tokens": list(range(50))}, {"max_new_tokens": 2}]
)
def test_no_other_setting_of_the_bases_generation_matters(tmp_path, own):
    rows, model = sample(tmp_path / "a", gated(base=sharp_base())), gated(base=sharp_base())
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert sample(tmp_path / "b", model) == rows


def test_nothing_ends_a_sample(tmp_path):
    """An end of text is drawn like any other token, and text goes on after it."""
    rows = sample(tmp_path, tokens=2400)
    assert len(rows) == 200 and {len(row) for row in rows} == {12}
    after = {token for row in rows for place, token in enumerate(row[1:], 1) if row[place - 1] == 2}
    assert len(after) > 5


def test_samples_are_those_of_the_bases_distribution(tmp_path):
    """A base that prefers some tokens: their shares among first tokens of documents are its probabilities."""
    base = sharp_base()
    with torch.no_grad():
        expected = base(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    rows = sample(tmp_path, gated(base=base), make_tokenizer(None), tokens=3 * 8 * 600, length=8, batch_size=600)
    drawn = torch.tensor([row[1] for row in rows[:600]]).bincount(minlength=96) / 600
    assert expected.max() > 0.1
    assert (drawn - expected).abs().max() < 0.05
    assert (drawn[expected.topk(3).indices].sum() - expected.topk(3).values.sum()).abs() < 0.08


@pytest.mark.parametrize("training", [True, False])
def test_the_process_and_the_model_are_as_before(tmp_path, training):
    model = gated().train(training)
    seen, generate = [], model.generate
    model.generate = lambda *args, **kwargs: seen.append(model.training) or generate(*args, **kwargs)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sample(tmp_path, model, batch_size=3)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training == model.base.training == training
    assert len(seen) > 2 and not any(seen)
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_the_callers_choice(tmp_path, capfd, progress):
    sample(tmp_path, progress=progress)
    assert ("sampling retention text" in capfd.readouterr().err) == progress


def test_a_base_with_eyes_draws_no_image_token(tmp_path):
    model = gated(encoder=make_encoder(), image_token_id=40)
    rows = sample(tmp_path, model, tokens=1200)
    assert not any(40 in row for row in rows)


def test_batches_are_as_large_as_memory_allows():
    model = gated()
    keys_and_values, logits = 2 * 4 * 2 * 8 * 4, 6 * 4 * 96  # layers, heads, their size, bytes; copies, bytes, words
    assert row_bytes(model, 200) == 200 * keys_and_values + logits
    assert [fitting(free, 10) for free in (-1, 5, 19, 40, 1279, 1280, 1e9)] == [1, 1, 1, 4, 64, 128, 512]
    assert batch_size_by_memory(model, 200) == 32  # without an accelerator


# ------------------------------------------------------------------ several processes


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    PartialState(cpu=True)
    model, drawn, own = gated(), [], Path(folder, str(rank))  # each has a disk of its own
    generate = model.generate
    model.generate = lambda **inputs: drawn.append(inputs["generation_config"].do_sample) or generate(**inputs)
    rows = [sample(own, model, batch_size=1)]
    files_then = files(own)
    rows.append(sample(own, model, batch_size=1))
    torch.save((rows, sum(drawn), files_then), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_each_process_samples_its_share_of_the_text_of_one(tmp_path):
    in_processes(work, tmp_path)
    expected = sample(tmp_path / "alone", batch_size=1)
    for rank in (0, 1):
        rows, drawn, written = torch.load(tmp_path / f"{rank}.pt")
        assert rows == [expected, expected] and drawn == 4 and len(written) == (rank == 0)


# ------------------------------------------------------------------ the cache on disk


def test_a_second_call_reads_what_the_first_one_wrote(tmp_path, monkeypatch):
    rows = sample(tmp_path / "new" / "folder")
    monkeypatch.setattr(retention, "draw", fail)
    assert sample(tmp_path / "new" / "folder") == rows
    with pytest.raises(AssertionError, match="sampled again"):
        sample(tmp_path / "elsewhere")


def test_other_settings_have_files_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(retention, "draw", lambda model, starts, *rest: drawn.append(rest) or starts)
    other = make_base()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    variants = [
        {},
        {"seed": 1},
        {"length": 16},
        {"tokens": 108},
        {"batch_size": 5},
        {"model": gated(base=other)},
        {"tokenizer": make_tokenizer(None)},
        {"tokenizer": make_tokenizer(TEMPLATE.replace("USER:", "ASSISTANT:"))},
    ]
    for variant in variants:
        sample(tmp_path, **variant)
    assert len(drawn) == len(files(tmp_path)) == len(variants)
    monkeypatch.setattr(retention, "SAMPLER", retention.SAMPLER + 1)
    sample(tmp_path)
    assert len(drawn) == len(variants) + 1
    sample(tmp_path, gated(plan={0: [1]}))  # the same base under another adapter
    assert len(drawn) == len(variants) + 1


def test_another_start_token_has_a_file_of_its_own(tmp_path):
    one, other = (make_tokenizer(None, bos_token=bos) for bos in ("<s>", "</s>"))
    assert sample(tmp_path, tokenizer=one) != sample(tmp_path, tokenizer=other)


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_half_written_file_is_never_read(tmp_path, monkeypatch, where):
    expected = sample(tmp_path / "whole")

    def stop(self, path):
        with open(path, "wb") as file:
            file.write(b"PAR1 half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(Dataset, "to_parquet", stop)
        else:
            patch.setattr(os, "replace", lambda *paths: stop(None, paths[0]))
        with pytest.raises(KeyboardInterrupt):
            sample(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.parquet"))
    assert sample(tmp_path / "killed") == expected
    assert files(tmp_path / "whole") == [path.name for path in (tmp_path / "killed").glob("*.parquet")]


def test_a_sampling_that_was_stopped_goes_on_and_gives_the_same_text(tmp_path, monkeypatch):
    model, passes = gated(), []
    expected = sample(tmp_path / "whole", model, batch_size=1)
    generate = model.generate

    def stop(**inputs):
        passes.extend([inputs] * inputs["generation_config"].do_sample)  # the others tell how long it will take
        if inputs["generation_config"].do_sample and len(passes) == 4:
            raise KeyboardInterrupt
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", stop)
    message = r"while sampling retention text, 3 of 8 sequences are there, in .*unfinished-0.jsonl; the same command"
    with pytest.raises(KeyboardInterrupt, match=message):
        sample(tmp_path / "stopped", model, batch_size=1)
    (unfinished,) = (tmp_path / "stopped").iterdir()
    lines = [json.loads(line) for line in unfinished.read_text().splitlines()]
    assert [(line["batch"], line["input_ids"]) for line in lines] == [(n, [expected[n]]) for n in range(3)]
    with open(unfinished, "a") as file:  # as a kill in the middle of a line leaves it
        file.write('{"batch": 3, "input_ids": [[1, 2')
    other = unfinished.with_name(unfinished.name.replace("-0", "-5"))  # as a run of more processes leaves it
    other.write_text(json.dumps({"batch": 6, "input_ids": [expected[6]], "device": "cpu"}) + "\n")
    assert sample(tmp_path / "stopped", model, batch_size=1) == expected
    assert len(passes) == 4 + 4  # four are not sampled again
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"batch": 0, "input_ids": [[1]], "device": "cpu"}',
        '{"batch": 9, "input_ids": [], "device": "cpu"}',
        '{"batch": 0, "input_ids": [], "device": "cuda"}',
        '{"a": 1}',
        "[]",
        "null",
    ],
)
def test_lines_that_are_no_samples_are_sampled_anew(tmp_path, line):
    expected = sample(tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.with_suffix(".unfinished-0.jsonl").write_text(line + "\n")
    assert sample(tmp_path) == expected


def test_a_damaged_file_is_told_and_sampled_anew(tmp_path):
    expected = sample(tmp_path)
    (path,) = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=f"{path.name} can't be read"):
        assert sample(tmp_path) == expected
    assert sample(tmp_path) == expected  # written again


def test_a_place_that_can_hold_no_file_is_refused_before_the_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "draw", None)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileExistsError):
        sample(tmp_path / "taken")


# ------------------------------------------------------------------ the distance of prompts


def labelled(rows=3, length=10):
    """A batch with left padding, of which the last three tokens of each row are labels."""
    inputs = batch(rows, length)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, : length - 3] = -100
    return inputs


def run(model, inputs):
    """Last hidden states [B, S, H] of a pass with the adapter on."""
    with last_hidden_states(model) as hidden:
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    assert len(hidden) == 1
    return hidden[0]


def test_prompt_distance_by_hand():
    model, inputs = opened(), labelled()
    with torch.no_grad():
        hidden = run(model, inputs)
        with model.disable_adapter():
            base = run(model, inputs)
        found = prompt_distance(model, model, hidden, inputs)
    terms = []
    for row in range(3):
        for place in range(9):
            real = inputs["attention_mask"][row, place] == 1  # the row's padding is on the left
            if real and inputs["labels"][row, place + 1] == -100:
                one, other = hidden[row, place].double(), base[row, place].double()
                terms.append(((one - other) ** 2).sum() / (other**2).sum())
    assert len(terms) == 6 + 5 + 4  # the last prompt token's next one is a label
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert found > 1e-3


def test_padding_on_the_right_counts_for_nothing():
    model, inputs = opened(), {"input_ids": text(2)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :7] = -100
    with torch.no_grad():
        expected = prompt_distance(model, model, run(model, inputs), inputs)
        padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in inputs.items()}
        padded["labels"][:, 10:] = -100
        assert prompt_distance(model, model, run(model, padded), padded).item() == pytest.approx(
            expected.item(), rel=1e-5
        )
        del inputs["attention_mask"]
        assert prompt_distance(model, model, run(model, inputs), inputs).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


def test_a_closed_gate_keeps_every_prompt():
    model, inputs = gated(), labelled()
    assert prompt_distance(model, model, run(model, inputs), inputs) == 0.0
    model = opened()
    hidden = run(model, inputs)
    assert prompt_distance(model, model, hidden, inputs) > 0
    with closed_gate(model):
        hidden = run(model, inputs)
    assert prompt_distance(model, model, hidden, inputs) == 0.0


def test_without_prompt_tokens_the_distance_is_zero():
    model, inputs = opened(), labelled()
    hidden = run(model, inputs)
    everything = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    everything["labels"][:, 0] = -100  # the first token is nobody's next one
    for given in (everything, {**inputs, "labels": None}, {**inputs, "labels": inputs["labels"][:, 1:]}):
        assert prompt_distance(model, model, hidden, given) == 0.0
    assert prompt_distance(model, model, hidden, inputs) > 0


def test_the_end_of_a_packed_sequence_is_no_prompt():
    model, ids = opened(), text(1, 12)
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)]]), "labels": ids.clone()}
    inputs["labels"][0, [0, 5]] = -100  # as TRL's padding-free collator leaves them
    assert prompt_distance(model, model, run(model, inputs), inputs) == 0.0


def test_gradients_reach_new_tensors_only():
    model, inputs = opened(), labelled()
    trained = model.set_trainable()
    prompt_distance(model, model, run(model, inputs), inputs).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    names = {name for name, p in model.named_parameters() if any(p is other for other in trained.values())}
    assert with_gradient and with_gradient <= names
    assert any("experts" in name for name in with_gradient)


def test_the_threshold_comes_back_also_after_an_error(monkeypatch):
    model, inputs = opened(), labelled()
    model.gate_threshold = 0.25
    hidden = run(model, inputs)
    prompt_distance(model, model, hidden, inputs)
    assert model.gate_threshold == 0.25
    monkeypatch.setattr(model.get_decoder(), "forward", fail)
    with pytest.raises(AssertionError):
        prompt_distance(model, model, hidden, inputs)
    assert model.gate_threshold == 0.25


def test_the_base_of_the_distance_sees_the_images():
    model = opened(encoder=make_encoder(), image_token_id=96)
    inputs = labelled(rows=2, length=12)
    inputs["input_ids"][:, 3:7] = 96
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = run(model, inputs)
    assert prompt_distance(model, model, hidden, inputs) > 0
    with closed_gate(model):
        hidden = run(model, inputs)
    assert prompt_distance(model, model, hidden, inputs) == 0.0


def test_hidden_states_are_those_below_the_head_and_nobody_listens_afterwards():
    model, ids = opened(), text()
    hooks = len(model.get_decoder()._forward_hooks)
    with last_hidden_states(model) as hidden, torch.no_grad():
        logits = model(ids).logits
    assert torch.equal(model.base.lm_head(hidden[0]), logits)
    with pytest.raises(KeyError), last_hidden_states(model) as hidden:
        raise KeyError
    assert len(model.get_decoder()._forward_hooks) == hooks
    model(ids)
    assert hidden == []
