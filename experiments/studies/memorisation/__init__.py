"""Memorisation of sensitive tokens, with and without privacy."""
