"""Scores of generated texts, method by method."""
