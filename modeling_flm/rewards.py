# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards that steer generation: what other models of the Hub make of soft tokens."""

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def embed_soft_tokens(probabilities: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """
    Soft tokens as input embeddings of any transformers model with the same tokenizer: the expected embedding.

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            The soft tokens. Where one vocabulary is a little larger than the other (by an added token, or filled up to a
            round number), the tokens that both have count.
        model ([`~transformers.PreTrainedModel`]): The model.

    Returns:
        `torch.Tensor` of shape `(batch_size, length, hidden_size)`, to pass as `inputs_embeds`.
    """
    module = model.get_input_embeddings()
    sizes = (module.weight.shape[0], probabilities.shape[-1])
    size = min(sizes)
    if size < 0.75 * max(sizes):
        raise ValueError(
            f"`model` has {sizes[0]} tokens, but texts are of {sizes[1]}: it needs the tokenizer of the texts."
        )
    if size < max(sizes):
        logger.warning_once(
            f"`model` has {sizes[0]} tokens, but texts are of {sizes[1]}: is it the same tokenizer? The tokens that both have count."
        )
    device = "cpu" if module.weight.device.type == "meta" else module.weight.device
    # By a call of the module, which may scale what it looks up, or be offloaded
    embeddings = module(torch.arange(size, device=device))
    return probabilities[..., :size].to(embeddings) @ embeddings


def existing_positions(probabilities: torch.Tensor) -> torch.LongTensor:
    """The attention mask of soft tokens, which are all 0 where a text has no position."""
    return (probabilities != 0).any(dim=-1).long()


class ClassifierReward:
    """
    How likely a sequence classifier finds a label, as a `reward` of [`~FLMGenerationMixin.generate`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence classifier with the tokenizer of the texts. One that reads the last token (a decoder) needs a
            `pad_token_id` in its configuration, and texts of equal lengths.
        label (`int` or `str`): The wanted label, or its name in `model.config.label2id`.

    Example:

    ```python
    >>> classifier = AutoModelForSequenceClassification.from_pretrained("path/to/classifier")
    >>> tokens = model.generate(num_samples=4, reward=ClassifierReward(classifier, "positive"), reward_scale=10.0)
    ```
    """

    def __init__(self, model: PreTrainedModel, label: int | str):
        if not isinstance(model, PreTrainedModel) or "ForSequenceClassification" not in type(model).__name__:
            raise ValueError(f"`model` must be a sequence classifier, got `{type(model).__name__}`.")
        labels = model.config.label2id
        is_known = label in labels if isinstance(label, str) else label in range(model.config.num_labels)
        if not isinstance(label, (int, str)) or not is_known:
            raise ValueError(f"`label` must be one of {', '.join(map(repr, labels))} or its number, got {label!r}.")
        self.model = model
        self.label = labels[label] if isinstance(label, str) else label

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The log-probability of the label, of shape `(batch_size,)`, for soft tokens."""
        embeddings = embed_soft_tokens(probabilities, self.model)
        mask = existing_positions(probabilities).to(embeddings.device)
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask).logits
        return logits.float().log_softmax(dim=-1)[:, self.label].to(probabilities.device)


class LanguageModelReward:
    """
    How likely a causal language model finds a text, as a `reward` of [`~FLMGenerationMixin.generate`].

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model with the tokenizer of the texts.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
            raise ValueError(f"`model` must be a causal language model, got `{type(model).__name__}`.")
        self.model = model

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The expected log-probability per token after the first, of shape `(batch_size,)`, for soft tokens."""
        embeddings = embed_soft_tokens(probabilities, self.model)
        mask = existing_positions(probabilities)
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask.to(embeddings.device)).logits
        size = min(logits.shape[-1], probabilities.shape[-1])
        scores = logits[:, :-1].float().log_softmax(dim=-1)[..., :size].to(probabilities.device)
        totals = (probabilities[:, 1:, :size] * scores).sum(dim=(1, 2))  # 0 where there is no position
        return totals / mask[:, 1:].sum(dim=1).clamp(min=1)


__all__ = ["ClassifierReward", "LanguageModelReward"]
