"""Generators of batches, in this process."""

import pytest
import torch
from generators import CausalGenerator, FlowGenerator, SampleRequest, split_sample

from modeling_flm.trainers import train_tokenizer


def requests(generator: FlowGenerator | CausalGenerator, count: int) -> list[SampleRequest]:
    prompt = generator.encode("the cat")
    return [SampleRequest(prompt, generator.max_length, torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", ["fmlm", "gpt2"])
def test_callback_ends_a_batch(name, models):
    generator = (FlowGenerator if name == "fmlm" else CausalGenerator)(models[name], models["tokenizer"])
    calls = []

    def callback():
        calls.append(None)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        generator.generate(requests(generator, 2), callback)
    assert len(calls) == 1


def test_generation_config_of_a_causal_model(models, monkeypatch):
    model, tokenizer = models["gpt2"], models["tokenizer"]
    generator = CausalGenerator(model, tokenizer)
    allowed = tokenizer.convert_tokens_to_ids(["the", "cat"])
    others = [token for token in range(len(tokenizer)) if token not in allowed]
    assert set(sum(generator.generate(requests(generator, 8), lambda: None), [])) & set(others)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", others)
    assert set(sum(generator.generate(requests(generator, 8), lambda: None), [])) == set(allowed)


@pytest.mark.parametrize(
    ("prompt", "shown", "text"),
    [
        ("the cat", "the cat", " sat"),
        ("the zebra and Cat", "the [UNK] and [UNK]", " sat"),
        (" the  cat ", "the cat", " sat"),  # with one space before the text
        ("zebra", "[UNK]", " sat"),
        ("cat [EOS]", "cat [UNK] [UNK] [UNK]", " sat"),  # names of special tokens are text
        ("", "", "sat"),
    ],
)
@pytest.mark.parametrize("name", ["fmlm", "gpt2"])
def test_prompts_are_shown_as_the_model_read_them(name, prompt, shown, text, models):
    tokenizer = models["tokenizer"]
    generator = (FlowGenerator if name == "fmlm" else CausalGenerator)(models[name], tokenizer)
    new = tokenizer.convert_tokens_to_ids(["sat", tokenizer.unk_token, tokenizer.eos_token])
    assert split_sample(tokenizer, generator.encode(prompt), new) == (shown, text)


@pytest.mark.parametrize("name", ["fmlm", "gpt2"])
def test_prompts_without_tokens_are_refused(name, models):
    tokenizer = train_tokenizer([], "text8", 27)
    generator = (FlowGenerator if name == "fmlm" else CausalGenerator)(models[name], tokenizer)
    with pytest.raises(ValueError, match="`prompt`: the tokenizer does not know 'H'"):
        generator.encode("Hello")
