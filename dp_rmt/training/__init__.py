"""The train step and its state, the loop, checkpoints, and the ledger of what was released."""
