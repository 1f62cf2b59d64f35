"""What is saved or published names no path of the machine that it was made on."""

import json
import os
import shutil

import pytest
from conftest import make_base, make_encoder, shake
from safetensors import safe_open
from test_audio import make_ears, make_processor, make_wordy_base
from test_processing_moextend import build_processor
from test_push_to_hub import BASE, REPO
from test_push_to_hub import hub as hub
from transformers import AutoProcessor

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, write_folder
from modeling_moextend.publishing.hub import publish_folder

SECRET = "someone"  # a folder that no file may name


@pytest.fixture
def folder(tmp_path):
    """An adapter with an encoder and a processor, all of whose parts lie in somebody's folder, links among them."""
    home = tmp_path / SECRET
    make_base().save_pretrained(home / "base")
    make_encoder().save_pretrained(home / "encoder")
    (tmp_path / "link").symlink_to(home / "base")
    build_processor().save_pretrained(home / "processor")
    processor = AutoProcessor.from_pretrained(home / "processor")
    options = {"encoder": str(home / "encoder"), "image_token_id": processor.image_token_id}
    model = shake(MoExtendForCausalLM.from_base(str(tmp_path / "link"), {1: [0]}, **options))
    model.save_pretrained(home / "first", max_shard_size="20KB")
    parts = {"base": str(tmp_path / "link"), "encoder": options["encoder"]}
    model = MoExtendForCausalLM.from_pretrained(home / "first", **parts)
    assert SECRET in model.config.name_or_path and SECRET in model.config.encoder_config._name_or_path
    model.save_pretrained(home / "adapter", max_shard_size="20KB")
    processor.save_pretrained(home / "adapter")
    return home / "adapter"


def naming(files, word=SECRET):
    """Names of the files in which `word` stands."""
    return sorted(name for name, content in files.items() if word.encode() in content)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def strings(value):
    """Every string of JSON's `value`."""
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def test_a_local_adapter_names_the_places_of_its_parts_and_no_others(folder, tmp_path):
    places = [str(tmp_path / "link"), str(tmp_path / SECRET / "encoder")]
    config = json.loads((folder / "config.json").read_text())
    assert sorted(text for text in strings(config) if str(tmp_path) in text) == sorted(places)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["config"])
        assert sorted(text for text in strings(header) if str(tmp_path) in text) == sorted(places)


def test_a_published_adapter_names_none(folder, hub, tmp_path):
    publish_folder(folder, REPO, base=BASE, encoder=BASE)
    assert naming(hub.files(REPO)) == naming(hub.files(REPO), str(tmp_path)) == []
    again = MoExtendForCausalLM.from_pretrained(folder, base=make_base(), encoder=make_encoder())
    again.save_pretrained(tmp_path / "again")
    assert naming(contents(tmp_path / "again")) == []


def test_ears_of_this_machine_are_not_named_either(hub, tmp_path):
    home, processor = tmp_path / SECRET, make_processor()
    make_ears().save_pretrained(home / "ears")
    options = {"encoder": str(home / "ears"), "audio_token_id": processor.audio_token_id}
    MoExtendForCausalLM.from_base(make_wordy_base(), {1: [0]}, **options).save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    assert naming(contents(tmp_path / "adapter")) == ["config.json", FILE]
    with pytest.raises(ValueError, match="its audio_encoder is '.*ears', a path .* --encoder owner/name"):
        publish_folder(tmp_path / "adapter", REPO, base=BASE)
    publish_folder(tmp_path / "adapter", REPO, base=BASE, encoder=BASE)
    assert naming(hub.files(REPO)) == naming(hub.files(REPO), str(tmp_path)) == []


def test_what_an_earlier_version_saved_is_made_anew_before_it_is_published(folder, hub):
    """It names the places of its parts inside their configs, which nobody reads."""
    model = MoExtendForCausalLM.from_pretrained(folder, base=make_base(), encoder=make_encoder())
    config = MoExtendConfig.from_dict(model.config.published().to_dict())
    config.base_model_name_or_path = config.encoder_name_or_path = BASE
    config.text_config._name_or_path = config.encoder_config._name_or_path = str(folder)
    tensors = {name: tensor.detach() for name, tensor in model.adapter_tensors().items()}
    write_folder(folder, tensors, config)
    assert naming(contents(folder)) == ["config.json", FILE]
    publish_folder(folder, REPO)
    assert naming(hub.files(REPO)) == [] == naming(contents(folder))
    before = contents(folder)
    publish_folder(folder, REPO)
    assert contents(folder) == before, "nothing to make anew"


ENTRIES = {
    "an entry for a place": ("tokenizer_config.json", {"tokenizer_file": "/home/nobody/x/tokenizer.json"}),
    "nested": ("processor_config.json", {"image_processor": {"name_or_path": "/home/nobody/x"}}),
    "anything that is there": ("tokenizer_config.json", {"note": ["see", os.__file__]}),
    "a config that its header contradicts": ("config.json", {"text_config": {"_name_or_path": "/home/nobody/x"}}),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_file_that_names_a_path_is_not_published(folder, hub, name):
    file, entries = ENTRIES[name]
    publish_folder(folder, REPO, base=BASE, encoder=BASE)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(ValueError, match=rf"{file} names a path of this machine, \w.* = '/.*Take that entry out"):
        publish_folder(folder, REPO)
    with pytest.raises(ValueError, match=f"{file} names a path of this machine"):
        publish_folder(folder, REPO, dry_run=True)


@pytest.mark.parametrize("name", ["merges.txt", "README.md", "tokenizer.json", FILE.replace(".", "-x."), "x.png"])
def test_a_link_out_of_the_folder_is_not_published(folder, hub, tmp_path, name):
    (tmp_path / "password").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / "README.md").write_text("![x](x.png)")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "password")
    with pytest.raises(ValueError, match=f"{name} is a link to .*password, outside the adapter's folder: put a copy"):
        publish_folder(folder, REPO, base=BASE, encoder=BASE)
    assert REPO not in hub.repos


def test_adapters_below_are_named_by_what_others_can_find(folder, tmp_path):
    """Even where the folder has gone meanwhile."""
    model = MoExtendForCausalLM.from_pretrained(folder, base=make_base(), encoder=make_encoder())
    shutil.rmtree(folder)
    model.add_adapter("on_top", {2: [0]}, scope="all")
    assert [entry["name_or_path"] for entry in model.config.trained_on] == [None]
    model.adapters["default"].config.name_or_path = "me/below"
    model.add_adapter("above", {3: [0]}, scope="all")
    assert [entry["name_or_path"] for entry in model.config.trained_on] == ["me/below", None]
