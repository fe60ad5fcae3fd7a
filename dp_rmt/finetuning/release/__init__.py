"""What leaves with the model: its card, its tokenizer and how it writes. Nothing private is among it."""
