# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""MAUVE (arXiv 2102.01454): a distance between the distributions of two collections of texts, from their embeddings."""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flm.hub.loading import load_checked

from .samples import pad_tokens


# MAUVE is averaged over this many seeds of k-means, which depends on its starting points.
_NUM_SEEDS = 5


def check_mauve():
    """Raises an `ImportError` if scikit-learn is not installed."""
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
    Embeds texts as MAUVE does: the last hidden state of a causal language model at the last token. Shows its progress.

    Args:
        texts (`list[str]`): The texts. An empty text is replaced with the model's EOS token.
        model_name (`str`): Name or folder of the model.
        batch_size (`int`, *optional*, defaults to 8): Texts per forward pass.
        max_length (`int`, *optional*): Largest number of tokens of a text. By default 1024, or the model's context if shorter.
        device (`str` or `torch.device`, *optional*): Device. By default an accelerator if there is one.

    Returns:
        `np.ndarray` of shape `(num_texts, hidden_size)`
    """
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    tokenizer = load_checked(AutoTokenizer, model_name)
    model = load_checked(AutoModelForCausalLM, model_name).to(device).eval()
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    max_length = min(1024, context) if max_length is None else max_length
    tokens = [tokenizer(text)["input_ids"][:max_length] or [tokenizer.eos_token_id or 0] for text in texts]
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))  # for little padding
    features = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in tqdm(range(0, len(order), batch_size), desc="Embedding", unit="batch"):
        rows = order[start : start + batch_size]
        input_ids, mask = pad_tokens([tokens[index] for index in rows], device=device)
        hidden = model.base_model(input_ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), mask.sum(dim=1) - 1]
        features[rows] = last.float().cpu().numpy()
    return features


def divergence_frontier(p: np.ndarray, q: np.ndarray, scaling: float = 5.0, num_points: int = 25) -> np.ndarray:
    r"""
    Returns the divergence curve, whose area is MAUVE: \\((e^{-c\,KL(q|r)}, e^{-c\,KL(p|r)})\\) over mixtures
    \\(r = \lambda p + (1-\lambda) q\\), with the end points (1, 0) and (0, 1).

    Args:
        p (`np.ndarray` of shape `(num_clusters,)`): Probabilities of the clusters.
        q (`np.ndarray` of shape `(num_clusters,)`): Their probabilities for the other texts.
        scaling (`float`, *optional*, defaults to 5.0): Scaling constant \\(c\\) of the paper.
        num_points (`int`, *optional*, defaults to 25): Number of mixtures.

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
    r"""
    Returns MAUVE of two sets of embeddings. Both are reduced by PCA to 90 % of the variance and clustered together by k-means;
    MAUVE is the area under the [`divergence_frontier`] of the two cluster distributions: 1 if they are equal, near 0 if they are
    disjoint.

    MAUVE depends on the embedding model, the number of clusters and, through it, the number of texts. Compare figures with equal
    settings only. The paper uses 5,000 texts of each kind; a few hundred are too few for a reliable figure.

    Args:
        features (`np.ndarray` of shape `(num_texts, hidden_size)`): Embeddings of the texts, from [`embed_texts`].
        reference_features (`np.ndarray` of shape `(num_references, hidden_size)`): Embeddings of the reference texts.
        num_clusters (`int`, *optional*): Number of clusters. By default a tenth of the smaller number of texts, at least 2.
        seed (`int`, *optional*, defaults to 0): Seed of k-means.
        scaling (`float`, *optional*, defaults to 5.0): Scaling constant \\(c\\) of the paper.

    Returns:
        `float`

    Raises:
        `ImportError`: if scikit-learn is not installed.
        `ValueError`: for fewer than 2 texts of each kind, and for an unusable `num_clusters`.
    """
    check_mauve()
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    smaller = min(len(features), len(reference_features))
    if smaller < 2:
        raise ValueError("`features` and `reference_features` must have at least 2 texts each.")
    num_clusters = max(2, round(smaller / 10)) if num_clusters is None else num_clusters
    if not 2 <= num_clusters <= 2 * smaller:
        raise ValueError(f"`num_clusters` must be between 2 and the {2 * smaller} texts, got {num_clusters}.")
    points = np.concatenate([features, reference_features]).astype(np.float64)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    if points.var(axis=0).sum() < 1e-12:
        return 1.0  # all embeddings are equal
    points = PCA(n_components=0.9, svd_solver="full").fit_transform(points)
    labels = KMeans(num_clusters, n_init=5, max_iter=500, random_state=seed).fit_predict(points)
    parts = labels[: len(features)], labels[len(features) :]
    p, q = (np.bincount(part, minlength=num_clusters) / len(part) for part in parts)
    curve = divergence_frontier(p, q, scaling)
    return float(np.sum(np.diff(curve[:, 0]) * (curve[1:, 1] + curve[:-1, 1]) / 2))


def mauve_figures(
    text_lists: list[list[str]], reference_texts: list[str], model_name: str, **kwargs
) -> list[dict[str, float | list[float]]]:
    """
    Returns columns for the row of each list of texts: MAUVE against the reference texts for 5 seeds of k-means, `mauve_seeds`, and
    their mean, `mauve`. Takes arguments of [`embed_texts`].
    """
    *features, reference = [embed_texts(texts, model_name, **kwargs) for texts in (*text_lists, reference_texts)]
    figures = []
    for each in features:
        values = [compute_mauve(each, reference, seed=seed) for seed in range(_NUM_SEEDS)]
        figures.append({"mauve_seeds": values, "mauve": sum(values) / _NUM_SEEDS})
    return figures
