"""Publishing: what a commit holds, what is refused, and that a push which fails leaves the repository as it was.

The real huggingface_hub client talks to the Hub of `hub_server.py`.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make_base, make_encoder, shake
from hub_server import running_hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, load_file
from test_processing_moextend import build_processor, build_tokenizer
from test_report import make_results
from test_sft_trainer import make_trainer
from transformers import MixtralForCausalLM

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, INDEX, read_adapter
from modeling_moextend.evaluation.report import write_report
from modeling_moextend.extender.router_shift import RouterShift
from modeling_moextend.publishing.hub import published_files

ROOT = Path(__file__).parents[1]
REPO, BASE = "me/my-adapter", "org/base"
PLAN = {1: [0], 2: [3, 1]}
CODE = {path.name for path in (ROOT / "modeling_moextend").glob("*_moextend.py")}
ADAPTER = {".gitattributes", "README.md", "config.json", FILE} | CODE
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
BASE_CARD = "---\nlicense: mit\n---\n# A base\n"
PRIVATE = (  # what may lie beside an adapter and is nobody else's business
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "card.json",
    "my_token.txt",
    ".env",
    "vocab.pkl",
    "model.safetensors",
    "screenshot.png",
    "moextend_adapter.safetensors.ab.tmp",
    "checkpoint-5/config.json",
    "checkpoint-5/moextend_adapter.safetensors",
    "checkpoint-5/modeling_moextend.py",
    "report/step-5/frontier.png",
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with a base on it, which this process takes for the one Hub; it is logged in there as "me"."""
    with running_hub() as hub:
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        huggingface_hub.close_session()
        make_base().save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "README.md").write_text(BASE_CARD)
        hub.add(BASE, tmp_path / "base")
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def model(hub):
    return shake(MoExtendForCausalLM.from_base(BASE, PLAN, paper=True)).eval()


def writes(hub):
    """The requests that change something."""
    return [request for request in hub.requests if request[0] in ("POST", "PUT")]


