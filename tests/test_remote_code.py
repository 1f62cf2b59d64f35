"""A published adapter loads with transformers alone: in processes that cannot import the package."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_base, make_encoder, shake
from hub_server import running_hub
from PIL import Image
from safetensors.torch import load_file, save_file
from test_processing_moextend import build_processor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from modeling_moextend import MoExtendForCausalLM, MoExtendModel, MoExtendProcessor, load_processor
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.tools.base_weights import skeleton
from modeling_moextend.tools.merge import merge
from modeling_moextend.tools.verification import verify_adapter

ROOT = Path(__file__).parents[1]
PLAN = {1: [0], 3: [2, 5]}
PROMPT = "USER: <image> what? ASSISTANT:"

START = """
import importlib.util, json, os, sys
import torch
from pathlib import Path
root = Path(sys.argv[1])
sys.modules["modeling_moextend"] = None  # installed or not, importing the package fails here
"""

LOAD = """
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer, is_torch_available
from transformers.utils import is_peft_available
folder, trust, places = str(root / "adapter"), {"trust_remote_code": True}, {}
inputs = load_file(root / "inputs.safetensors")
found = {"peft": is_peft_available(), "model_type": AutoConfig.from_pretrained(folder, **trust).model_type}
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
found["class"] = [type(model).__module__.split(".")[0], type(model).__name__]
outputs = {"logits": model(**inputs).logits}
outputs["generated"] = model.generate(**inputs, max_new_tokens=4, pad_token_id=0)
found["trainable"] = model.num_parameters(only_trainable=True)
model.save_pretrained(root / "again")
"""

MORE = """
moved = {"base": str(root / "moved_base"), "encoder": str(root / "moved_encoder")}
text_to_text = AutoModelForImageTextToText.from_pretrained(folder, **trust, **moved)
outputs["moved"] = text_to_text(**inputs).logits
body = AutoModel.from_pretrained(folder, **trust)
outputs["hidden"] = body(**inputs).last_hidden_state
again = AutoModelForCausalLM.from_pretrained(str(root / "again"), **trust)
outputs["again"] = again(**inputs).logits
text_to_text.save_pretrained(root / "third")  # of code that came from a folder that remote code had saved
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
found["text"] = tokenizer.decode(tokenizer("what? a", add_special_tokens=False).input_ids)
processor = AutoProcessor.from_pretrained(folder, **trust)
processed = processor(images=Image.open(root / "picture.png"), text=sys.argv[2], return_tensors="pt")
outputs["processed"] = processed["input_ids"]
outputs["seen"] = model(**processed).logits
model.load_adapter(str(root / "law"), adapter_name="law")
outputs["rows"] = model(**inputs, adapter_names=["default", "law"]).logits
"""

END = """
save_file({name: tensor.detach().contiguous() for name, tensor in outputs.items()}, root / "outputs.safetensors")
(root / "found.json").write_text(json.dumps(found))
"""

WITHOUT_PEFT = """
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] == "peft" else find_spec(name, *args)
"""


def run(root, *parts, arguments=(), environment=None):
    """Runs the parts in a fresh process in `root`, offline, with modules cached below `root`."""
    given, environment = environment or {}, {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules"), "HF_HOME": str(root / "home")}
    environment |= given
    command = [sys.executable, "-P", "-c", "".join(parts), str(root), *arguments]
    return subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of a base, an encoder and an adapter with its processor, and the model that was saved."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = copy.deepcopy(make_base("qwen3_moe").config)
    config.vocab_size = 260  # the tokenizer's, so that <image> is the first id past the embedding
    base = AutoModelForCausalLM.from_config(config)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=32, patch_size=16))
    for name, model in (("base", base), ("encoder", encoder)):
        model.save_pretrained(root / name)
        (root / f"moved_{name}").symlink_to(root / name)
    choices = {"scope": "modality", "selection": "compete", "calibration": "routed"}
    model = MoExtendForCausalLM.from_base(str(root / "base"), PLAN, encoder=str(root / "encoder"), **choices)
    shake(model).eval().save_pretrained(root / "adapter")
    build_processor().save_pretrained(root / "adapter")
    exclusive = {"scope": "all", "selection": "exclusive", "expert_rank": 3}
    law = MoExtendForCausalLM.from_base(str(root / "base"), {0: [1]}, **exclusive)
    shake(law, seed=1).save_pretrained(root / "law")
    Image.new("RGB", (40, 50), (200, 30, 90)).save(root / "picture.png")
    ids = torch.arange(3, 17).repeat(2, 1)
    ids[0, 2:6] = 260
    inputs = {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
    save_file(inputs, root / "inputs.safetensors")
    return root, model, inputs


def check(root, model, inputs):
    """What the child found, compared with this process; returns it for further checks."""
    found, outputs = json.loads((root / "found.json").read_text()), load_file(root / "outputs.safetensors")
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(outputs["logits"], expected)
    assert torch.equal(outputs["generated"], model.generate(**inputs, max_new_tokens=4, pad_token_id=0))
    assert found["model_type"] == "moextend"
    assert found["class"] == ["transformers_modules", "MoExtendForCausalLM"]
    size = sum(tensor.numel() for tensor in load_file(root / "adapter" / FILE).values())
    assert found["trainable"] == size
    ours, theirs = load_file(root / "adapter" / FILE), load_file(root / "again" / FILE)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return found, outputs, expected


def test_everything_loads_with_transformers_alone(published):
    root, model, inputs = published
    child = run(root, START, LOAD, MORE, END, arguments=[PROMPT])
    assert child.returncode == 0, child.stderr[-3000:]
    found, outputs, expected = check(root, model, inputs)
    assert torch.equal(outputs["moved"], expected) and torch.equal(outputs["again"], expected)
    body = MoExtendModel.from_pretrained(root / "adapter")
    assert torch.equal(outputs["hidden"], body(**inputs).last_hidden_state)
    assert found["text"] == "what? a"
    processed = build_processor()(images=Image.open(root / "picture.png"), text=PROMPT, return_tensors="pt")
    assert torch.equal(outputs["processed"], processed["input_ids"])
    assert torch.equal(outputs["seen"], model(**processed).logits)
    both = MoExtendForCausalLM.from_pretrained(root / "adapter")
    both.load_adapter(root / "law", adapter_name="law")
    rows = both(**inputs, adapter_names=["default", "law"]).logits
    assert torch.equal(outputs["rows"], rows) and not torch.allclose(rows[1], expected[1], atol=1e-2)
    code = {path.name for path in (root / "adapter").glob("*_moextend.py")}
    assert code - {path.name for path in (root / "third").glob("*_moextend.py")} <= {"processing_moextend.py"}
    again = MoExtendForCausalLM.from_pretrained(root / "third")  # and back into this process
    assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.slow
def test_without_peft_nothing_is_different(published):
    root, model, inputs = published
    child = run(root, START, WITHOUT_PEFT, LOAD, END)
    assert child.returncode == 0, child.stderr[-3000:]
    found, *_ = check(root, model, inputs)
    assert found["peft"] is False


ALONE = """
import contextlib
inputs = load_file(root / "inputs.safetensors")
before, found["refused"] = outputs["logits"], {}
for name, call in {
    "extend": lambda: model.extend({0: [1]}),
    "add_adapter": lambda: model.add_adapter("law", extended_layers={0: [1]}),
    "from_base": lambda: type(model).from_base(str(root / "base"), {0: [1]}),
    "set_trainable": lambda: model.set_trainable(),
    "push_to_hub": lambda: model.push_to_hub("me/mine"),
    "save_pretrained": lambda: model.save_pretrained(root / "pushed", push_to_hub=True, repo_id="me/mine"),
}.items():
    try:
        call()
    except ImportError as error:
        found["refused"][name] = str(error)
