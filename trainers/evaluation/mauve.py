# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""MAUVE (arXiv 2102.01454): how far the distributions of two collections of texts are apart, as embeddings show them."""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def check_mauve():
    """Raises an `ImportError` with the remedy where what clusters embeddings is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("MAUVE needs `pip install modeling-flm[mauve]`.") from error


@torch.inference_mode()
def embed_texts(
    texts: list[str],
    model_name: str,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """
    The last hidden state of a causal language model at the last token of each text, as MAUVE takes it. Shows its progress.

    Args:
        texts (`list[str]`): The texts. An empty one is the model's token for the end of a text.
        model_name (`str`): Name or folder of the model.
        batch_size (`int`, *optional*, defaults to 8): Texts at a time.
        max_length (`int`, *optional*): Tokens of a text to read. By default 1024, or the model's context if that is shorter.
        device (`str` or `torch.device`, *optional*): Where to run. By default on an accelerator, if there is one.

    Returns:
        `np.ndarray` of shape `(num_texts, hidden_size)`
    """
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_name).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    max_length = min(1024, context) if max_length is None else max_length
    filler = tokenizer.eos_token_id or 0
    tokens = [tokenizer(text)["input_ids"][:max_length] or [filler] for text in texts]
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))  # little padding
    features = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in tqdm(range(0, len(order), batch_size), desc="Embedding", unit="batch"):
        rows = order[start : start + batch_size]
        batch = [torch.tensor(tokens[index]) for index in rows]
        input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        hidden = model.base_model(input_ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), lengths - 1]
        features[rows] = last.float().cpu().numpy()
    return features


def divergence_frontier(p: np.ndarray, q: np.ndarray, scaling: float = 5.0, num_points: int = 25) -> np.ndarray:
    r"""
    The curve whose area MAUVE is: \\((e^{-c\,KL(q|r)}, e^{-c\,KL(p|r)})\\) over mixtures \\(r = \lambda p + (1-\lambda) q\\), with
    the ends (1, 0) and (0, 1).

    Args:
        p (`np.ndarray` of shape `(num_clusters,)`): Probabilities.
        q (`np.ndarray` of the shape of `p`): Other probabilities.
        scaling (`float`, *optional*, defaults to 5.0): The \\(c\\) of the paper.
        num_points (`int`, *optional*, defaults to 25): How many mixtures.

    Returns:
        `np.ndarray` of shape `(num_points + 2, 2)`, by increasing first coordinate.
    """
    points = []
    for weight in np.linspace(1e-6, 1 - 1e-6, num_points):
        mixture = weight * p + (1 - weight) * q
        divergences = [np.sum(x[x > 0] * np.log(x[x > 0] / mixture[x > 0])) for x in (q, p)]
        points.append([np.exp(-scaling * divergence) for divergence in divergences])
    return np.array([[0.0, 1.0], *points[::-1], [1.0, 0.0]])


def compute_mauve(
    features: np.ndarray,
    reference_features: np.ndarray,
    num_clusters: int | None = None,
    seed: int = 0,
    scaling: float = 5.0,
) -> float:
    """
    MAUVE of two sets of embeddings: both are reduced by PCA to 90 % of the variance and clustered by k-means together, and
    it is the area under the [`divergence_frontier`] of how often each falls into each cluster. 1 where both are alike,
    near 0 where they have nothing in common.

    It depends on the model of the embeddings, on the number of clusters and, through it, on the number of texts, so that only
    figures with the same can be compared; the paper has 5,000 texts of each, and a few hundred say little.

    Args:
        features (`np.ndarray` of shape `(num_texts, hidden_size)`): Embeddings of texts, as of [`embed_texts`].
        reference_features (`np.ndarray` of shape `(num_references, hidden_size)`): Those of reference texts.
        num_clusters (`int`, *optional*): By default a tenth of the smaller number of texts, and at least 2.
        seed (`int`, *optional*, defaults to 0): The seed of k-means.
        scaling (`float`, *optional*, defaults to 5.0): How fast it falls with the divergence.

    Returns:
        `float`
    """
    check_mauve()
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    smaller = min(len(features), len(reference_features))
    if smaller < 2:
        raise ValueError("`features` and `reference_features` must be of at least 2 texts each.")
    num_clusters = max(2, round(smaller / 10)) if num_clusters is None else num_clusters
    if not 2 <= num_clusters <= 2 * smaller:
        raise ValueError(
            f"`num_clusters` must be at least 2, and at most the {2 * smaller} texts, got {num_clusters}."
        )
    points = np.concatenate([features, reference_features]).astype(np.float64)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    if points.var(axis=0).sum() < 1e-12:
        return 1.0  # all embeddings are the same, and nothing tells the texts apart
    points = PCA(n_components=0.9, svd_solver="full").fit_transform(points)
    labels = KMeans(num_clusters, n_init=5, max_iter=500, random_state=seed).fit_predict(points)
    parts = labels[: len(features)], labels[len(features) :]
    p, q = (np.bincount(part, minlength=num_clusters) / len(part) for part in parts)
    curve = divergence_frontier(p, q, scaling)
    return float(np.sum(np.diff(curve[:, 0]) * (curve[1:, 1] + curve[:-1, 1]) / 2))
