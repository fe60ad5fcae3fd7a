"""What comes from others; see README.md here. Nothing in ``dp_rmt`` imports from this package."""