found["untouched"] = torch.equal(model(**inputs).logits, before) and list(model.adapters) == ["default"]
found["written"] = (root / "pushed").exists()
"""


@pytest.mark.slow
def test_what_needs_the_package_says_so_and_leaves_the_model_as_it_was(published):
    root, *_ = published
    child = run(root, START, LOAD, ALONE, END)
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads((root / "found.json").read_text())
    names = {"extend", "add_adapter", "from_base", "set_trainable", "push_to_hub", "save_pretrained"}
    assert found["refused"].keys() == names
    assert all(
        "needs the moextend package: pip install 'moextend[train]'" in text for text in found["refused"].values()
    )
    assert found["untouched"] and not found["written"]


GROW = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root, outputs, trust = Path(sys.argv[1]), {}, {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(str(root / "adapter"), **trust)
law = AutoModelForCausalLM.from_pretrained(str(root / "law"), **trust)
import modeling_moextend  # registers its own classes; these two models keep those that came with them
model.extend({0: [1]})
found = {"trained": sorted(model.set_trainable("finetune", train_projector=False))}
outputs["grown"] = model(**load_file(root / "inputs.safetensors")).logits
model.save_pretrained(root / "grown")
law.add_adapter("top", extended_layers={2: [4]}, scope="all", selection="exclusive", expert_rank=2)
law.extend({3: [1]})
with torch.no_grad():
    for tensor in law.adapter_tensors().values():
        tensor.add_(0.1)
outputs["top"] = law(input_ids=torch.arange(3, 17)[None]).logits
law.save_pretrained(root / "top")
law.set_adapter("default", check_trained_on=False)
law.config.base_model_name_or_path = "org/base"
law.push_to_hub("me/law", token="hf_me", card={"license": "mit", "datasets": "org/data"})
modules = {type(module).__module__ for one in (model, law) for module in one.modules()}
found["code"] = sorted({name.split(".")[0] for name in modules if "moextend" in name})
"""


