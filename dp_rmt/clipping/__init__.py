"""Clipped gradients: per example by vmap, and at about the cost of an ordinary gradient."""
