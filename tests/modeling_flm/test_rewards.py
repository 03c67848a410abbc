"""Rewards of soft tokens, by classifiers and language models."""

import pytest
import torch
from small_models import build_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from modeling_flm import ClassifierReward, LanguageModelReward


def test_embeddings_are_those_that_a_model_looks_up():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    scorer = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2)).eval()
    scorer.transformer.wte = Scaled(53, 16)
    input_ids = torch.randint(53, (1, 7))
    reward = LanguageModelReward(scorer)(nn.functional.one_hot(input_ids, 53).float())
    torch.testing.assert_close(reward[0], -scorer(input_ids, labels=input_ids).loss)


@pytest.mark.parametrize("vocab_size", [50, 53, 64])
def test_classifiers_and_language_models(vocab_size, caplog):
    """One-hot soft tokens are tokens; vocabularies may differ at their end."""
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        id2label=dict(enumerate("abc")),
        label2id={"a": 0, "b": 1, "c": 2},
        **sizes,
    )
    classifier = BertForSequenceClassification(config).eval()
    scorer = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2)).eval()
    input_ids = torch.randint(50, (4, 7))
    soft = nn.functional.one_hot(input_ids, 53).float()
    expected = classifier(input_ids).logits.log_softmax(-1)[:, 1]
    torch.testing.assert_close(ClassifierReward(classifier, "b")(soft), expected)
    torch.testing.assert_close(ClassifierReward(classifier, 1)(soft), expected)
    torch.testing.assert_close(LanguageModelReward(scorer)(soft), torch.stack(
        [-scorer(row[None], labels=row[None]).loss for row in input_ids]))  # fmt: skip
    assert ("is it the same tokenizer?" in caplog.text) == (vocab_size != 53)
    model = build_model("fmlm")
    for reward in (ClassifierReward(classifier, "b"), LanguageModelReward(scorer)):
        assert model.generate(num_samples=2, num_steps=2, reward=reward, reward_scale=1.0).shape == (2, 12)
    # Shorter texts are as if there were no padding.
    soft[:, 5:] = 0
    torch.testing.assert_close(ClassifierReward(classifier, 1)(soft), ClassifierReward(classifier, 1)(soft[:, :5]))
    torch.testing.assert_close(LanguageModelReward(scorer)(soft), LanguageModelReward(scorer)(soft[:, :5]))
    for label in ("d", 3, 1.0):
        with pytest.raises(ValueError, match=f"`label` must be one of 'a', 'b', 'c' or its number, got {label!r}"):
            ClassifierReward(classifier, label)
    with pytest.raises(ValueError, match="`model` must be a sequence classifier, got `GPT2LMHeadModel`"):
        ClassifierReward(scorer, 1)
    for other in (classifier, model):
        with pytest.raises(ValueError, match=f"`model` must be a causal language model, got `{type(other).__name__}`"):
            LanguageModelReward(other)
    with pytest.raises(ValueError, match=f"`model` has {vocab_size} tokens, but texts are of 200"):
        LanguageModelReward(scorer)(torch.rand(1, 7, 200))
