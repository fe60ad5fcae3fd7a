"""Clipped gradients, by vmap over the examples or at about the cost of an ordinary gradient."""