def test_a_remotely_loaded_model_grows_and_gets_a_card_where_the_package_is_installed(published, tmp_path):
    root, _, inputs = published
    with running_hub() as hub:
        hub.add("org/base", root / "base")
        child = run(root, GROW, END, environment={"PYTHONPATH": str(ROOT), **hub.environment(tmp_path)})
        assert child.returncode == 0, child.stderr[-3000:]
        card = hub.files("me/law")["README.md"].decode()
    found, outputs = json.loads((root / "found.json").read_text()), load_file(root / "outputs.safetensors")
    assert found["code"] == ["transformers_modules"], "no module is of the package's own classes"
    assert {name.split(".")[1] for name in found["trained"]} == {"0", "1", "3"}
    grown = MoExtendForCausalLM.from_pretrained(root / "grown")
    assert [*grown.config.extended_layers] == [0, 1, 3] and torch.equal(grown(**inputs).logits, outputs["grown"])
    both = MoExtendForCausalLM.from_pretrained(root / "law")
    both.load_adapter(root / "top", adapter_name="top")
    both.set_adapter(["default", "top"])
    assert torch.equal(both(input_ids=torch.arange(3, 17)[None]).logits, outputs["top"])
    assert all(line in card for line in ("license: mit", "org/data", "base_model: org/base", "from_pretrained("))


