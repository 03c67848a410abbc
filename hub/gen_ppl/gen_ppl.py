# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generative perplexity of texts under another language model: a metric for `evaluate`."""

import math
import sys
from collections import Counter
from functools import lru_cache
from typing import Any

import datasets
import evaluate
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


_DESCRIPTION = """
Generative perplexity of texts under a causal language model (the scorer), used to compare models that generate texts without
a prompt. The scorer tokenizes the texts, and the perplexity is computed over all of their tokens together. Because repetitive
texts score well, the metric also returns the mean token entropy per text and the share of distinct n-grams.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): The texts.
    model_id (`str`, *optional*, defaults to `"gpt2-large"`): Name or folder of the scorer, a causal language model.
    batch_size (`int`, *optional*, defaults to 8): Number of texts per forward pass. Changes the result by rounding only.
    max_length (`int`, *optional*): Number of tokens per text to score; later tokens are ignored. Defaults to 1024, or to the
        context of the scorer if it is shorter.
    device (`str`, *optional*): Device of the scorer. Defaults to an accelerator, if there is one.
    dtype (`str`, *optional*): Precision of the scorer, such as "bfloat16". Defaults to the precision of its checkpoint.
    token_ids (`list[list[int]]`, *optional*): Tokens of each text from the generating model, for the entropy and the distinct
        n-grams. Defaults to the scorer's tokens.

Returns:
    A dictionary with
    - "gen_ppl" (`float | None`): the generative perplexity;
    - "perplexities" (`list[float | None]`): the perplexity of each text;
    - "token_counts" (`list[int]`): the number of scored tokens of each text;
    - "entropy" (`float | None`): the mean token entropy of the texts that are not empty, in nats;
    - "entropies" (`list[float | None]`): the token entropy of each text;
    - "distinct_1", "distinct_2", "distinct_3" (`float | None`): the share of distinct n-grams;
    - "num_texts", "num_tokens" (`int`): the number of texts and of scored tokens;
    - "num_empty", "num_truncated" (`int`): the number of texts without scored tokens, and of texts cut at `max_length`.
Figures that do not exist are `None`: the perplexity without scored tokens, or if a token has probability 0; the entropy of empty
texts; the share of n-grams of texts shorter than n.

Every token after the first one of a text is scored. Texts shorter than the longest one get the scorer's end-of-text token. The
first end-of-text token of a text is scored as well, later ones are not.

Example:
    >>> gen_ppl = evaluate.load("path/to/gen_ppl")
    >>> gen_ppl.compute(predictions=["The cat sat on the mat."], model_id="gpt2")["gen_ppl"]
"""

_CITATION = """
@misc{lee2026flow,
  title = {Flow Map Language Models: One-step Language Modeling via Continuous Denoising},
  author = {Chanhyuk Lee and Jaehoon Yoo and Manan Agarwal and Sheel Shah and Jerry Huang and Aditi Raghunathan and Seunghoon Hong and Nicholas M. Boffi and Jinwoo Kim},
  year = {2026},
  eprint = {2602.16813},
  archivePrefix = {arXiv},
}
"""


