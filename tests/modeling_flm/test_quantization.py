"""Quantized models: each method works with its defaults, and the table in the documentation covers these methods."""

import re
from pathlib import Path

import pytest
import quantization
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from places import ROOT
from small_models import build_model
from torch import nn
from train_tiny import build
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.joint_noise import noise_size
from modeling_flm.trainers import FLMTrainer


# Minimum share of equal tokens, for a model with random weights, which is less confident than a trained one
LEAST = {"8": 0.97, "4": 0.8, "dynamic": 0.9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models wide enough to be quantized in blocks of 64."""
    torch.manual_seed(0)
    folders = {}
    for kind in ("flm", "fmlm", "two_network"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        build_model(kind, hidden_size=64, conditioning_size=64).save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
def test_methods_work_with_their_defaults(kind, folders):
    options = ["--model", str(folders[kind]), "--num_samples", "32", "--num_steps", "2", "--device", "cpu"]
    rows = quantization.main(quantization.make_parser().parse_args(options))
    exact, *others = rows
    assert exact.name == "float32" and exact.agreement == 1
    for row in others:
        least = next((share for word, share in LEAST.items() if word in row.name.replace("bfloat16", "")), 0.97)
        assert row.agreement > least, row.name
        assert row.megabytes < 0.85 * exact.megabytes, row.name


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_times_and_head_are_not_quantized(options, folders):
    """Time embeddings are small and the head decides about tokens: both stay in float32."""
    for kind, path in folders.items():
        model = AutoModel.from_pretrained(path, quantization_config=BitsAndBytesConfig(**options))
        plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert all(re.search("time_embedding|lm_head|loss_weighting", name) for name in plain)
        quantized = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - plain
        assert {name.split(".")[-1] for name in quantized} == {
            "qkv_proj",
            "o_proj",
            "up_proj",
            "down_proj",
            "modulation",
        }
        assert len(plain) >= {"flm": 3, "fmlm": 5, "two_network": 8}[kind]


@pytest.mark.parametrize(
    "config", [BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True), "Int8WeightOnlyConfig"]
)
def test_saved_again(config, folders, tmp_path):
    if isinstance(config, str):
        import torchao.quantization

        config = TorchAoConfig(getattr(torchao.quantization, config)())
    model = AutoModel.from_pretrained(folders["fmlm"], quantization_config=config)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    texts = [each.generate(num_samples=8, generator=torch.Generator().manual_seed(0)) for each in (model, loaded)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("how", ["torch", "torchao"])
def test_loss_of_a_quantized_head(how, folders, batch):
    """A quantized head is called, because its weight cannot be read."""
    model = FLMModel.from_pretrained(folders["flm"])
    if how == "torch":
        model.lm_head = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.lm_head), {nn.Linear})[0]
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        assert type(model.lm_head.weight) is not nn.Parameter
    noise = torch.randn(*batch["input_ids"].shape, noise_size(model.state_embedding))
    state = model.make_state(batch["input_ids"], batch["timesteps"], noise).detach()
    output = model(inputs_embeds=state, timesteps=batch["timesteps"], labels=batch["input_ids"])
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.loss.requires_grad == (how == "torchao")  # torch has no gradients of its own


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["qkv_proj", "o_proj", "lm_head"]])
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_adapters_on_quantized_weights_are_trained(options, targets, folders, tmp_path):
    """QLoRA: weights of 4 or 8 bit, adapters in float32, and blocks that are checkpointed with reentrant autograd."""
    plain = build(tmp_path, max_steps=4, eval_strategy="no", learning_rate=0.02)
    base = AutoModel.from_pretrained(folders["flm"], quantization_config=BitsAndBytesConfig(**options))
    model = get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(target_modules=targets, r=4))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = FLMTrainer(model, plain.args, train_dataset=plain.train_dataset)
    trainer.train()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != ("lora_" in name), name
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000


def test_from_flm_refuses_quantized_weights(folders):
    model = AutoModel.from_pretrained(folders["flm"], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="load it without quantization"):
        FMLMModel.from_flm(model)


def test_table_of_the_documentation():
    """The table has a row for each method, and better values than random weights."""
    lines = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| method | equal tokens | MB | ms per sample |")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :] if line.startswith("|")
    ]
    assert [row[0] for row in rows] == list(quantization.METHODS)
    assert all(float(row[1].removesuffix(" %")) > 95 for row in rows)
