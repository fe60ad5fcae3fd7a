"""What others do about privacy noise, as optax transformations."""
