"""Evaluation: bits per byte, answers against baselines, preferences, and their intervals."""

from groundup.evaluate.answers import exact_match, preference_accuracy, score_answers, token_f1
from groundup.evaluate.perplexity import bits_per_byte, compare_three
from groundup.evaluate.statistics import Curve, bootstrap_ratio, fit_curve, wilson

__all__ = [
    "Curve",
    "bits_per_byte",
    "bootstrap_ratio",
    "compare_three",
    "exact_match",
    "fit_curve",
    "preference_accuracy",
    "score_answers",
    "token_f1",
    "wilson",
]