def parts(content):
    """Header and data of a safetensors file; the header's entries are in no fixed order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def section(card, heading):
    return card.split(f"## {heading}\n")[1].split("\n## ")[0]


# ---------------------------------------------------------------- what goes up


def test_a_push_is_one_commit_of_exactly_the_adapters_files(hub, model, tmp_path):
    done = model.push_to_hub(REPO, private=True, commit_message="A first adapter", processor=build_tokenizer())
    repo, files = hub.repos[REPO], hub.files(REPO)
    assert repo.private and [repo.commits[sha][0] for _, sha in repo.history] == ["initial commit", "A first adapter"]
    assert done.oid == repo.refs["main"] and done.commit_message == "A first adapter"
    assert set(files) == ADAPTER | TOKENIZER
    model.save_pretrained(tmp_path / "here")
    assert parts(files[FILE]) == parts((tmp_path / "here" / FILE).read_bytes())
    assert files["config.json"] == (tmp_path / "here" / "config.json").read_bytes()
    for name in CODE:
        assert files[name] == (ROOT / "modeling_moextend" / name).read_bytes()
    assert any(path.startswith("/lfs/") for _, path, _ in hub.requests), "tensors go the way of large files"
    repo.private = False
    with pytest.raises(ValueError, match=f"{REPO} is there already, and public: .* leave out private=True"):
        model.push_to_hub(REPO, private=True)
    assert repo.refs["main"] == done.oid


def test_the_commit_of_the_base_is_recorded_and_used_again(hub, model, tmp_path):
    made_on = hub.repos[BASE].refs["main"]
    assert model.config.base_model_revision == made_on
    model.push_to_hub(REPO)
    assert json.loads(hub.files(REPO)["config.json"])["base_model_revision"] == made_on
    other = MixtralForCausalLM(make_base().config)  # other weights: refused, if they were loaded
    other.save_pretrained(tmp_path / "other")
    hub.add(BASE, tmp_path / "other")
    again = MoExtendForCausalLM.from_pretrained(REPO)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.config.base_model_revision == made_on


def test_a_second_push_leaves_no_stale_shards_and_keeps_the_card(hub, model):
    model.push_to_hub(REPO)
    first = hub.files(REPO)
    hub.commit(hub.repos[REPO], "main", "my own words", {"README.md": b"my own words", "notes.txt": b"kept"})
    model.push_to_hub(REPO, max_shard_size="20KB")
    sharded = hub.files(REPO)
    assert INDEX in sharded and FILE not in sharded, "the single file would be a stale adapter beside the index"
    assert sum(name.startswith("moextend_adapter-") for name in sharded) > 1
    assert sharded["README.md"] == b"my own words" and sharded["notes.txt"] == b"kept"
    model.push_to_hub(REPO, card={"license": "apache-2.0"})
    last = hub.files(REPO)
    assert set(last) == set(first) | {"notes.txt"}, "shards and index are gone again"
    assert b"license: apache-2.0" in last["README.md"], "asked for, so it is written anew"
    assert len(hub.repos[REPO].history) == 5, "one commit a push"


def test_branches_and_pull_requests_leave_main_alone(hub, model):
    model.push_to_hub(REPO)
    main = hub.repos[REPO].refs["main"]
    model.push_to_hub(REPO, revision="half", adapter_dtype="float16")
    request = model.push_to_hub(REPO, create_pr=True, card={"license": "mit"}, tags=["law"])
    assert hub.repos[REPO].refs["main"] == main
    assert set(hub.files(REPO, "half")) == ADAPTER
    assert all(tensor.dtype == torch.float16 for tensor in load(hub.files(REPO, "half")[FILE]).values())
    assert request.pr_url.endswith("/discussions/1")
    assert "- law\n" in hub.files(REPO, "refs/pr/1")["README.md"].decode()


def test_nothing_else_in_a_folder_goes_along(hub, model, tmp_path):
    folder = tmp_path / "training"
    given = TOKENIZER | {"chat_template.jinja", "processor_config.json", "preprocessor_config.json", "README.md"}
    for name in (*PRIVATE, *given):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else name)
    model.save_pretrained(folder, push_to_hub=True, repo_id=REPO)
    assert set(hub.files(REPO)) == ADAPTER | given
    assert hub.files(REPO)["README.md"] == b"README.md", "the folder's own card"
    model.save_pretrained(folder, push_to_hub=True, repo_id=REPO, tags=["law"])
    assert f'from_pretrained("{REPO}"' in hub.files(REPO)["README.md"].decode(), "asked for"
    (folder / "README.md").write_text(
        "![mine](screenshot.png) ![not here](gone.png) ![no](report/step-5/frontier.png)"
    )
    assert set(published_files(folder)) == (ADAPTER | given | {"screenshot.png"}) - {".gitattributes"}


def test_one_of_several_adapters_is_pushed_by_its_name(hub, model, tmp_path):
    other = shake(MoExtendForCausalLM.from_base(BASE, {3: [1]}, paper=True), seed=5)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    model.push_to_hub(REPO, adapter_name="other")
    assert json.loads(hub.files(REPO)["config.json"])["extended_layers"] == {"3": [1]}
    pushed, own = load(hub.files(REPO)[FILE]), other.adapter_tensors()
    assert pushed.keys() == own.keys() and all(torch.equal(pushed[name], own[name]) for name in own)
    assert "| 3 | 1 | 1 |" in section(hub.files(REPO)["README.md"].decode(), "Extended layers")


def test_unknown_options_are_refused(hub, model, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'safe_serialisation'"):
        model.push_to_hub(REPO, safe_serialisation=True)
    with pytest.raises(TypeError, match="unexpected keyword arguments: repo"):
        model.save_pretrained(tmp_path / "here", push_to_hub=True, repo=REPO)
    assert not writes(hub)


# ---------------------------------------------------------------- the card


def test_the_card_tells_what_was_trained(hub, model):
    model.push_to_hub("my-adapter")  # the name alone: the user's own
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.base_model == BASE and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "mit", "the base's: its experts are what new ones begin as"
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True)' in text
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in text, "no tokenizer was pushed"
    tensors = model.adapter_tensors()
    for layer, sources in PLAN.items():
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer}.")]
        numbers = len(own), sum(map(torch.numel, own)), sum(4 * tensor.numel() for tensor in own)
        cells = [layer, len(sources), ", ".join(map(str, sources)), *(f"{number:,}" for number in numbers)]
        assert f"| {' | '.join(map(str, cells))} |" in section(text, "Extended layers")
    for name, tensor in tensors.items():
        assert f"| `{name}` | {list(tensor.shape)} | float32 | {4 * tensor.numel():,} |" in section(text, "Tensors")
    assert "Nothing was measured" in section(text, "Limits") and "licence: mit" in section(text, "Limits")


def test_metadata_that_the_hub_refuses_sends_nothing(hub, model):
    model.push_to_hub(REPO)
    before = len(writes(hub))
    with pytest.raises(ValueError, match='Invalid metadata in README.md.\n- "license" must be one of'):
        model.push_to_hub(REPO, card={"license": "my own"})
    assert {path for _, path, _ in writes(hub)[before:]} == {"/api/repos/create", "/api/validate-yaml"}


# ---------------------------------------------------------------- what is refused


def test_a_base_that_others_cannot_find_is_refused(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {
        "base": "'base', a path on this machine",
        str(tmp_path / "gone"): "gone', a path on this machine",
        "./base": "'./base', a path on this machine",
        "outputs/base": "'outputs/base', which is not on the Hub",
        None: "was given as a model",
    }
    for place, reason in places.items():
        model.config.base_model_name_or_path = place
        with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
            model.push_to_hub(REPO)
        assert "model.config.base_model_name_or_path = 'owner/name'" in str(refusal.value)
    model.config.base_model_name_or_path = "base"
    with pytest.raises(ValueError, match="can't be published yet: its base"):
        model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id=REPO)
    assert not (tmp_path / "here").exists()
    model.save_pretrained(tmp_path / "here")
    assert not writes(hub) and REPO not in hub.repos
    model.config.base_model_name_or_path = BASE
    model.push_to_hub(REPO)


def test_an_encoder_that_others_cannot_find_is_refused(hub, tmp_path, monkeypatch):
    make_encoder().save_pretrained(tmp_path / "encoder")
    model = MoExtendForCausalLM.from_base(BASE, PLAN, encoder=str(tmp_path / "encoder"), image_token_id=96)
    with pytest.raises(ValueError, match="its encoder is .*encoder', a path on this machine"):
        model.push_to_hub(REPO)
    assert not writes(hub)
    hub.add("org/encoder", tmp_path / "encoder")
    model.config.encoder_name_or_path = "org/encoder"
    warned = []
    monkeypatch.setattr("modeling_moextend.publishing.hub.logger.warning", warned.append)
    model.push_to_hub(REPO)
    assert len(warned) == 1 and "No processor goes along" in warned[0]
    model.push_to_hub(REPO, processor=build_processor())
    assert len(warned) == 1 and {"processor_config.json", "chat_template.jinja", *TOKENIZER} <= set(hub.files(REPO))
    again = MoExtendForCausalLM.from_pretrained(REPO)
    inputs = {"input_ids": torch.tensor([[5, 96, 96, 96, 96, 7]]), "pixel_values": torch.ones(1, 3, 16, 16)}
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_a_stranger_cannot_push_and_a_token_can_be_given(hub, model, monkeypatch):
    for token, reason in (("hf_stranger", "403"), ("hf_wrong", "401")):
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match=reason):
            model.push_to_hub(REPO, token=token)
    assert REPO not in hub.repos
    monkeypatch.delenv("HF_TOKEN")
    model.push_to_hub(REPO, token="hf_me")
    assert set(hub.files(REPO)) == ADAPTER


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize("how", ["500", pytest.param("drop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("request_", ["PUT /lfs/", f"POST /api/models/{REPO}/commit", f"POST /api/models/{REPO}/pre"])
def test_a_push_that_fails_changes_nothing_and_can_be_run_again(hub, model, request_, how):
    model.push_to_hub(REPO)
    old, history = hub.files(REPO), list(hub.repos[REPO].history)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor += 1
    hub.fail(request_, how, times=6)  # a request and its five retries; the commit is sent once
    with pytest.raises(Exception) as failure:  # the client's own: there is nothing to add to it
        model.push_to_hub(REPO)
    words = f"{failure.value} {failure.value.__cause__}"
    assert ("500" if how == "500" else "disconnected") in words or "reset" in words or "Broken pipe" in words
    assert hub.files(REPO) == old and hub.repos[REPO].history == history
    hub.failures.clear()
    model.push_to_hub(REPO)
    assert len(hub.repos[REPO].history) == len(history) + 1
    pushed = load(hub.files(REPO)[FILE])
    assert all(torch.equal(pushed[name], tensor) for name, tensor in model.adapter_tensors().items())


def test_one_failure_on_the_way_is_tried_again(hub, model):
    hub.fail("PUT /lfs/", "500")
    hub.fail("POST /me/my-adapter.git/info/lfs", "503")
    model.push_to_hub(REPO)
    assert [how[2] for how in hub.failures] == [0, 0] and set(hub.files(REPO)) == ADAPTER


# ---------------------------------------------------------------- trainer and script


def test_a_trainer_pushes_the_same_files(hub, model, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_private_repo": True, "hub_token": "hf_me"}
    trainer = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=1, max_steps=2, **options)
    for name in PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "extend").mkdir()
    shift = RouterShift([0, 1, 2, 3], torch.ones(4, 6, dtype=torch.long), torch.arange(24).reshape(4, 6))
    shift.plot(tmp_path / "extend" / "shift.png")
    trainer.train()
    trainer.push_to_hub("the end", dataset_name="me/letters", language="en")
    repo, files = hub.repos[REPO], hub.files(REPO)
    messages = [repo.commits[sha][0] for _, sha in repo.history]
    assert repo.private and messages[0] == "initial commit" and messages[-1] == "the end"
    assert messages[1] == "Training in progress, step 1", "the second one only if the first was done by then"
    assert set(messages[2:-1]) <= {"Training in progress, step 2"}
    for _, sha in repo.history[1:]:
        assert set(hub.files(REPO, sha)) == ADAPTER | TOKENIZER | {"shift.png"}
    assert files["shift.png"] == (tmp_path / "extend" / "shift.png").read_bytes()
    pushed = load(files[FILE])
    assert all(torch.equal(pushed[name], tensor) for name, tensor in model.adapter_tensors().items())
    kept = load_file(tmp_path / "checkpoint-2" / FILE)
    assert (tmp_path / "checkpoint-2" / "training_args.bin").exists(), "else its absence on the Hub says nothing"
    assert all(torch.equal(kept[name], pushed[name]) for name in kept)
    card = files["README.md"].decode()
    assert "| learning_rate | 0.01 |" in card and "| steps | 2 |" in card and "| seconds of training |" in card
    assert "![router shift](shift.png)" in card and f'AutoTokenizer.from_pretrained("{REPO}"' in card
    data = ModelCard(card).data
    assert data.datasets == ["me/letters"] and data.license == "mit" and data.language == "en" and "trl" in data.tags


def test_a_training_goes_on_without_the_hub(hub, model, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": REPO, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make_trainer(tmp_path, model=model, **options)
    hub.fail("", "500", times=10**9)
    trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="500"):
        trainer.push_to_hub()
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.failures.clear()
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == ADAPTER | TOKENIZER


def test_a_trainer_says_before_the_training_that_it_cannot_push(hub, model, tmp_path):
    model.config.base_model_name_or_path = str(tmp_path / "base")
    with pytest.raises(ValueError, match="can't be published yet"):
        make_trainer(tmp_path, model=model, push_to_hub=True, hub_model_id=REPO)
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="can't be published yet"):
        trainer.push_to_hub()
    assert not writes(hub)


def publish(monkeypatch, capsys, *arguments):
    """Runs the script; returns what it prints."""
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "examples" / "publish.py"), run_name="__main__")
    said = capsys.readouterr()
    if left.value.code:
        raise SystemExit(said.err)
    return said.out


@pytest.fixture
def folder(model, tmp_path):
    """An adapter on a local base, as training leaves it, with a report beside it."""
    model.config.base_model_name_or_path, model.config.base_model_revision = str(tmp_path / "base"), None
    trainer = make_trainer(tmp_path / "adapter", model=model)
    trainer.create_model_card()  # as at a checkpoint: it can't name base or repository
    trainer.save_model()
    for name in set(PRIVATE) - {"card.json"}:
        (tmp_path / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "adapter" / name).write_text("{}")
    write_report(tmp_path / "report", make_results(), task="letters", text="held out")
    return tmp_path / "adapter"


def test_the_script_publishes_everything_it_knows(hub, model, folder, tmp_path, monkeypatch, capsys):
    here = ("--adapter", folder, "--repo_id", REPO)
    with pytest.raises(SystemExit, match="can't be published yet"):
        publish(monkeypatch, capsys, *here)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    listed = publish(monkeypatch, capsys, *here, "--base", BASE, "--dry_run").split()
    assert set(listed) == (ADAPTER | TOKENIZER) - {".gitattributes"} and not writes(hub)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    options = ("--private", "--report", tmp_path / "report", "--license", "apache-2.0", "--datasets", "me/letters")
    said = publish(monkeypatch, capsys, *here, "--base", BASE, *options)
    assert f"{REPO}/commit/{hub.repos[REPO].refs['main']}" in said and hub.repos[REPO].private
    pictures = {"frontier.png", "expert_use.png", "captured.png", "threshold.png"}
    assert set(hub.files(REPO)) == ADAPTER | TOKENIZER | pictures
    assert read_adapter(str(folder)).values["base_model_name_or_path"] == BASE
    again = MoExtendForCausalLM.from_pretrained(REPO)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)

    card = ModelCard.load(REPO)  # as anybody reads it from the Hub
    assert card.data.license == "apache-2.0" and card.data.datasets == ["me/letters"]
    assert card.data.metrics == ["exact_match", "perplexity", "perplexity_ratio", "kl_divergence"]
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found["letters", "exact_match"] == 0.45 and found["held out", "perplexity_ratio"] == 1.25
    assert "| exact match, 1,000 questions | 6.25% | 45% | higher |" in section(card.text, "Results")
    assert "| law |" in section(card.text, "Forgetting")
    assert "| learning_rate | 0.01 |" in section(card.text, "Training")
    for picture in pictures:
        assert f"]({picture})" in card.text
    assert str(tmp_path) not in card.content


def test_a_filled_card_is_filled_anew_unless_somebody_has_made_it_their_own(hub, folder, monkeypatch, capsys):
    arguments = ("--adapter", folder, "--repo_id", REPO, "--base", BASE)
    filled = (folder / "README.md").read_text()
    assert "path/to/this/adapter" in filled and ModelCard(filled).data.base_model is None
    publish(monkeypatch, capsys, *arguments)
    card = hub.files(REPO)["README.md"].decode()
    assert (
        ModelCard(card).data.base_model == BASE and f'from_pretrained("{REPO}"' in card and "| learning_rate |" in card
    )
    (folder / "README.md").write_text(card.replace("<!-- Filled by moextend", "<!-- Written by me"))
    publish(monkeypatch, capsys, *arguments, "--revision", "mine")
    assert hub.files(REPO, "mine")["README.md"].decode() == (folder / "README.md").read_text()
    assert "Written by me" in hub.files(REPO, "mine")["README.md"].decode()


def test_the_script_does_not_publish_a_damaged_adapter(hub, folder, monkeypatch, capsys):
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)
    with pytest.raises(SystemExit, match="damaged"):
        publish(monkeypatch, capsys, "--adapter", folder, "--repo_id", REPO, "--base", BASE)
    with pytest.raises(SystemExit, match="me/elsewhere: no such folder"):
        publish(monkeypatch, capsys, "--adapter", "me/elsewhere", "--repo_id", REPO)
    with pytest.raises(SystemExit, match="neither .* nor .* is there"):
        publish(monkeypatch, capsys, "--adapter", folder / "report", "--repo_id", REPO)
    assert not writes(hub)


def test_pushing_from_a_loaded_adapter_changes_no_tensor(hub, model, tmp_path):
    model.push_to_hub(REPO)
    MoExtendForCausalLM.from_pretrained(REPO).push_to_hub("me/copy")
    (tmp_path / "one").write_bytes(hub.files(REPO)[FILE])
    (tmp_path / "two").write_bytes(hub.files("me/copy")[FILE])
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
