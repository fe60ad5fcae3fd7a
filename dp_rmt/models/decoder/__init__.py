"""Decoders: one model with the features of every family."""
