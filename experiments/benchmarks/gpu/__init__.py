"""What is worth measuring on one GPU, in allocations of a few minutes; ../gpu.sh runs it."""
