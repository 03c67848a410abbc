"""Integers and floats of numpy as arguments mean the same as numbers of Python."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_models import build_flm, build_model

from modeling_flm import FLMConfig, FLMGenerationConfig, FLMPipeline, FMLMConfig, StochasticFlowMapSamplerConfig
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, generate_samples, pack_dataset, train_tokenizer
from modeling_flm.trainers.data import pad_dataset


Int, Float = np.int64, np.float32


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("fmlm", per_token_timesteps=True, time_reparameterization=None, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(f"w{n}" for n in range(50))], "word", vocab_size=53)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": Int(3), "num_steps": np.int32(2), "length": Int(6), "batch_size": np.uint8(2)},
        {"temperature": Float(0.5), "top_k": Int(5), "top_p": np.float64(0.5), "gamma": Float(0.5)},
        {"timestep_grid": [Float(0), Float(0.5), Float(1)]},
        {"timestep_grid": np.array([0, 0.25, 1])},
        {"num_rounds": Int(2), "commit_threshold": Float(0.5), "commit_budget": Int(2)},
        {"block_length": Int(4), "num_steps": Int(2)},
        {"sampler_config": StochasticFlowMapSamplerConfig(Float(0.5)), "num_steps": 2},
    ],
)
def test_generate(options, model):
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}
    if isinstance(options.get("timestep_grid"), list):
        plain["timestep_grid"] = [0.0, 0.5, 1.0]
    if "sampler_config" in options:
        plain["sampler_config"] = StochasticFlowMapSamplerConfig(0.5)
    texts = [model.generate(**{"num_samples": 2, **each}, generator=seeded()) for each in (options, plain)]
    assert torch.equal(*texts)


def test_evaluation(model, tokenizer):
    samples = generate_samples(model, np.arange(3), Int(1), batch_size=Int(2), num_steps=Int(2))
    assert torch.equal(samples, generate_samples(model, [0, 1, 2], 1, batch_size=2, num_steps=2))
    flm, ids = build_flm(), torch.randint(53, (2, 12))
    bounds = [flm.log_likelihood_bound(ids, num_times=n(4), batch_size=n(1), generator=seeded()) for n in (Int, int)]
    assert torch.equal(bounds[0].log_likelihood, bounds[1].log_likelihood)
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer)
    assert len(pipe("w1 w2", num_return_sequences=Int(2), num_steps=Int(2), batch_size=Int(2))) == 2
    assert len(pipe(num_samples=Int(2), num_steps=Int(2), length=Int(6))) == 2


@pytest.mark.parametrize("config_class", [FLMConfig, FMLMConfig])
def test_configurations(config_class):
    numbers = {
        "vocab_size": Int(53),
        "hidden_size": Int(32),
        "num_attention_heads": np.int32(4),
        "dropout": Float(0.5),
    }
    numbers |= {"final_logit_softcapping": Float(30), "eos_token_id": Int(2), "per_token_timesteps": np.bool_(True)}
    config = config_class(**numbers)
    assert json.loads(config.to_json_string())["vocab_size"] == 53
    assert config.to_dict() == config_class(**{name: value.item() for name, value in numbers.items()}).to_dict()
    generation = FLMGenerationConfig(num_steps=Int(4), gamma=Float(0.5), eos_token_id=[Int(1), Int(2)])
    generation.length = Int(8)
    assert json.loads(generation.to_json_string())["length"] == 8


def test_training(tokenizer, tmp_path):
    texts = Dataset.from_dict({"text": ["w1 w2 w3 w4"] * 50})
    assert train_tokenizer(["a b c"] * 9, "word", vocab_size=Int(9)).vocab_size <= 9
    padded = pad_dataset(texts, tokenizer, Int(8))
    packed = pack_dataset(texts, tokenizer, Int(8))
    assert len(padded[0]["input_ids"]) == len(packed[0]["input_ids"]) == 8
    numbers = {"max_steps": Int(2), "seed": Int(3), "data_seed": Int(3), "per_device_train_batch_size": Int(4)}
    numbers |= {"save_steps": Int(1), "logging_steps": Int(1), "sample_steps": Int(1), "sample_num_samples": Int(2)}
    numbers |= {"sample_num_steps": Int(2), "eval_likelihood_times": Int(4), "gradient_accumulation_steps": Int(1)}
    numbers |= {
        "learning_rate": Float(0.5),
        "ema_decay": Float(0.5),
        "prompt_fraction": Float(0.5),
        "warmup_steps": Int(1),
    }
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "eval_strategy": "no"}
    weights = []
    for name, each in (("numpy", numbers), ("python", {key: value.item() for key, value in numbers.items()})):
        args = FLMTrainingArguments(tmp_path / name, **each, **options)
        torch.manual_seed(0)
        trainer = FLMTrainer(build_flm(), args, train_dataset=packed, eval_dataset=packed, processing_class=tokenizer)
        trainer.train()
        trainer.evaluate()
        weights.append(trainer.model.lm_head.weight)
    assert torch.equal(*weights)
