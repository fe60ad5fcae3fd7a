"""How noise acts on the factors of a low-rank update."""
