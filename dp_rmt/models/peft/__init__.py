"""Low-rank updates as folders of the PEFT library."""