def test_no_code_runs_without_trust(published):
    root, _, _ = published
    script = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for loader in (AutoModelForCausalLM, AutoModel, AutoConfig):
    for trust in ({}, {"trust_remote_code": False}):
        try:
            loader.from_pretrained(str(root / "adapter"), **trust)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{loader.__name__} ran code")
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
assert not list(root.rglob("untrusted/**/*_moextend.py"))
"""
    child = run(root, START, 'os.environ["HF_MODULES_CACHE"] = str(root / "untrusted")\n', script)
    assert child.returncode == 0, child.stderr[-3000:]


# ---------------------------------------------------------------- what reaches the base


def test_options_given_to_auto_classes_reach_the_base(published):
    root, model, inputs = published
    for auto, dtype, attention, experts in (
        (AutoModelForCausalLM, torch.bfloat16, "eager", "batched_mm"),
        (AutoModel, torch.float32, "sdpa", "eager"),
    ):
        loaded = auto.from_pretrained(
            root / "adapter", dtype=dtype, attn_implementation=attention, experts_implementation=experts
        )
        assert loaded.base.dtype == dtype and loaded.encoder.dtype == dtype
        assert loaded.base.config._attn_implementation == attention
        assert loaded.base.config._experts_implementation == experts
    loaded = AutoModelForCausalLM.from_pretrained(root / "adapter")
    assert loaded.base.config._attn_implementation == model.base.config._attn_implementation == "sdpa"
    assert loaded.base.config._experts_implementation == model.base.config._experts_implementation


def test_device_map_reaches_the_base(published, monkeypatch):
    root, model, inputs = published
    given = []
    load = AutoModelForCausalLM.from_pretrained

    def record(path, *args, **kwargs):
        given.append((str(path), kwargs.get("device_map")))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    loaded = AutoModelForCausalLM.from_pretrained(str(root / "adapter"), device_map="auto")
    assert given == [(str(root / "adapter"), "auto"), (str(root / "base"), "auto")]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """Remote code loaded by this process lies in a folder of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Metrics put the user's own folder of dynamic modules on the path, and Python would look for ours in there.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


TRAP = """
from pathlib import Path
from transformers import MixtralForCausalLM
Path({marker!r}).touch()
class Trap(MixtralForCausalLM):
    pass
"""


@pytest.fixture
def trapped(tmp_path):
    """An adapter on a base that comes with code of its own, and the file that the code would make."""
    marker = tmp_path / "the base's code ran"
    base = make_base()
    base.config.auto_map = {"AutoModelForCausalLM": "modeling_trap.Trap", "AutoModel": "modeling_trap.Trap"}
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "modeling_trap.py").write_text(TRAP.format(marker=str(marker)))
    model = shake(MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN))
    model.save_pretrained(tmp_path / "adapter")
    assert not marker.exists()
    return tmp_path / "adapter", marker


def test_the_bases_code_does_not_run_unless_the_call_trusts_it(trapped, code_cache):
    folder, marker = trapped
    MoExtendForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    MoExtendForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert not marker.exists()
    MoExtendForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists(), "else the checks before say nothing"


OWN_CONFIG = """
from transformers import MixtralConfig
class OwnConfig(MixtralConfig):
    model_type = "a_family_of_its_own"
"""
OWN_MODEL = """
from transformers import MixtralForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
    config: OwnConfig
"""


def test_a_base_with_code_of_its_own_works_where_the_call_trusts_it(tmp_path, code_cache):
    folder, base = tmp_path / "base", make_base()
    folder.mkdir()
    (folder / "configuration_own.py").write_text(OWN_CONFIG)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = base.config.to_dict() | {"model_type": "a_family_of_its_own", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(base.state_dict()), folder / "model.safetensors", {"format": "pt"})
    model = shake(MoExtendForCausalLM.from_base(str(folder), PLAN, paper=True, trust_remote_code=True)).eval()
    inputs = {"input_ids": torch.arange(3, 13)[None]}
    for place in (tmp_path / "adapter", tmp_path / "again"):
        model.save_pretrained(place)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            MoExtendForCausalLM.from_pretrained(place, trust_remote_code=False)
        again = MoExtendForCausalLM.from_pretrained(place, trust_remote_code=True)
        assert type(again.config.text_config).__name__ == "OwnConfig"
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        model = again


