"""Denoising of noisy gradient matrices, and of Adam's first moment, by random-matrix theory."""
