# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: texts that do not depend on who makes them, generative perplexity, and the whole measurement of a model."""

from .arguments import EvaluationArguments, check_arguments
from .bootstrap import bootstrap_ratio
from .evaluation import GenPPLEvaluation, decode, load_lines
from .frontier import perplexity_at_entropy, plot_frontier
from .likelihood import evaluate_likelihood
from .mauve import compute_mauve, divergence_frontier, embed_texts
from .metric import confidence_intervals, load_gen_ppl
from .repetition import copied_from, real_words, repetition_figures, self_bleu, vocabulary_of
from .report import describe_evaluation, describe_sampling, plot, table
from .samples import generate_samples
from .sources import CausalSource, FlowSource, Setting, TextSource, load_source
from .throughput import measure_throughput


__all__ = [
    "CausalSource",
    "EvaluationArguments",
    "FlowSource",
    "GenPPLEvaluation",
    "Setting",
    "TextSource",
    "bootstrap_ratio",
    "check_arguments",
    "compute_mauve",
    "confidence_intervals",
    "copied_from",
    "decode",
    "describe_evaluation",
    "describe_sampling",
    "divergence_frontier",
    "embed_texts",
    "evaluate_likelihood",
    "generate_samples",
    "load_gen_ppl",
    "load_lines",
    "load_source",
    "measure_throughput",
    "perplexity_at_entropy",
    "plot",
    "plot_frontier",
    "real_words",
    "repetition_figures",
    "self_bleu",
    "table",
    "vocabulary_of",
]
