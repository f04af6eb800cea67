"""What is written and read: tuned models, checkpoints of runs, published formats."""
