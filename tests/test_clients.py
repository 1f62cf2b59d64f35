"""Programs that nobody here wrote use an adapter: pipelines, a server and its client, an evaluation, TRL, PEFT.

The commands are those of docs/clients.md. Everything runs on this machine: base and encoder are those of assets/.
"""

import base64
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import frozen_copy, make_base, shake
from datasets import Dataset
from openai import OpenAI
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from test_gate_moextend import open_gate
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from modeling_moextend import MoExtendForCausalLM, load_processor
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.tools.hashes import base_tensors_hash

ROOT = Path(__file__).parents[1]
BASE, ENCODER = ROOT / "assets" / "tiny-moe", ROOT / "assets" / "tiny-clip"
TASKS = ROOT / "examples" / "lm_eval"
PLAN = {1: [0, 3], 3: [2]}
QUESTION = [{"role": "user", "content": "What is a list?"}]
NEW = 12  # generated tokens
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a stream holds back the bytes of a last character that is not whole
DOCUMENTS = 6  # of each lm_eval task
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number: {i}."}]}
    for i in range(16)
]


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    """Folder of a text adapter on assets/tiny-moe, with its tokenizer; every token may use its new experts."""
    folder = tmp_path_factory.mktemp("reads") / "adapter"
    model = MoExtendForCausalLM.from_base(
        str(BASE), PLAN, scope="all", selection="compete", calibration="none", dtype="auto"
    )
    shake(model, std=0.2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    """Folder of an adapter with eyes, with its processor, and beside it a picture."""
    folder = tmp_path_factory.mktemp("sees") / "adapter"
    processor = load_processor(str(BASE), str(ENCODER))
    model = MoExtendForCausalLM.from_base(
        str(BASE), PLAN, encoder=str(ENCODER), image_token_id=processor.image_token_id, dtype="auto"
    )
    shake(model, std=0.2).save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.new("RGB", (64, 64), (200, 30, 90)).save(folder.parent / "picture.png")
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """Environment of a process with caches of its own, as a user's who has transformers only.

    A folder first on the path hides the package, installed or not: what runs is the code in the adapter's folder.
    """
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "modeling_moextend.py").write_text("raise ImportError('an adapter needs transformers only')\n")
    own = {"PYTHONPATH": str(hidden), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    return os.environ | own | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}


def run(*command, env):
    """What the command printed; it has to end well."""
    command = [sys.executable, *map(str, command)]
    child = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=1200
    )
    assert child.returncode == 0, (child.stdout + child.stderr)[-4000:]
    return child.stdout


