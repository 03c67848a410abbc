# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Rewards that steer generation: other transformers models applied to soft tokens."""

import torch
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def embed_soft_tokens(probabilities: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """
    Expected input embeddings of soft tokens, for any transformers model with the same tokenizer.

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            The soft tokens. The vocabularies may differ at their ends, by added tokens or padding: only the tokens that both
            have count.
        model ([`~transformers.PreTrainedModel`]): The model.

    Returns:
        `torch.Tensor` of shape `(batch_size, length, hidden_size)`, to pass as `inputs_embeds`.
    """
    module = model.get_input_embeddings()
    sizes = (module.weight.shape[0], probabilities.shape[-1])
    size = min(sizes)
    if size < 0.75 * max(sizes):
        raise ValueError(
            f"`model` has {sizes[0]} tokens, but the soft tokens have {sizes[1]}: pass a model with the same tokenizer."
        )
    if size < max(sizes):
        logger.warning_once(
            f"`model` has {sizes[0]} tokens, but the soft tokens have {sizes[1]}: is it the same tokenizer? Only the first {size} "
            "tokens count."
        )
    device = "cpu" if module.weight.device.type == "meta" else module.weight.device
    # Call the module, which may scale its output or be offloaded
    embeddings = module(torch.arange(size, device=device))
    return probabilities[..., :size].to(embeddings) @ embeddings


class ClassifierReward:
    """
    Log-probability of a label under a sequence classifier, as a `reward` of [`~FLMGenerationMixin.generate`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence classifier with the tokenizer of the texts. A classifier that reads the last token (a decoder) needs a
            `pad_token_id` in its configuration, and sequences of equal length.
        label (`int` or `str`): The desired label, or its name in `model.config.label2id`.

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
        """
        Returns the log-probability of the label.

        Args:
            probabilities (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
                The soft tokens. Positions that are all 0 are padding.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`.
        """
        embeddings = embed_soft_tokens(probabilities, self.model)
        mask = (probabilities != 0).any(dim=-1).long().to(embeddings.device)
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask).logits
        return logits.float().log_softmax(dim=-1)[:, self.label].to(probabilities.device)


__all__ = ["ClassifierReward"]
