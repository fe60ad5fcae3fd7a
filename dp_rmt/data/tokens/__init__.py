"""Turns rows of text into arrays of token ids."""
