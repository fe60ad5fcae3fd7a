"""Decoders: a single model that has the features of every family."""
