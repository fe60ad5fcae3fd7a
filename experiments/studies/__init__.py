"""Studies: each a folder with its code, its table and its results."""
