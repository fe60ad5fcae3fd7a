"""The tasks that an experiment can train: how each reads its data and its model."""