@pytest.mark.parametrize("value", [None, False, True])
def test_trust_remote_code_is_handed_on_as_given(published, value, monkeypatch):
    root, _, _ = published
    given = {}

    def record(auto, load=AutoModel.from_pretrained.__func__):
        def from_pretrained(path, *args, **kwargs):
            given[Path(path).name] = kwargs.get("trust_remote_code")
            return load(auto, path, *args, **kwargs)

        return from_pretrained

    for auto in (AutoModel, AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", record(auto))
    options = {} if value is None else {"trust_remote_code": value}
    MoExtendForCausalLM.from_pretrained(root / "adapter", **options)
    assert given == {"base": bool(value), "encoder": False}, "an encoder is CLIP or SigLIP: it has no code of its own"


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nraise SystemExit\n"


def with_code(folder, marker, file, name, **entries):
    """`folder`, whose JSON `file` names code of its own for the auto class `name`."""
    values = json.loads((folder / file).read_text()) | entries
    reference = ["trap.C", "trap.C"] if name == "AutoTokenizer" else "trap.C"
    values["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "trap.C") | {
        name: reference
    }
    (folder / file).write_text(json.dumps(values))
    (folder / "trap.py").write_text(CODE.format(marker=str(marker)))
    return folder


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """A base, an encoder, a tokenizer, an image processor and a processor with code; adapters on bases with code."""
    root = tmp_path_factory.mktemp("traps")
    marker = root / "code ran"
    make_base().save_pretrained(root / "sound")
    make_encoder().save_pretrained(root / "sees")
    for name in ("base", "tokenizer"):
        make_base().save_pretrained(root / name)
    for name in ("encoder", "image"):
        make_encoder().save_pretrained(root / name)
    model = MoExtendForCausalLM.from_base(str(root / "base"), PLAN, encoder=str(root / "encoder"), scope="modality")
    model.save_pretrained(root / "adapter")
    own = {"model_type": "a_family_of_its_own"}
    for name in ("base", "encoder"):
        with_code(root / name, marker, "config.json", "AutoModel", **own)
    processor = build_processor()
    for name in ("tokenizer", "sound"):
        processor.tokenizer.save_pretrained(root / name)
    with_code(root / "tokenizer", marker, "tokenizer_config.json", "AutoTokenizer", tokenizer_class="Own")
    for name in ("image", "sees"):
        processor.image_processor.save_pretrained(root / name)
    file = "preprocessor_config.json"
    with_code(root / "image", marker, file, "AutoImageProcessor", image_processor_type="Own")
    processor.save_pretrained(root / "processor")
    with_code(root / "processor", marker, "tokenizer_config.json", "AutoTokenizer", tokenizer_class="Own")
    return root, marker


CALLS = {  # each meets code: of the base, the encoder, the tokenizer, the image processor
    "base": lambda root: MoExtendForCausalLM.from_pretrained(root / "adapter", encoder=str(root / "sees")),
    "base, as the call says": lambda root: MoExtendForCausalLM.from_pretrained(
        root / "adapter", base=str(root / "base"), encoder=str(root / "sees")
    ),
    "base, undecided": lambda root: MoExtendForCausalLM.from_pretrained(
        root / "adapter", encoder=str(root / "sees"), trust_remote_code=None
    ),
    "base, by auto class": lambda root: AutoModelForCausalLM.from_pretrained(
        root / "adapter", encoder=str(root / "sees")
    ),
    "base, new": lambda root: MoExtendForCausalLM.from_base(str(root / "base"), PLAN),
    "encoder": lambda root: MoExtendForCausalLM.from_pretrained(root / "adapter", base=make_base()),
    "encoder, trusted base": lambda root: MoExtendForCausalLM.from_pretrained(
        root / "adapter", base=str(root / "sound"), trust_remote_code=True
    ),
    "encoder, new": lambda root: MoExtendForCausalLM.from_base(make_base(), PLAN, encoder=str(root / "encoder")),
    "encoder, load_adapter": lambda root: MoExtendForCausalLM.from_base(make_base(), PLAN).load_adapter(
        root / "adapter", "other"
    ),
    "encoder, as the call says": lambda root: MoExtendForCausalLM.from_base(make_base(), PLAN).load_adapter(
        root / "adapter", "other", encoder=str(root / "encoder")
    ),
    "tokenizer": lambda root: load_processor(root / "tokenizer"),
    "image processor": lambda root: load_processor(root / "sound", root / "image"),
    "image processor's config": lambda root: load_processor(root / "sound", root / "encoder"),
    "processor": lambda root: MoExtendProcessor.from_pretrained(root / "processor"),
    "processor, load_processor": lambda root: load_processor(root / "processor"),
    "processor, by auto class": lambda root: AutoProcessor.from_pretrained(root / "processor"),
    "verify": lambda root: verify_adapter(root / "adapter", encoder=root / "sees"),
    "verify, encoder": lambda root: verify_adapter(root / "adapter", base=root / "sound"),
    "verify, tokenizer": lambda root: verify_adapter(root / "adapter", base=root / "tokenizer", encoder=root / "sees"),
    "merge": lambda root: merge(root / "adapter", root / "merged", encoder=root / "sees"),
    "merge, encoder": lambda root: merge(root / "adapter", root / "merged", base=root / "sound"),
    "native": lambda root: merge(root / "adapter", root / "merged", native=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_asks_for_consent_and_no_code_runs_without_it(call, traps, code_cache, monkeypatch):
    root, marker = traps
    marker.unlink(missing_ok=True)  # of another case
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")  # as `yes |` would answer
    with contextlib.suppress(ValueError, OSError):  # where code would be needed
        CALLS[call](root)
    assert not asked and not marker.exists()


def test_code_runs_where_it_is_asked_for(traps, code_cache):
    """Else the test above says nothing."""
    root, marker = traps
    for call in (
        lambda: MoExtendForCausalLM.from_base(str(root / "base"), PLAN, trust_remote_code=True),
        lambda: load_processor(root / "tokenizer", trust_remote_code=True),
        lambda: MoExtendProcessor.from_pretrained(root / "processor", trust_remote_code=True),
    ):
        with pytest.raises(SystemExit):
            call()
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("call", ["encoder", "encoder, new", "verify, encoder"])
def test_an_encoder_with_code_is_refused_by_what_it_is(call, traps):
    message = "'a_family_of_its_own' model; an encoder must be a model of transformers"
    with pytest.raises(ValueError, match=message):
        CALLS[call](traps[0])


def test_a_config_with_code_makes_no_code_run(code_cache, monkeypatch):
    """A model of a config alone, as merging makes one: nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    model = MoExtendForCausalLM.from_base(make_base(), PLAN, encoder=make_encoder(), scope="modality")
    for config in (model.config.text_config, model.config.encoder_config):
        config.auto_map = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "someone/else--trap.C")
    assert MoExtendForCausalLM(model.config).encoder is not None
    skeleton(model.config.text_config)


def test_every_shipped_file_is_saved_and_nothing_else_is_imported(published):
    root, _, _ = published
    package = Path(sys.modules["modeling_moextend"].__file__).parent
    names = {path.name for path in package.glob("*_moextend.py")}
    assert {path.name for path in (root / "adapter").glob("*.py")} == names
    for name in names:
        assert (root / "adapter" / name).read_text() == (package / name).read_text()


def test_the_config_names_the_classes_that_load_it(published):
    root, _, _ = published
    config = json.loads((root / "adapter" / "config.json").read_text())
    assert config["model_type"] == "moextend" and config["architectures"] == ["MoExtendForCausalLM"]
    for auto, reference in config["auto_map"].items():
        module, name = reference.split(".")
        assert f"class {name}(" in (root / "adapter" / f"{module}.py").read_text(), auto
    assert type(AutoConfig.from_pretrained(root / "adapter")).__name__ == "MoExtendConfig"
    assert not (root / "adapter" / "adapter_config.json").exists(), "transformers would call PEFT"
    assert "qwen3_moe" in FAMILIES
