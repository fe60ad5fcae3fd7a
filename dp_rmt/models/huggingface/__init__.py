"""Hugging Face folders: found, read, written."""
