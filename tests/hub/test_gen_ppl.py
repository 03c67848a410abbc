"""The metric of generative perplexity: published values, texts that are none, and loading it from a Space."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import yaml
from hub_server import File, LoopbackHub, Repository
from huggingface_hub import ModelCard
from oracle import SCORER
from places import ROOT
from small_models import build_flm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from modeling_flm.trainers import load_gen_ppl
from modeling_flm.trainers.evaluation import report, score


def test_cites_the_paper_like_the_cards():
    card = (ROOT / "hub" / "templates" / "model_card.md").read_text()
    (citation,) = re.findall(r"```bibtex\n(.+?)```", card, re.DOTALL)
    assert citation in (ROOT / "hub" / "gen_ppl" / "gen_ppl.py").read_text()
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    (paper,) = (reference for reference in references if "2602.16813" in reference["url"])
    assert f"title = {{{paper['title']}}}" in citation
    authors = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert f"author = {{{' and '.join(authors)}}}" in citation


class TestMetric:
    published = oracle.read_json("gen_ppl_tiny.json")

    @pytest.mark.parametrize("max_length", [32, 1024])
    @pytest.mark.parametrize("batch_size", [1, 5, 100])
    def test_published_perplexity(self, max_length, batch_size, gen_ppl):
        texts = self.published["texts"]
        result = gen_ppl(texts, max_length=max_length, batch_size=batch_size)
        assert result["gen_ppl"] == pytest.approx(self.published[f"gen_ppl_max_length_{max_length}"], rel=1e-6)
        again = gen_ppl(texts[::-1], max_length=max_length, batch_size=batch_size)
        assert again["gen_ppl"] == pytest.approx(result["gen_ppl"], rel=1e-6)
        assert again["perplexities"][::-1] == pytest.approx(result["perplexities"], rel=1e-5)
        assert result["num_truncated"] == (10 if max_length == 32 else 0)

    def test_published_entropy(self, gen_ppl):
        tokens = self.published["token_ids"]
        result = gen_ppl(["a b"] * len(tokens), token_ids=tokens)
        assert result["entropy"] == pytest.approx(self.published["mean_token_entropy_nats"], rel=1e-6)
        assert result["entropies"][0] == 0  # one token over and over

    def test_against_one_text_at_a_time(self, gen_ppl):
        """Every token but the first, and the first end-of-text token after the text."""
        texts = ["time back us was", "come day years at back he over", "i what only your the must those first"]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(SCORER).eval(), AutoTokenizer.from_pretrained(SCORER)
        result = gen_ppl(texts)
        sequences = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, sequences))
        totals, counts = 0, 0
        for tokens, ppl, count in zip(sequences, result["perplexities"], result["token_counts"]):
            tokens = tokens + [tokenizer.eos_token_id] * (len(tokens) < longest)
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0]
            losses = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
            assert ppl == pytest.approx(losses.mean().exp().item(), rel=1e-5) and count == len(losses)
            totals, counts = totals + losses.sum().item(), counts + len(losses)
        assert result["gen_ppl"] == pytest.approx(math.exp(totals / counts), rel=1e-5)
        assert result["num_tokens"] == counts

    def test_empty_and_short_texts(self, gen_ppl):
        result = gen_ppl(["", "t", "time back", ""])
        assert result["num_texts"] == 4 and result["num_empty"] == 2
        assert result["perplexities"][0] is None and result["perplexities"][1] > 1
        assert result["token_counts"][:2] == [0, 1]  # the end of the text after its only token
        assert result["entropies"][0] is None and result["entropies"][1] == 0
        alone = gen_ppl(["", ""])
        assert alone["gen_ppl"] is None and alone["entropy"] is None and alone["num_empty"] == 2
        assert gen_ppl(["t"])["num_empty"] == 1  # the longest text is not followed by anything

    @pytest.mark.parametrize("texts", [[""], ["t"], ["", ""], ["", "t"], ["t", "time back"]])
    def test_results_are_json(self, texts, gen_ppl):
        result = gen_ppl(texts)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        counts = result["token_counts"]
        assert result["num_empty"] == counts.count(0) and (result["gen_ppl"] is None) == (sum(counts) == 0)
        row = score(texts, scorer=SCORER, device="cpu", num_resamples=10)
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert (row["gen_ppl_interval"] is None) == (row["gen_ppl"] is None)
        assert (row["entropy_interval"] is None) == (row["entropy"] is None)

    @pytest.mark.parametrize("loss", [math.inf, 1e4])
    def test_perplexities_that_are_not_finite(self, loss, monkeypatch, tmp_path):
        """As of a scorer that gives a token the probability 0."""
        module = sys.modules[type(load_gen_ppl()).__module__]
        monkeypatch.setattr(module, "negative_log_likelihoods", lambda *args: [(loss, 1), (2.0, 1)])
        row = score(["time back", "time us"], scorer=SCORER, device="cpu", num_resamples=10)
        assert row["perplexities"] == [None, math.exp(2)] and row["num_empty"] == 0
        assert row["gen_ppl"] is row["gen_ppl_interval"] is None
        results = report([row], tmp_path, SCORER)
        assert results["results"][0]["gen_ppl"] is None
        assert "| not finite |" in (tmp_path / "results.md").read_text()

    def test_distinct(self, gen_ppl):
        tokens = [[1, 2, 1, 2, 3], [1, 2], [5]]
        result = gen_ppl(["a"] * 3, token_ids=tokens)
        assert result["distinct_1"] == 4 / 8  # 1 2 3 5
        assert result["distinct_2"] == 3 / 5  # 12 21 23
        assert result["distinct_3"] == 3 / 3
        # Without tokens of the model it is about those of the scorer.
        text = self.published["texts"][0]
        ids = AutoTokenizer.from_pretrained(SCORER)(text)["input_ids"]
        shares = np.array(list(Counter(ids).values())) / len(ids)
        result = gen_ppl([text])
        assert result["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
        assert result["distinct_1"] == len(set(ids)) / len(ids)

    def test_mistakes_are_explained(self, gen_ppl):
        with pytest.raises(ValueError, match="`token_ids` has 1 .* `predictions` has 2"):
            gen_ppl(["a", "b"], token_ids=[[1]])
        with pytest.raises(ValueError, match="`max_length` must be at least 2, and at most the 1024"):
            gen_ppl(["a"], max_length=4096)
        with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
            gen_ppl(["a"], batch_size=0)
        with pytest.raises(ValueError, match="`predictions` is empty"):
            gen_ppl([])


@pytest.mark.parametrize("kind", ["masked", "flow", "few tokens"])
def test_scorers_that_are_no_causal_models_are_refused(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SCORER)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "masked":
        model = BertForMaskedLM(
            BertConfig(vocab_size=len(tokenizer), intermediate_size=16, initializer_range=0.5, **sizes)
        )
    elif kind == "flow":
        model = build_flm(vocab_size=len(tokenizer))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=2, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = "more tokens than the 2 of its model" if kind == "few tokens" else "is no causal language model"
    with pytest.raises(ValueError, match=f"`model_id`: .*{message}"):
        load_gen_ppl().compute(predictions=["a text"], model_id=str(tmp_path), device="cpu")


@pytest.mark.slow
def test_metric_loads_from_a_space(gen_ppl, tmp_path):
    texts = ["time back us was", "come day years at back he over"]
    script = f"""
import evaluate, json
metric = evaluate.load("tester/gen_ppl")
print(json.dumps(metric.compute(predictions={texts}, model_id={SCORER!r}, device="cpu")))
"""
    with LoopbackHub() as server:
        space = server.repositories["tester/gen_ppl"] = Repository()
        folder = ROOT / "hub" / "gen_ppl"
        space.commit(
            "main", {path.name: File(path.read_bytes()) for path in folder.iterdir() if path.is_file()}, "Space"
        )
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", script]
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == gen_ppl(texts)
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.sdk == "gradio" and "metric" in card.data.tags and (folder / card.data.app_file).is_file()