def answer(folder, chat=QUESTION, dtype="auto"):
    """What the model in `folder` generates to `chat`, greedily, in this process."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(BASE)
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- pipelines

TEXT = """
import json, sys
from transformers import pipeline
pipe = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
options = {"max_new_tokens": int(sys.argv[2]), "do_sample": False, "return_full_text": False}
answers = [pipe(prompt, **options)[0]["generated_text"] for prompt in (json.loads(sys.argv[3]), "def f(x):")]
print(json.dumps([type(pipe.model).__module__, *answers]))
"""

IMAGE = """
import json, sys
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
parts = [{"type": "image", "path": sys.argv[3]}, {"type": "text", "text": "What colour?"}]
chat = [{"role": "user", "content": parts}]
options = {"max_new_tokens": int(sys.argv[2]), "generate_kwargs": {"do_sample": False}, "return_full_text": False}
print(json.dumps([type(pipe.model).__module__, pipe(text=chat, **options)[0]["generated_text"]]))
"""


@pytest.mark.slow
def test_the_text_generation_pipeline_says_what_the_model_says(reads, elsewhere):
    found = json.loads(run("-c", TEXT, reads, NEW, json.dumps(QUESTION), env=elsewhere).splitlines()[-1])
    assert found[0].startswith("transformers_modules.")
    assert found[1] == answer(reads) != answer(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    generated = AutoModelForCausalLM.from_pretrained(reads).generate(**inputs, max_new_tokens=NEW, do_sample=False)
    whole = tokenizer.decode(generated[0], skip_special_tokens=True)
    assert whole == "def f(x):" + found[2]


@pytest.mark.slow
def test_the_image_text_to_text_pipeline_sees_what_the_model_sees(sees, elsewhere):
    picture = sees.parent / "picture.png"
    found = json.loads(run("-c", IMAGE, sees, NEW, picture, env=elsewhere).splitlines()[-1])
    assert found[0].startswith("transformers_modules.")
    processor = load_processor(str(BASE), str(ENCODER))
    parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated = MoExtendForCausalLM.from_pretrained(sees).generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert found[1] == processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- transformers serve


@contextlib.contextmanager
def serving(tmp_path, env, *options):
    """Address of a `transformers serve` that trusts remote code, and its log; ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--trust-remote-code", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: listens(port) or process.poll() is not None, tmp_path / "log", 600)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1", tmp_path / "log"
        print((tmp_path / "log").read_text()[-3000:])
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def server(elsewhere, tmp_path):
    with serving(tmp_path, elsewhere) as server:
        yield server


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true, log, seconds):
    """Returns when `true()` is; after `seconds` it fails and shows the end of the log."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.5)


@pytest.mark.slow
def test_the_openai_client_chats_with_an_adapter_that_is_served(reads, server):
    client = OpenAI(base_url=server[0], api_key="none", timeout=600, max_retries=0)
    ask = {"model": str(reads), "messages": QUESTION, "max_tokens": NEW, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    expected = answer(reads)
    assert whole.choices[0].message.content == expected != answer(BASE)
    assert 0 < whole.usage.completion_tokens <= NEW
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(pieces) == expected.rstrip(UNFINISHED) and sum(map(bool, pieces)) > 1
    served = client.chat.completions.create(**{**ask, "model": str(BASE)})
    assert served.choices[0].message.content == answer(BASE)


@pytest.mark.slow
def test_an_adapter_with_an_encoder_is_served_images(sees, server):
    """One picture, two, and none: what the model says of the same chats, in answers and streams."""
    client = OpenAI(base_url=server[0], api_key="none", timeout=600, max_retries=0)
    picture, model = sees.parent / "picture.png", AutoModelForCausalLM.from_pretrained(sees)
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    processor, answers = load_processor(str(BASE), str(ENCODER)), []
    for number in (1, 2, 0):
        text = {"type": "text", "text": "What colour?"}
        served = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * number + [text]}]
        asked = [{"role": "user", "content": [{"type": "image", "path": str(picture)}] * number + [text]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(asked, **options)
        generated = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answers.append(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        ask = {"model": str(sees), "messages": served, "max_tokens": NEW, "temperature": 0}
        assert client.chat.completions.create(**ask).choices[0].message.content == answers[-1]
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(pieces) == answers[-1].rstrip(UNFINISHED)
    assert len(set(answers)) == 3


@pytest.mark.slow
def test_chats_at_once_with_a_gate_in_continuous_batching(tmp_path):
    """The package is in reach there: what a gate remembers of them lies in the cache that they share. In float32: in
    bfloat16 rounding goes by the shapes of batches."""
    model, folder = MoExtendForCausalLM.from_base(str(BASE), PLAN, dtype="float32"), tmp_path / "adapter"
    open_gate(shake(model, std=0.2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    chats = [[{"role": "user", "content": f"What is {what}?"}] for what in ("a list", "a list of names", "it")]
    expected = [answer(folder, chat, "float32") for chat in chats]
    assert expected != [answer(BASE, chat, "float32") for chat in chats]
    sizes = ["--dtype", "float32", "--cb-block-size", "32", "--cb-num-blocks", "48", "--cb-max-batch-tokens", "256"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    with serving(tmp_path, env, "--continuous-batching", *sizes) as server, ThreadPoolExecutor(3) as pool:
        client = OpenAI(base_url=server[0], api_key="none", timeout=600, max_retries=0)
        options = {"model": str(folder), "max_tokens": NEW, "temperature": 0}
        answers = pool.map(lambda chat: client.chat.completions.create(**options, messages=chat), chats)
        assert [one.choices[0].message.content for one in answers] == expected


# ---------------------------------------------------------------- lm_eval


def evaluated(folder, env, output):
    """Accuracy of moextend_continuations and bits a byte of moextend_held_out, as lm_eval finds them."""
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--device", "cpu", "--include_path", TASKS, "--tasks", "moextend_continuations,moextend_held_out"]
    run(*command, "--limit", DOCUMENTS, "--batch_size", 2, "--output_path", output, env=env)
    (file,) = output.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    return results["moextend_continuations"]["acc,none"], results["moextend_held_out"]["bits_per_byte,none"]


@torch.no_grad()
def log_likelihood(model, ids, start):
    """Sum of log-probabilities (nats) of `ids[start:]` (list of int), each given all before it."""
    scores = model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()


def computed(folder):
    """The same two numbers, from the model's logits, text by text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(BASE)
    right = 0
    for line in (TASKS / "continuations.jsonl").read_text().splitlines()[:DOCUMENTS]:
        row = json.loads(line)
        start = len(tokenizer(row["context"]).input_ids)
        wholes = [tokenizer(row["context"] + choice).input_ids for choice in row["choices"]]
        scores = [log_likelihood(model, whole, start) for whole in wholes]
        right += scores.index(max(scores)) == row["answer"]
    nats = size = 0
    for line in (BASE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:DOCUMENTS]:
        text = json.loads(line)["text"]  # lm_eval puts a bos before the tokenizer's own
        nats -= log_likelihood(model, [tokenizer.bos_token_id, *tokenizer(text).input_ids], 1)
        size += len(text.encode())
    return right / DOCUMENTS, nats / size / math.log(2)


