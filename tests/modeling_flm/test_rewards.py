"""ClassifierReward on soft tokens."""

import pytest
import torch
from small_models import build_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from modeling_flm import ClassifierReward


def build_classifier(vocab_size: int = 53) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        id2label=dict(enumerate("abc")), label2id={"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_embeddings_include_the_scale_of_the_module():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    classifier = build_classifier()
    classifier.bert.embeddings.word_embeddings = Scaled(53, 16)
    input_ids = torch.randint(53, (1, 7))
    reward = ClassifierReward(classifier, 2)(nn.functional.one_hot(input_ids, 53).float())
    torch.testing.assert_close(reward, classifier(input_ids).logits.log_softmax(-1)[:, 2])


@pytest.mark.parametrize("vocab_size", [50, 53, 64])
def test_one_hot_soft_tokens_equal_tokens_and_vocabularies_may_differ_at_their_ends(vocab_size, caplog):
    classifier = build_classifier(vocab_size)
    input_ids = torch.randint(50, (4, 7))
    soft = nn.functional.one_hot(input_ids, 53).float()
    expected = classifier(input_ids).logits.log_softmax(-1)[:, 1]
    torch.testing.assert_close(ClassifierReward(classifier, "b")(soft), expected)
    torch.testing.assert_close(ClassifierReward(classifier, 1)(soft), expected)
    assert ("is it the same tokenizer?" in caplog.text) == (vocab_size != 53)
    reward = ClassifierReward(classifier, "b")
    assert build_model("fmlm").generate(num_samples=2, num_steps=2, reward=reward, reward_scale=1.0).shape == (2, 12)
    # All-zero positions are padding
    soft[:, 5:] = 0
    torch.testing.assert_close(reward(soft), reward(soft[:, :5]))


def test_bad_arguments_are_named():
    classifier = build_classifier()
    for label in ("d", 3, 1.0):
        with pytest.raises(ValueError, match=f"`label` must be one of 'a', 'b', 'c' or its number, got {label!r}"):
            ClassifierReward(classifier, label)
    language_model = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="`model` must be a sequence classifier, got `GPT2LMHeadModel`"):
        ClassifierReward(language_model, 1)
    with pytest.raises(ValueError, match="`model` has 53 tokens, .*pass a model with the same tokenizer"):
        ClassifierReward(classifier, 1)(torch.rand(1, 7, 200))
