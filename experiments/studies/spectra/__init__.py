"""Singular values of private gradients, step by step."""
