"""Finds, reads and writes Hugging Face folders."""
