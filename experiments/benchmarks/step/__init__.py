"""The profile of a private step."""
