"""What is trained: data, a model, a loss, and how to see whether it is any good."""
