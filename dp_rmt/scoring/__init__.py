"""Scores of classifiers by GLUE's definitions, and of generated text by those of the E2E challenge's script."""

from dp_rmt.scoring.texts import text_scores

__all__ = ["text_scores"]
