"""From rows of text to arrays of token ids."""
