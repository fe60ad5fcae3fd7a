"""Whitened coordinates on real models: what they save, and what denoising adds in them."""