@pytest.mark.slow
def test_lm_eval_finds_the_numbers_that_the_logits_give(reads, elsewhere, tmp_path):
    numbers = {}
    for name, folder in (("base", BASE), ("adapter", reads)):
        accuracy, bits = numbers[name] = evaluated(folder, elsewhere, tmp_path / name)
        expected_accuracy, expected_bits = computed(folder)
        assert accuracy == pytest.approx(expected_accuracy)
        assert bits == pytest.approx(expected_bits, rel=2e-3)  # bf16, in batches of another shape
    print(numbers)
    assert numbers["adapter"][1] > numbers["base"][1] + 0.01, "a shaken adapter is worse than its base"


# ---------------------------------------------------------------- TRL


def settings(folder, **options):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none"}
    return SFTConfig(str(folder), use_cpu=True, bf16=False, save_strategy="no", **{**defaults, **options})


def test_trls_own_trainer_trains_the_adapter_and_saves_it(reads, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reads, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reads)
    args, data = settings(tmp_path / "out"), Dataset.from_list(CHATS)
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    before, base = load_file(reads / FILE), base_tensors_hash(model)
    trainer.train()
    assert base_tensors_hash(model) == base
    trainer.save_model()
    saved = load_file(tmp_path / "out" / FILE)
    assert saved.keys() == before.keys()
    assert any(not torch.equal(saved[name], before[name].float()) for name in saved)
    tensors = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in {".safetensors", ".bin"}}
    assert tensors == {FILE, "training_args.bin"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):  # it looks for a whole model's file names
        trainer.train(resume_from_checkpoint=str(tmp_path / "out"))


def test_trls_own_balance_loss_is_refused(reads, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reads, dtype=torch.float32)
    args = settings(tmp_path, router_aux_loss_coef=0.01, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(reads)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer)
    with pytest.raises(ValueError, match="leave router_aux_loss_coef out, or train with MoExtendSFTTrainer"):
        trainer.train()


@pytest.mark.slow
def test_the_trl_command_goes_on_from_an_adapter(reads, elsewhere, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    base = (BASE / "model.safetensors").read_bytes()
    command = ["-m", "trl.cli.main", "sft", "--model_name_or_path", reads, "--trust_remote_code"]
    command += ["--dataset_name", data, "--output_dir", output, "--max_steps", 2, "--save_steps", 2]
    command += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--report_to", "none"]
    run(*command, "--use_cpu", "--bf16", "false", env=elsewhere)
    assert (BASE / "model.safetensors").read_bytes() == base
    before, saved = load_file(reads / FILE), load_file(output / FILE)
    moved = {name for name in saved if not torch.equal(saved[name], before[name].float())}
    assert saved.keys() == before.keys() and moved
    state = torch.load(output / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    model = AutoModelForCausalLM.from_pretrained(output)
    trained = [tensor for tensor in model.adapter_tensors().values() if tensor.requires_grad]
    assert sorted(m["exp_avg"].shape for m in state.values()) == sorted(tensor.shape for tensor in trained)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.adapter_tensors().items())


# ---------------------------------------------------------------- PEFT


def test_peft_beside_an_adapter_changes_nothing_and_does_not_take_it_for_its_own(reads):
    inputs = {"input_ids": torch.arange(3, 17)[None]}
    base = AutoModelForCausalLM.from_pretrained(BASE)
    expected = frozen_copy(base)(**inputs).logits  # as PEFT leaves it
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert torch.equal(adapted(**inputs).logits, expected), "a new LoRA is the identity"
    assert {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    model = AutoModelForCausalLM.from_pretrained(reads)
    assert model.config.model_type == "moextend" and not hasattr(model, "peft_config")
    assert not torch.equal(model(**inputs).logits, expected)
    assert torch.equal(adapted(**inputs).logits, expected), "loading ours leaves a PEFT model alone"
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftConfig.from_pretrained(reads)
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(make_base(), reads)
