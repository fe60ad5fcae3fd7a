"""Readers, which turn files into rows of text."""
