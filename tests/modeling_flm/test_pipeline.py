"""`pipeline("text-generation")`."""

import json

import pytest
import torch
from datasets import Dataset
from small_models import build_flm
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_flm import FLMGenerationConfig, FLMPipeline, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.trainers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100)


@pytest.fixture
def folder(flm, tokenizer, tmp_path):
    flm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def generator():
    return torch.Generator().manual_seed(3)


def test_texts_are_those_of_generate(flm, tokenizer, folder):
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, num_steps=3)
    tokens = flm.generate(num_samples=5, num_steps=3, generator=generator())
    rows = pipe(num_samples=5, generator=generator(), return_tensors=True)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert rows == [{"generated_text": a, "generated_token_ids": b} for a, b in zip(texts, tokens.tolist())]
    # Arguments of a call override the arguments of the constructor
    tokens = flm.generate(num_samples=2, num_steps=1, length=4, generator=generator())
    rows = pipe(num_samples=2, num_steps=1, length=4, generator=generator(), skip_special_tokens=False)
    assert [row["generated_text"] for row in rows] == tokenizer.batch_decode(tokens)
    assert len(pipe()) == 1
    assert "FLMModel" in repr(pipe)


def test_prompts(flm, tokenizer):
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer, num_steps=2)
    prompts = ["w5 w6", "w7", "w8 w9 w10 w11"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    (row,) = pipe(prompts[0], generator=generator())
    expected = flm.generate(torch.tensor([ids[0]]), num_steps=2, generator=generator())
    assert row["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert row["generated_text"].startswith("w5 w6 ")
    rows = pipe(prompts, num_return_sequences=2, return_tensors=True)
    assert [len(texts) for texts in rows] == [2, 2, 2]
    for start, texts in zip(ids, rows):
        assert all(text["generated_token_ids"][: len(start)] == start for text in texts)
    with pytest.raises(ValueError, match="pass `num_return_sequences`.* instead of `num_samples`"):
        pipe(prompts, num_samples=3)
    config = FLMGenerationConfig(num_steps=1)
    assert [len(texts) for texts in pipe(prompts, generation_config=config, num_return_sequences=3)] == [3, 3, 3]
    assert pipe("", generator=generator()) == pipe(generator=generator())
    # Texts that begin with a special token begin with it still.
    flm.generation_config.bos_token_id = tokenizer.bos_token_id
    (row,) = pipe("w7", return_tensors=True)
    assert row["generated_token_ids"][:2] == [tokenizer.bos_token_id, *ids[1]]
    (row,) = pipe("w7 w8", return_tensors=True, add_special_tokens=False)
    assert row["generated_token_ids"][:2] == [*ids[1], *ids[2][:1]]


def test_prompts_of_datasets_and_generators(flm, tokenizer):
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer, num_steps=2)
    prompts = ["w5 w6", "w7", "w8 w9", "w1", "w2 w3"]
    dataset = Dataset.from_dict({"prompt": prompts})
    expected = pipe(prompts, num_return_sequences=2, generator=generator())
    assert pipe(dataset["prompt"], num_return_sequences=2, generator=generator()) == expected
    assert pipe(tuple(prompts), num_return_sequences=2, generator=generator()) == expected
    assert (
        list(pipe(KeyDataset(dataset, "prompt"), num_return_sequences=2, generator=generator(), batch_size=2))
        == expected
    )
    read = []
    stream = pipe((read.append(p) or p for p in prompts), num_return_sequences=2, generator=generator(), batch_size=2)
    assert read == []
    assert next(stream) == expected[0] and read == prompts[:2]
    assert list(stream) == expected[1:]
    assert list(pipe(iter([]))) == []


def test_a_model_that_is_loaded_already(flm, tokenizer):
    pipe = pipeline("text-generation", model=flm, tokenizer=tokenizer, pipeline_class=FLMPipeline)
    assert pipe("w7", generator=generator()) == FLMPipeline(model=flm, tokenizer=tokenizer)(
        "w7", generator=generator()
    )
    with pytest.raises(ValueError, match="pass it `pipeline_class=modeling_flm.FLMPipeline`"):
        pipeline("text-generation", model=flm, tokenizer=tokenizer)("w7")


def test_unknown_words_of_prompts_are_warned_of(flm, tokenizer, caplog):
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer, num_steps=1)
    pipe(["w1 w2", "w3"])
    assert caplog.text == ""
    pipe(["w1 w2", "w1 dragon", "sleeps"])
    assert "40.0% of the tokens, and replaces them by [UNK]: 'w1 dragon', and 1 more" in caplog.text


