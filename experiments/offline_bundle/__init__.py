"""One archive with everything that a machine without a network needs."""
