# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: generate texts, score them, report the scores; and single figures as functions of lists of texts."""

from .bootstrap import bootstrap_ratio
from .check import check_figures, load_check
from .frontier import perplexity_at_entropy
from .likelihood import evaluate_likelihood
from .mauve import compute_mauve, divergence_frontier, embed_texts, mauve_figures
from .metric import confidence_intervals, load_gen_ppl, score
from .plots import plot, plot_frontier
from .repetition import copied_from, real_words, repetition_figures, self_bleu, vocabulary_of
from .report import describe_evaluation, report, table
from .samples import find_bos_token, find_eos_tokens, generate_causal_samples, generate_samples, pad_tokens
from .sources import CausalSource, FlowSource, Setting, load_source
from .texts import Texts, decode, generate_texts, load_lines, read_texts
from .throughput import measure_throughput


__all__ = [
    "CausalSource",
    "FlowSource",
    "Setting",
    "Texts",
    "bootstrap_ratio",
    "check_figures",
    "compute_mauve",
    "confidence_intervals",
    "copied_from",
    "decode",
    "describe_evaluation",
    "divergence_frontier",
    "embed_texts",
    "evaluate_likelihood",
    "find_bos_token",
    "find_eos_tokens",
    "generate_causal_samples",
    "generate_samples",
    "generate_texts",
    "load_check",
    "load_gen_ppl",
    "load_lines",
    "load_source",
    "mauve_figures",
    "measure_throughput",
    "pad_tokens",
    "perplexity_at_entropy",
    "plot",
    "plot_frontier",
    "read_texts",
    "real_words",
    "repetition_figures",
    "report",
    "score",
    "self_bleu",
    "table",
    "vocabulary_of",
]