def test_task_is_inferred_and_the_pipeline_can_be_saved(folder, tmp_path):
    for _ in range(2):  # `pipeline()` changes the configuration that it is given
        pipe = pipeline(model=str(folder), trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    task = {"text-generation": {"impl": "pipeline_flm.FLMPipeline", "pt": ["AutoModel"]}}
    assert configs[0]["custom_pipelines"] == configs[1]["custom_pipelines"] == task
    again = pipeline(model=str(tmp_path / "again"), trust_remote_code=True)
    options = {"num_samples": 2, "num_steps": 2}
    assert again(generator=generator(), **options) == pipe(generator=generator(), **options)


@pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
def test_flow_maps_take_one_step(model_class, flm, tokenizer):
    model = model_class.from_flm(flm).eval()
    pipe = FLMPipeline(model=model, tokenizer=tokenizer)
    expected = model.generate(num_samples=2, num_steps=1, generator=generator())
    rows = pipe(num_return_sequences=2, generator=generator(), return_tensors=True)
    assert [row["generated_token_ids"] for row in rows] == expected.tolist()


def test_batch_size_bounds_how_many_texts_are_made_at_a_time(flm, tokenizer):
    sizes = []
    posterior = flm.posterior
    flm.posterior = lambda state, *args, **kwargs: sizes.append(len(state)) or posterior(state, *args, **kwargs)
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer, batch_size=2)
    rows = pipe(num_samples=5, num_steps=1, generator=generator())
    assert sizes == [2, 2, 1]
    assert rows == pipe(num_samples=5, num_steps=1, generator=generator(), batch_size=5)


def test_mistakes_are_explained(flm, tokenizer, folder):
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`text_inputs` must be a text or a list of texts"):
        pipe([1, 2])
    with pytest.raises(ValueError, match="got {'role': 'user', 'content': 'w1'}.*Chats are not supported"):
        pipe([{"role": "user", "content": "w1"}])
    with pytest.raises(ValueError, match="For a dataset, pass a column"):
        list(pipe(Dataset.from_dict({"prompt": ["w1"]})))
    with pytest.raises(ValueError, match="must contain at least one text"):
        pipe([])
    for wrong in (5, {"text": "w1"}):
        with pytest.raises(ValueError, match=f"a generator or a `KeyDataset`, got `{type(wrong).__name__}`"):
            pipe(wrong)
    with pytest.raises(ValueError, match="`input_ids` has 13 tokens, but samples have 12"):
        pipe("w1 " * 13)
    with pytest.raises(ValueError, match="`num_step` .did you mean `num_steps`"):
        pipe(num_step=2)
    with pytest.raises(ValueError, match="`num_samples` must be"):
        pipe(num_samples=0)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="`num_return_sequences` must be"):
            pipe(num_return_sequences=wrong)
    with pytest.raises(ValueError, match="`num_return_sequences` and `num_samples` were both passed"):
        pipe(num_return_sequences=2, num_samples=3)
    with pytest.raises(ValueError, match="`tokenizer` is needed"):
        FLMPipeline(model=build_flm())
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("text-generation", model=str(folder))


def test_streamer_and_callback_pass_through(flm, tokenizer):
    steps = []
    pipe = FLMPipeline(model=flm, tokenizer=tokenizer)
    pipe(num_steps=3, callback=lambda step, num_steps, tokens: steps.append(step))
    assert steps == [1, 2, 3]


def test_models_saved_before_there_was_a_pipeline(folder, tokenizer):
    config = json.loads((folder / "config.json").read_text())
    del config["custom_pipelines"]
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoModel.from_pretrained(folder).config.custom_pipelines


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_of_other_text_generators(auto_class, flm, folder):
    expected = flm.generate(num_steps=2, generator=generator())
    assert torch.equal(auto_class.from_pretrained(folder).generate(num_steps=2, generator=generator()), expected)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map[auto_class.__name__] == auto_map["AutoModel"] == "modeling_flm.FLMModel"
