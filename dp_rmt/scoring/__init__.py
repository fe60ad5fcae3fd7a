"""Scores of generated text by the definitions of the E2E challenge's official script."""

from dp_rmt.scoring.texts import text_scores

__all__ = ["text_scores"]
