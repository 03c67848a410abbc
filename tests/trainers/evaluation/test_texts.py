"""Evaluation in Python: generate texts, score them, report the scores; and the samples of causal models."""

import doctest
import json
import re
import textwrap

import numpy as np
import pytest
import torch
from oracle import SCORER
from small_models import build_flm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling_flm import FMLMModel
from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.evaluation import (
    CausalSource,
    FlowSource,
    Setting,
    Texts,
    bootstrap_ratio,
    generate_causal_samples,
    generate_samples,
    generate_texts,
    pad_tokens,
    report,
    score,
)
from modeling_flm.trainers.evaluation.samples import find_bos_token, find_eos_tokens, sample_generators


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(f"w{number}" for number in range(60))], "word", 100)


@pytest.fixture(scope="module")
def causal():
    return AutoModelForCausalLM.from_pretrained(SCORER).eval()


@pytest.mark.parametrize(
    "function", [generate_texts, score, report, bootstrap_ratio, generate_causal_samples], ids=lambda f: f.__name__
)
def test_examples_of_docstrings(function, tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    FMLMModel.from_flm(build_flm(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "fmlm")
    tokenizer.save_pretrained(tmp_path / "fmlm")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", textwrap.dedent(function.__doc__), re.DOTALL)
    code = code.replace('"me/fmlm"', '"fmlm"').replace('"gpt2"', repr(str(SCORER))).replace("464", "7")
    test = doctest.DocTestParser().get_doctest(code, {}, function.__name__, None, 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_generate_score_and_report(flm, tokenizer, tmp_path):
    source = FlowSource(flm, tokenizer, generate_kwargs={"top_k": 5})
    rows = []
    for num_steps in (1, 3):
        texts = generate_texts(source, Setting(num_steps), num_samples=5, seeds=[2, 4], batch_size=3)
        tokens = [generate_samples(flm, range(5), seed, num_steps=num_steps, top_k=5) for seed in (2, 4)]
        assert texts.tokens == torch.cat(tokens).tolist()
        assert texts.texts == tokenizer.batch_decode(texts.tokens, skip_special_tokens=True)
        texts.save(tmp_path / "samples.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert [(line["seed"], line["index"]) for line in lines] == [(s, i) for s in (2, 4) for i in range(5)]
        assert [line["text"] for line in lines] == texts.texts
        rows.append(score(texts, SCORER, device="cpu", num_resamples=50))
    rows.append(score(Texts(["w1 w2", "w3"], columns={"source": "reference"}), SCORER, device="cpu", num_resamples=50))
    results = report(rows, tmp_path / "out", "tiny", source.describe(), [2, 4])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (results["num_samples"], results["sampling"]) == (10, {"gamma": 0.0, "top_k": 5})
    assert [row.get("num_steps", row.get("source")) for row in results["results"]] == [1, 3, "reference"]
    for row, num_steps in zip(results["results"], (1, 3)):
        assert row["num_forward_passes"] == num_steps and row["seconds_per_text"] > 0
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert "10 texts, scored by tiny, gamma 0.0, top_k 5." in markdown and markdown.count("\n| ") == 3
    assert (tmp_path / "out" / "results.png").exists()


@pytest.mark.parametrize("texts", ["abc", [None], [5], ["a", b"b"]])
def test_scored_texts_are_texts(texts):
    with pytest.raises(ValueError, match="`texts` must be a list of strings"):
        score(texts, scorer=SCORER)


def test_seeds_of_numpy_are_saved(flm, tokenizer, tmp_path):
    seeds = np.arange(2)
    texts = generate_texts(FlowSource(flm, tokenizer), Setting(1), num_samples=1, seeds=seeds)
    texts.save(tmp_path / "samples.jsonl")
    assert [json.loads(line)["seed"] for line in (tmp_path / "samples.jsonl").open()] == [0, 1]
    report([score(texts, scorer=SCORER)], tmp_path, scorer=SCORER, seeds=seeds)
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0, 1]


def test_generate_texts_by_default_takes_the_steps_of_the_model(flm, tokenizer):
    flm.generation_config.num_steps = 2
    texts = generate_texts(FlowSource(flm, tokenizer), num_samples=2)
    assert texts.columns["num_steps"] == texts.columns["num_forward_passes"] == 2
    source = FlowSource(flm, tokenizer, generate_kwargs={"timestep_grid": [0.0, 0.4, 0.6, 1.0]})
    assert source.columns(Setting())["num_steps"] == 3


class TestCausalSamples:
    PROMPTS = [[0], [0, 5, 9], [0, 7]]

    def test_generate_causal_samples_do_not_depend_on_the_batch(self, causal):
        together = generate_causal_samples(causal, self.PROMPTS, sample_generators(3, [0, 1, 2]), 6, [0.5, 1.0, 2.0])
        for index, temperature in enumerate((0.5, 1.0, 2.0)):
            prompts = self.PROMPTS[index : index + 1]
            (alone,) = generate_causal_samples(causal, prompts, sample_generators(3, [index]), 6, temperature)
            assert together[index] == alone
        tokenizer = AutoTokenizer.from_pretrained(SCORER)
        source = CausalSource(causal, tokenizer, length=4)
        many, few = (generate_texts(source, num_samples=5, batch_size=size).tokens for size in (5, 2))
        assert many == few and len({tuple(row) for row in many}) > 1

    def test_top_k_and_top_p_leave_the_most_likely_tokens(self, causal):
        greedy = causal.generate(torch.zeros(1, 1, dtype=torch.long), do_sample=False, max_new_tokens=5)[
            0, 1:
        ].tolist()
        for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            assert generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 5, **options) == [greedy]

    def test_eos_token_id_ends_texts(self, causal):
        (whole,) = generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 8)
        for eos in (whole[3], [whole[3], whole[5]]):
            (ended,) = generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 8, eos_token_id=eos)
            ends = eos if isinstance(eos, list) else [eos]
            assert ended == whole[: 1 + min(whole.index(token) for token in ends)]

    def test_callback_ends_a_batch(self, causal):
        calls = []

        def callback():
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("cancelled")

        with pytest.raises(KeyError):
            generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 8, callback=callback)
        assert len(calls) == 3

    def test_generation_config_is_not_the_model_s(self, causal):
        own = causal.generation_config
        (plain,) = generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 6)
        forbidding = GenerationConfig(suppress_tokens=[plain[0]])
        causal.generation_config = forbidding
        try:
            assert generate_causal_samples(causal, [[0]], sample_generators(0, [0]), 6) == [plain]
            assert causal.generation_config is forbidding
        finally:
            causal.generation_config = own
        generators = sample_generators(0, [0])
        (other,) = generate_causal_samples(causal, [[0]], generators, 6, generation_config=forbidding)
        assert other[0] != plain[0] and causal.generation_config is own

    def test_bos_and_eos_tokens(self, causal):
        tokenizer = AutoTokenizer.from_pretrained(SCORER)
        own = causal.generation_config
        tokenizer.bos_token = None
        causal.generation_config = GenerationConfig(bos_token_id=8, eos_token_id=[3, 4])
        try:
            assert (find_bos_token(causal, tokenizer), find_eos_tokens(causal, tokenizer)) == (8, [3, 4])
            causal.generation_config = GenerationConfig()
            assert find_bos_token(causal, tokenizer) == tokenizer.eos_token_id
            assert find_eos_tokens(causal, tokenizer) == [tokenizer.eos_token_id]
        finally:
            causal.generation_config = own


def test_pad_tokens():
    input_ids, attention_mask = pad_tokens([[5, 6], [7]])
    assert input_ids.tolist() == [[5, 6], [7, 0]] and attention_mask.tolist() == [[1, 1], [1, 0]]
    input_ids, attention_mask = pad_tokens([[5, 6], [7]], "left")
    assert input_ids.tolist() == [[5, 6], [0, 7]] and attention_mask.tolist() == [[1, 1], [0, 1]]


def test_samples_do_not_depend_on_the_batch(flm):
    samples = generate_samples(flm, list(range(6)), 3, num_steps=2, batch_size=4)
    parts = [generate_samples(flm, indices, 3, num_steps=2) for indices in ([0, 2, 4], [1, 3, 5])]
    assert torch.equal(samples[::2], parts[0]) and torch.equal(samples[1::2], parts[1])
    assert not torch.equal(samples, generate_samples(flm, list(range(6)), 4, num_steps=2))
    assert len({tuple(row) for row in samples.tolist()}) == 6
    assert generate_samples(flm, [], 3, num_steps=2).tolist() == []