@lru_cache(maxsize=1)
def load_scorer(
    model_id: str, device: str | None, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a scorer and its tokenizer. The last one stays in memory."""
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        model, info = AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of any file
        cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(f"`model_id`: {model_id} cannot be loaded: {cause}. Download or copy it again.") from error
    if not all(torch.isfinite(weight).all() for weight in model.parameters() if weight.is_floating_point()):
        raise ValueError(f"`model_id`: {model_id} has weights that are NaN or infinite: name another model.")
    check_causal(model.to(device).eval(), model_id)
    if names := sorted(info["missing_keys"]):
        raise OSError(
            f"`model_id`: {model_id} lacks weights ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): download or copy it again."
        )
    return model, tokenizer


@torch.inference_mode()
def check_causal(model: PreTrainedModel, model_id: str):
    """Raises a `ValueError` if predictions depend on later tokens, as in masked language models, or on more than tokens."""
    message = f"`model_id`: {model_id} is no causal language model, which predicts each token from those before it: name another."
    input_ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    try:
        first, second = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, 0].float()
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if (first - second).abs().max() > 0.01 * first.std():
        raise ValueError(message)


@torch.inference_mode()
def negative_log_likelihoods(
    model: PreTrainedModel, sequences: list[list[int]], eos_token_id: int | None, batch_size: int
) -> list[tuple[float, int]]:
    """Returns the summed negative log-likelihood of the scored tokens, and their number, for each sequence."""
    results = [(0.0, 0)] * len(sequences)
    # Sorted by length to minimize padding, longest first, so that running out of memory shows at once.
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    order = [index for index in order if len(sequences[index]) > 1]
    with tqdm(total=len(sequences), desc="Scoring", unit="text", initial=len(sequences) - len(order)) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = [torch.tensor(sequences[index]) for index in batch]
            input_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
            lengths = torch.tensor([len(row) for row in tokens], device=model.device)
            mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
            logits = model(input_ids, attention_mask=mask.long()).logits[:, :-1]
            losses = F.cross_entropy(logits.float().transpose(1, 2), input_ids[:, 1:], reduction="none")
            if eos_token_id is not None:
                is_eos = input_ids == eos_token_id
                mask &= ~is_eos | (is_eos.cumsum(dim=1) == 1)
            counted = mask[:, 1:]
            sums, counts = (losses.double() * counted).sum(dim=1).tolist(), counted.sum(dim=1).tolist()
            for index, result in zip(batch, zip(sums, counts)):
                results[index] = result
            progress.update(len(batch))
    return results


def entropy(tokens: list[int]) -> float:
    """Entropy of the token distribution of a sequence, in nats."""
    counts = Counter(tokens).values()
    return -sum(count / len(tokens) * math.log(count / len(tokens)) for count in counts)


def perplexity(total: float, count: int) -> float | None:
    """Perplexity of `count` tokens with this summed negative log-likelihood; `None` without tokens, or if it is not finite."""
    mean = total / count if count > 0 else math.nan
    return math.exp(mean) if mean < math.log(sys.float_info.max) else None


def distinct(sequences: list[list[int]], n: int) -> float | None:
    """Share of distinct n-grams among all n-grams of the sequences; `None` without n-grams."""
    ngrams = [tuple(tokens[start : start + n]) for tokens in sequences for start in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class GenPPL(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2602.16813"],
        )

    def _compute(
        self,
        predictions: list[str],
        model_id: str = "gpt2-large",
        batch_size: int = 8,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        token_ids: list[list[int]] | None = None,
    ) -> dict[str, Any]:
        if not predictions:
            raise ValueError("`predictions` is empty: pass at least one text.")
        if token_ids is not None and len(token_ids) != len(predictions):
            raise ValueError(
                f"`token_ids` has {len(token_ids)} sequences, but `predictions` has {len(predictions)} texts."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        model, tokenizer = load_scorer(model_id, device, dtype)
        context = getattr(model.config, "max_position_embeddings", None)
        if max_length is None:
            max_length = min(1024, context or 1024)
        if max_length < 2 or (context is not None and max_length > context):
            limit = "" if context is None else f", and at most the {context} of the scorer"
            raise ValueError(f"`max_length` must be at least 2{limit}, got {max_length}.")

        sequences = [tokenizer(text)["input_ids"] for text in predictions]
        num_truncated = sum(len(tokens) > max_length for tokens in sequences)
        sequences = [tokens[:max_length] for tokens in sequences]
        token_ids = sequences if token_ids is None else token_ids
        longest = max(map(len, sequences))
        if tokenizer.eos_token_id is not None:
            ends = [[tokenizer.eos_token_id] if len(tokens) < longest else [] for tokens in sequences]
            sequences = [tokens + end for tokens, end in zip(sequences, ends)]
        size = model.get_input_embeddings().weight.shape[0]
        if max(map(max, filter(None, sequences)), default=0) >= size:
            raise ValueError(
                f"`model_id`: the tokenizer of {model_id} has more tokens than the {size} of its model: save the tokenizer that "
                "belongs to it."
            )
        results = negative_log_likelihoods(model, sequences, tokenizer.eos_token_id, batch_size)

        totals, counts = zip(*results)
        entropies = [entropy(tokens) if len(tokens) > 0 else None for tokens in token_ids]
        known = [value for value in entropies if value is not None]
        return {
            "gen_ppl": perplexity(sum(totals), sum(counts)),
            "perplexities": [perplexity(*result) for result in results],
            "token_counts": list(counts),
            "entropy": sum(known) / len(known) if known else None,
            "entropies": entropies,
            **{f"distinct_{n}": distinct(token_ids, n) for n in (1, 2, 3)},
            "num_texts": len(predictions),
            "num_tokens": sum(counts),
            "num_empty": counts.count(0),
            "num_truncated": num_truncated,
        }
