"""Denoisers and what others do about noise, each at its own learning rate."""
