"""transformers' own common tests, with models and a processor of ours: run by test_common.py, each class in a process.

`TRANSFORMERS_TESTS` is the folder `tests` of transformers' source. Its mixins ask for a model tester (`ModelTester`),
which makes configs and inputs, and for classes that make a random model of a config. A class of ours then writes its
random base and encoder to a folder (`pretrained`): an adapter is saved without them and loads onto checkpoints.
"""

import copy
import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import torch
from conftest import PAPER, make_encoder, shake
from families import VOCAB, make_config
from test_processing_moextend import build_processor, picture
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from modeling_moextend import MoExtendForCausalLM, MoExtendModel, MoExtendProcessor
from modeling_moextend.attaching.parts import identity

SOURCE = Path(os.environ["TRANSFORMERS_TESTS"])
ROWS, LENGTH, IMAGE, PATCHES = 7, 7, VOCAB, 4


def picture_file(url):
    """The path of a picture, for the URL of one."""
    path = Path(tempfile.gettempdir()) / "moextend-common-picture.png"
    if not path.exists():
        picture().save(path)
    return str(path)


def stand_in(name, **attributes):
    """A module with `attributes`, in the place of one that is not there."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)


def from_source(name, attribute):
    return getattr(importlib.import_module(f"common_tests.{name}"), attribute)


stand_in("common_tests")
sys.modules["common_tests"].__path__ = [str(SOURCE)]
stand_in("fetch_hub_objects_for_ci", url_to_local_path=picture_file)  # no test reaches for the Hub
stand_in("common_tests.exporters")
stand_in("common_tests.exporters.test_export", ExportTesterMixin=type("NoExport", (), {}))  # not what this is about
if not (SOURCE / "generation").exists():  # a source distribution leaves it out
    stand_in("common_tests.generation")
    stand_in("common_tests.generation.test_utils", GenerationTesterMixin=type("NoGeneration", (), {}))

ModelTests = from_source("test_modeling_common", "ModelTesterMixin")
GenerationTests = from_source("generation.test_utils", "GenerationTesterMixin")
ProcessorTests = from_source("test_processing_common", "ProcessorTesterMixin")

# The common tests look a class up by its name to know whether it takes labels.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moextend"] = "MoExtendForCausalLM"
modeling_auto.MODEL_MAPPING_NAMES["moextend"] = "MoExtendModel"


def pretrained(model_class):
    """`model_class`; the random base and encoder that it makes of a config are saved, and the config says where."""

    def init(self, config, base=None, encoders=None, **kwargs):
        model_class.__init__(self, config, base, encoders, **kwargs)
        if base is not None or self.device.type == "meta":
            return
        folder, encoder = tempfile.mkdtemp(), self.encoder
        for part, name in ((self.base, "base"), (encoder, "encoder")):
            if part is not None:
                part.save_pretrained(f"{folder}/{name}")
                part.config.name_or_path = f"{folder}/{name}"
        for name, value in identity(self.base, {} if encoder is None else {"image": encoder}).items():
            if name not in ("text_config", "encoder_config"):
                setattr(self.config, name, value)
        shake(self)

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": __name__})


class ModelTester:
    """Configs and inputs as the common tests ask for them. `extended`: of ours; `images`: with an encoder."""

    batch_size, seq_length, is_training = ROWS, LENGTH, True
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size = 2, 4, 32, VOCAB

    def __init__(self, test):
        self.test, self.config = test, make_config(test.family)
        self.config.update({"num_hidden_layers": 2, "head_dim": 8, "eos_token_id": None})
        if test.extended:
            choices = PAPER if test.family == "mixtral" else {"scope": "all"}
            choices |= {"encoder": make_encoder(), "scope": "modality"} if test.images else {}
            base = AutoModelForCausalLM.from_config(self.config)
            config = MoExtendForCausalLM.from_base(base, {0: [1], 1: [0, 2]}, **choices).config
            self.config = type(config).from_dict(config.to_dict())  # as read from a file: no implementation is chosen

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, VOCAB - 1, (ROWS, LENGTH))
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.test.extended and self.test.images:
            input_ids[:, 1 : 1 + PATCHES] = IMAGE
            inputs["pixel_values"] = torch.rand(ROWS, 3, 16, 16)
        return self.get_config(), inputs


class Common(ModelTests, GenerationTests):
    """The common tests, for each base plain, extended, and extended with an encoder."""

    extended = images = False
    additional_model_inputs = ["pixel_values"]
    test_all_params_have_gradient = False  # as all MoE models of transformers say: not every expert gets a token

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = ModelTester(self)

    @property
    def all_model_classes(self):
        if self.extended:
            return pretrained(MoExtendModel), pretrained(MoExtendForCausalLM)
        config = self.model_tester.config
        return MODEL_MAPPING[type(config)], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


class MixtralPlain(Common, unittest.TestCase):
    family = "mixtral"


class MixtralText(MixtralPlain):
    extended = True


class MixtralImage(MixtralText):
    images = True


class QwenPlain(Common, unittest.TestCase):
    family = "qwen3_moe"


class QwenText(QwenPlain):
    extended = True


class QwenImage(QwenText):
    images = True


class Processor(ProcessorTests, unittest.TestCase):
    """Of an adapter with images alone: the tests take every part that the class knows for one that is there."""

    processor_class = MoExtendProcessor

    @classmethod
    def setUpClass(cls):
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        patched = mock.patch.object(MoExtendProcessor, "get_attributes", parts)
        patched.start()
        cls.addClassCleanup(patched.stop)
        super().setUpClass()

    @classmethod
    def _setup_from_components(cls):
        return build_processor()

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": PATCHES}
