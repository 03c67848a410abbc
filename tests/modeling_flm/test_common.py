"""
The common tests of transformers' models, for our classes. Their files come from PyPI's source distribution of the installed
version, which lacks the tests of `generate`, of exporters and of trainers.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from modeling_flm import FLMConfig, FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkConfig, FMLMTwoNetworkModel
from modeling_flm.base_flm import FLMPreTrainedModel


CONFIGS = {FLMModel: FLMConfig, FMLMModel: FMLMConfig, FMLMTwoNetworkModel: FMLMTwoNetworkConfig}

# Tests that do not apply (by the beginning of their names), and why
NOT_APPLICABLE = {
    "test_inherits_generation_mixin": "`generate` is our own, from noise to text at once",
    "test_generation_tester_mixin_inheritance": "see `test_inherits_generation_mixin`; the mixin is not in the source distribution",
    "test_model_base_model_prefix": "the backbone and the head are one class",
    "test_resize_tokens_embeddings": "times and noise depend on the vocabulary size, which is fixed; its message is tested by us",
    "test_resize_embeddings_untied": "see `test_resize_tokens_embeddings`",
    "test_model_rope": "other types of rotary embeddings are refused",
    "test_get_": "the models have no images, video or audio",
}
WITH_A_SOFTCAP = {
    "test_can_set_attention_dynamically": "'sdpa' cannot apply the softcap, and is refused",
    "test_sdpa_can_dispatch_non_composite_models": "see `test_can_set_attention_dynamically`",
}
OF_TWO_NETWORKS = {
    "test_retain_grad_hidden_states_attentions": "hidden states are returned concatenated, as copies",
    "test_training_gradient_checkpointing": "the flow is frozen, and training it is refused",
    "test_inputs_embeds": "a state is as wide as the embeddings of both networks",
}

# Common tests that take `labels`, which need noised states
WITH_LABELS = (
    "test_training",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_model_outputs_equivalence",
)


@pytest.fixture(scope="module")
def common_tests(request):
    """The module `test_modeling_common` of the installed version, and `test_configuration_common`."""
    version = transformers.__version__
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "modeling-flm" / f"transformers-{version}"
    )
    package = cache / "transformers_tests"
    if not package.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
            subprocess.run([*command, "--dest", scratch, f"transformers=={version}"], check=True)
            (finished := Path(scratch, "tests")).mkdir()
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).match("transformers-*/tests/test_*.py"):
                        (finished / Path(member.name).name).write_bytes(archive.extractfile(member).read())
            (finished / "__init__.py").touch()
            try:
                finished.rename(package)
            except OSError:  # another process was faster
                assert package.is_dir()
    for path in package.glob("*.py"):
        for marker in set(re.findall(r"\bmark\.(\w+)", path.read_text())):
            request.config.addinivalue_line("markers", f"{marker}: of transformers")
    missing = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(cache)
        for name, values in missing.items():
            module = types.ModuleType(f"{package.name}.{name}")
            vars(module).update(values)
            patch.setitem(sys.modules, module.__name__, module)
        names = ("test_modeling_common", "test_configuration_common")
        yield [importlib.import_module(f"{package.name}.{name}") for name in names]


class ModelTester:
    """What the common tests ask of a model's own tests: a small configuration, and inputs."""

    is_training = True
    batch_size, seq_length, vocab_size = 13, 7, 99  # some tests extend batches below 13 with times at random

    def __init__(self, model_class: type[FLMPreTrainedModel], softcap: float | None):
        self.model_class, self.softcap = model_class, softcap
        num_networks = 2 if model_class is FMLMTwoNetworkModel else 1
        # Of outputs
        self.hidden_size, self.num_attention_heads, self.num_hidden_layers = 32 * num_networks, 4 * num_networks, 2
        self.pad_token_id, self.bos_token_id, self.eos_token_id = 0, 1, 2

    def get_config(self):
        return CONFIGS[self.model_class](
            vocab_size=self.vocab_size,
            hidden_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            conditioning_size=16,
            timestep_embedding_size=32,
            attn_logit_softcapping=self.softcap,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length)),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
            "timesteps": torch.linspace(0.1, 0.6, self.batch_size),
        }
        if self.model_class is not FLMModel:
            inputs["target_timesteps"] = torch.linspace(0.7, 1.0, self.batch_size)
        return self.get_config(), inputs


def noising(model_class: type[FLMPreTrainedModel]) -> type[FLMPreTrainedModel]:
    """Derives a class that noises its `input_ids` if there are `labels`, as the trainers do."""

    class NoisingModel(model_class):
        def forward(self, input_ids=None, timesteps=None, *args, inputs_embeds=None, labels=None, **kwargs):
            if labels is not None and inputs_embeds is None:
                noise_size = min(self.config.vocab_size, self.state_embedding.shape[1])
                noise = torch.randn(*input_ids.shape, noise_size, generator=torch.Generator().manual_seed(0))
                input_ids, inputs_embeds = None, self.make_state(input_ids, timesteps, noise)
            return super().forward(input_ids, timesteps, *args, inputs_embeds=inputs_embeds, labels=labels, **kwargs)

    NoisingModel.__name__ = model_class.__name__
    return NoisingModel


def make_test_case(common_tests, model_class, softcap) -> type[unittest.TestCase]:
    modeling, configuration = common_tests
    not_applicable = [*NOT_APPLICABLE, *(WITH_A_SOFTCAP if softcap else ())]
    not_applicable += OF_TWO_NETWORKS if model_class is FMLMTwoNetworkModel else ()

    class ModelTest(modeling.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        additional_model_inputs = ["timesteps", "target_timesteps"]
        test_can_init_all_missing_weights_before_2023 = True  # the year of a copyright line that we do not have

        def setUp(self):
            self.model_tester = ModelTester(model_class, softcap)
            if self._testMethodName in WITH_LABELS:
                self.all_model_classes = (noising(model_class),)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class)
            return {**inputs, "labels": inputs["input_ids"].clone()} if return_labels else inputs

        def test_config(self):
            config_class = CONFIGS[model_class]
            configuration.ConfigTester(
                self, config_class=config_class, hidden_size=32, num_attention_heads=4
            ).run_common_tests()

    for name in dir(ModelTest):
        if name.startswith(tuple(not_applicable)) and callable(getattr(ModelTest, name)):
            setattr(ModelTest, name, None)
    return ModelTest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("softcap", [50.0, None], ids=["softcap", "no_softcap"])
@pytest.mark.parametrize("model_class", CONFIGS)
def test_common_tests_of_transformers(common_tests, model_class, softcap, monkeypatch):
    # As if the class were one of transformers'
    monkeypatch.setitem(MODEL_MAPPING_NAMES, CONFIGS[model_class].model_type, model_class.__name__)
    for base_class in (FLMPreTrainedModel, FLMModel):  # logits of a head of zeros are all equal, and say nothing
        monkeypatch.setattr(base_class, "_layers_of_zeros", lambda self: [])
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(make_test_case(common_tests, model_class, softcap))
    result = unittest.TestResult()
    suite.run(result)
    failed = {test.id().split(".")[-1]: trace for test, trace in (*result.failures, *result.errors)}
    assert not failed, "\n".join([*failed, *failed.values()])
    assert result.testsRun - len(result.skipped) > 60
